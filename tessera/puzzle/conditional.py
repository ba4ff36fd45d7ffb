"""Scores given what is gone already: a sequence of small searches instead of one large one.

    for r = 1 … R:   c_w = KL(architecture with w alone swapped in) - KL(architecture)
                     architecture = the integer program's answer under limits r/R of the way

Replace-one scores add up only while few blocks change. R = 1 is the plain search.
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
    """rounds: R. polish: rounds after that, each of at most `changes` (a share) of all places."""

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

    solve_at(rows, share): the best words under limits that are `share` of the way from the parent's
    cost, by `rows` around the parent at first. rescore(words): rows around that architecture.
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
    """An architecture that is measured no worse than `words`, from searches around it in a trust
    region: half as many changes are tried where the measured value did not fall.

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
