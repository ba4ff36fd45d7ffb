"""What a search chooses from: words and pairs, their scores, and what may not stand together.

An architecture's score is the sum over its words, or its pairs where two words were trained
together (Puzzle §2.4).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tessera.export.engines import refusals
from tessera.model.config import KINDS, ModelConfig
from tessera.puzzle.constraints import BatchChoice
from tessera.puzzle.cost_table import Words
from tessera.puzzle.program import Option, SearchError, Solution
from tessera.puzzle.space import Space, Unit, forbidden_pairs
from tessera.table import nearest

Architecture = list[tuple[str, str]]

# Limits that hold whatever the budget: at least one attention and one FFN must stay.
KEEP = {"attention left": -1.0, "FFNs left": -1.0}
_KEPT = {"attention left": ("attention", "gqa-"), "FFNs left": ("ffn", "swiglu-")}
CHANGED = "words changed"  # where a search is to stay near an architecture
_NO_DAMAGE = ("layer", "kind", "word", "tokens", "agreement")


@dataclass(frozen=True)
class Found:
    """An architecture, the batches it is to be served at, and the solver's proof, if any."""

    words: Architecture
    choice: BatchChoice
    solution: Solution | None = None
    meets: bool = True


@dataclass(frozen=True)
class Candidates:
    """A space of words with their scores, for a parent and the engines that must load the child.

    scores: the damage of each unit; the parent's own words score 0 where they have none.
    near: an architecture, and how many places may hold another word than it does.
    """

    parent: ModelConfig
    space: Space
    engines: tuple[str, ...]
    scores: Mapping[Unit, float]
    near: tuple[Architecture, int] | None = None

    @classmethod
    def of(
        cls,
        parent: ModelConfig,
        space: Space,
        engines: Sequence[str],
        rows: Sequence[Mapping],
        metric: str,
        near: tuple[Architecture, int] | None = None,
    ) -> Candidates:
        """From rows of `scores.jsonl`. metric: a column that is in every row and lower is better.

        Raises SearchError for another.
        """
        columns = [c for c in rows[0] if all(c in row for row in rows)] if rows else []
        columns = [column for column in columns if column not in _NO_DAMAGE]
        if rows and metric not in columns:
            why = "higher is better there" if metric == "agreement" else "scores.jsonl has none"
            raise SearchError(f"search.minimize = {metric!r}: {why}; {nearest(metric, columns)}")
        # An engine that the library was made for binds whatever is chosen from it.
        engines = tuple(dict.fromkeys((*engines, *space.servable)))
        table = {Unit(r["layer"], r["kind"], r["word"]): float(r[metric]) for r in rows}
        return cls(parent, space, engines, table, near)

    def score(self, unit: Unit) -> float:
        """The damage of a word, or of a pair of words trained together, in its place."""
        if unit.kind != "block" and unit.word == self.space.words(unit.layer, unit.kind)[0]:
            return self.scores.get(unit, 0.0)
        return self.scores[unit]

    def block_score(self, layer: int, attention: str, ffn: str) -> float:
        """The damage of two words in a layer."""
        pair = Unit.pair(layer, attention, ffn)
        if pair in self.pairs:
            return self.score(pair)
        return sum(self.score(Unit(layer, kind, word)) for kind, word in pair.parts)

    def total(self, words: Words) -> float:
        """The score of an architecture."""
        found = 0.0
        for layer, (attention, ffn) in enumerate(words):
            found += self.block_score(layer, attention, ffn)
        return found

    @property
    def limits(self) -> dict[str, float]:
        """What holds whatever the budget: `KEEP`, and staying near."""
        return KEEP | ({CHANGED: self.near[1]} if self.near else {})

    @functools.cached_property
    def pairs(self) -> frozenset[Unit]:
        return frozenset(self.space.pairs)

    @functools.cached_property
    def refused(self) -> frozenset[Unit]:
        """The pairs of words that an engine cannot load whatever is around them."""
        if not self.engines:
            return frozenset()
        found = forbidden_pairs(self.space, self.parent, self.engines)
        return frozenset(
            Unit.pair(layer, *words) for layer, all in enumerate(found) for words in all
        )

    def forbidden(self, cuts: Collection[Unit] = ()) -> list[tuple[int, str, str]]:
        """(layer, attention, FFN) that may not stand together as two words; trained together, two
        words are never those two trained apart."""
        pairs = (*self.refused, *self.space.pairs, *cuts)
        return [(pair.layer, *(word for _, word in pair.parts)) for pair in pairs]  # type: ignore[misc]

    def options(self, choice: BatchChoice, cuts: Collection[Unit] = ()) -> list[Option]:
        """Every word at every place, and every pair trained together that may be served."""
        costs = functools.cache(lambda *words: _costs(choice, dict(words)))  # equal in every layer
        apart = (
            Unit(layer, kind, word)
            for layer in range(len(self.space.layers))
            for kind in KINDS
            for word in self.space.words(layer, kind)
        )
        together = (p for p in self.space.pairs if p not in self.refused and p not in cuts)
        return [
            Option(*unit, self.score(unit), costs(*unit.parts) | self._changed(unit))
            for unit in (*apart, *together)
        ]

    def _changed(self, unit: Unit) -> dict[str, float]:
        if self.near is None:
            return {}
        own = set(zip(KINDS, self.near[0][unit.layer], strict=True))
        return {CHANGED: float(len(set(unit.parts) - own))}

    def refuses(self, words: Words) -> bool:
        """Whether one of the engines cannot load an architecture."""
        config = self.parent.with_words(list(words))
        return any(refusals(config, engine) for engine in self.engines)


def _costs(choice: BatchChoice, words: Mapping[str, str]) -> dict[str, float]:
    """What the words of a place cost under each limit; what `KEEP` counts is negative."""
    kept = {
        name: -1.0 if words.get(kind, "").startswith(prefix) else 0.0
        for name, (kind, prefix) in _KEPT.items()
    }
    return choice.costs(words) | kept


def keeps_both_kinds(words: Words) -> bool:
    """Whether at least one attention and one FFN are left."""
    return all(
        any(pair[KINDS.index(kind)].startswith(prefix) for pair in words)
        for kind, prefix in _KEPT.values()
    )


def chosen_words(solution: Solution, layers: int) -> Architecture:
    """The (attention, FFN) words of every layer that a solution chose."""
    chosen: dict[tuple[int, str], str] = {}
    for option in solution.options:
        chosen |= {(option.layer, kind): word for kind, word in Unit(*option.key).parts}
    return [(chosen[i, "attention"], chosen[i, "ffn"]) for i in range(layers)]
