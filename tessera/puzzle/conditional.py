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
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from tessera.data.batch import Batch
from tessera.data.documents import heldout
from tessera.model.checkpoint import load_model
from tessera.model.config import KINDS
from tessera.model.transformer import Transformer
from tessera.puzzle.library import assemble
from tessera.puzzle.score import Units, load_units, score_given
from tessera.puzzle.space import Space, Unit

Words = Sequence[tuple[str, str]]
Rows = Sequence[Mapping]


class ConditionalConfig(BaseModel):
    """In how many steps the limits are tightened, and on how many tokens each is scored.

    polish: rounds after the last step, each of at most `changes` of all places (a share).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rounds: int = Field(default=4, ge=1)
    polish: int = Field(default=4, ge=0)
    changes: float = Field(default=0.25, gt=0, le=1)
    tokens: int = Field(default=4096, ge=1)
    microbatch_tokens: int = Field(default=2048, ge=1)
    sequence_length: int = Field(default=256, ge=2)


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
            break  # no change within reach promises anything
        found = measure(near)
        if found[0] < own:
            words, (own, rows) = near, found
        elif changes == 1:
            break
        else:
            changes //= 2
    return words


@dataclass(frozen=True)
class Rescorer:
    """Scores of a whole library around any architecture of its space."""

    path: Path
    library: Path
    space: Space
    parent: Transformer
    units: Units
    batches: Sequence[Batch]

    @classmethod
    def load(
        cls, config: ConditionalConfig, parent: Path, library: Path, data: Path, space: Space
    ) -> Rescorer:
        """parent, library and data: finished runs (parent may be a model directory)."""
        module = load_model(parent, frozen=True)
        units = load_units(library / "library", module, space)
        for layer, block in enumerate(module.blocks):  # what was taken may be given back
            for kind in KINDS:
                units[Unit(layer, kind, space.words(layer, kind)[0])] = getattr(block, kind)
        batches = heldout(
            data,
            sequence_length=config.sequence_length,
            microbatch_tokens=config.microbatch_tokens,
            tokens=config.tokens,
        )
        return cls(parent, library / "library", space, module, units, batches)

    def __call__(self, words: Words) -> Rows:
        """Rows like those of `scores.jsonl`, the parent's own words among them."""
        _, rows = self.measure(words)
        return rows

    def measure(self, words: Words) -> tuple[dict[str, float], Rows]:
        """(the assembled architecture's own metrics, the change each word makes to them)."""
        module = load_model(self.path, frozen=True)
        current = assemble(module, self.library, words).requires_grad_(False)
        standing = dict.fromkeys(self.space.units(words))
        swaps = {key: unit for key, unit in self.units.items() if key not in standing}
        own, rows = score_given(self.parent, current, swaps, self.batches)
        still = [
            {"layer": layer, "kind": kind, "word": word, **dict.fromkeys(own, 0.0)}
            for layer, kind, word in standing
        ]
        return own, [*rows, *still]
