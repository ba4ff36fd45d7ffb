"""Scores given what is gone already: a sequence of small searches instead of one large one.

    for r = 1 … R:   c_w = KL(architecture with w alone swapped in) - KL(architecture)
                     architecture = the integer program's answer under limits r/R of the way

Replace-one scores add up only while few blocks change: layers that are each dispensable alone
may not be together. So the limits are tightened in R steps from the parent's own cost to what was
asked, and every word is scored anew around what the step before left. A word that was taken may
be given back. R = 1 is the plain search.

The last architecture is then polished: around it the scores are exact for one change and good for a
few, so the program is solved again within a few changes of it, and what it finds is kept where its
measured KL is lower; where it is not, half as many changes are tried (a trust region).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import Field

from tessera.model.checkpoint import load_model
from tessera.model.config import name
from tessera.puzzle.library import assemble
from tessera.puzzle.score import HeldoutConfig, load_units, score_given
from tessera.puzzle.space import Space, Unit

Words = Sequence[tuple[str, str]]
Rows = Sequence[Mapping]


class ConditionalConfig(HeldoutConfig):
    """In how many steps the limits are tightened, and on how many tokens each is scored.

    polish: rounds after the last step, each of at most `changes` of all places (a share).
    """

    rounds: int = Field(default=4, ge=1)
    polish: int = Field(default=4, ge=0)
    changes: float = Field(default=0.25, gt=0, le=1)
    tokens: int = Field(default=4096, ge=1)
    microbatch_tokens: int = Field(default=2048, ge=1)


def tighten(
    rounds: int,
    rows: Rows,
    solve_at: Callable[[Rows, float], Words],
    rescore: Callable[[Words], Rows],
) -> list[Words]:
    """The architecture after each round; the last meets the limits.

    rows: scores around the parent. solve_at(rows, share): the best words under limits that are
    `share` of the way from the parent's cost. rescore(words): scores around that architecture.
    """
    found: list[Words] = []
    for number in range(1, rounds + 1):
        rows = rescore(found[-1]) if found else rows
        found.append(solve_at(rows, number / rounds))
    return found


def polish(
    rounds: int,
    words: Words,
    changes: int,
    solve_near: Callable[[Rows, Words, int], Words],
    measure: Callable[[Words], tuple[float, Rows]],
) -> Words:
    """An architecture that is measured no worse than `words`, from small searches around it.

    solve_near(rows, words, n): the best words under the limits with at most n places other than
    in `words`. measure(words): what is minimised, measured, and the change each word makes to it.
    """
    own, rows = measure(words)
    for _ in range(rounds):
        near = solve_near(rows, words, changes)
        if list(near) == list(words):
            break
        found = measure(near)
        if found[0] < own:
            words, (own, rows) = near, found
        elif changes == 1:
            break
        else:
            changes //= 2
    return words


class Rescorer:
    """Scores of a whole library around any architecture of its space.

    parent, library and data: finished runs (parent may be a model directory).
    """

    def __init__(
        self, config: ConditionalConfig, parent: Path, library: Path, data: Path, space: Space
    ) -> None:
        self.path, self.library, self.space = parent, library / "library", space
        self.parent = load_model(parent, frozen=True)
        self.units = load_units(self.library, self.parent, space)
        for layer, block in enumerate(self.parent.blocks):  # what was taken may be given back
            for kind, variant in block.config:
                self.units[Unit(layer, kind, name(variant))] = getattr(block, kind)
        self.batches = config.heldout(data)

    def __call__(self, words: Words) -> Rows:
        """Rows like those of `scores.jsonl`, the parent's own words among them."""
        _, rows = self.measure(words)
        return rows

    def measure(self, words: Words) -> tuple[dict[str, float], Rows]:
        """(the assembled architecture's own metrics, the change each word makes to them)."""
        module = load_model(self.path, frozen=True)
        current = assemble(module, self.library, words).requires_grad_(False)
        held = self.space.units(words)
        others = {unit: module for unit, module in self.units.items() if unit not in held}
        own, rows = score_given(self.parent, current, others, self.batches)
        unchanged = dict.fromkeys(own, 0.0)
        rows += [{**unit._asdict(), **unchanged} for unit in held]
        return own, rows
