"""What a search chooses from: words and pairs, their scores, and what may not stand together.

An architecture's score is the sum over its words, or its pairs where two words were trained
together (Puzzle §2.4). Column names of `scores.jsonl` are looked up here; costs are the cases'.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tessera.export.engines import refusals
from tessera.model.config import KINDS, ModelConfig
from tessera.puzzle.constraints import Case
from tessera.puzzle.cost_table import Words
from tessera.puzzle.program import Option, SearchError, Solution
from tessera.puzzle.space import Space, Unit, forbidden_pairs
from tessera.table import nearest

Architecture = list[tuple[str, str]]
Cut = tuple[int, str, str]  # layer, attention word, FFN word

# What a model cannot do without, as limits: at least one attention and one FFN must stay.
KEEP = {"attention left": -1.0, "FFNs left": -1.0}
CHANGED = "words changed"  # from `near`, where a search is to stay close to an architecture
_KEPT = {"attention left": ("attention", "gqa-"), "FFNs left": ("ffn", "swiglu-")}
_NO_DAMAGE = ("layer", "kind", "word", "tokens", "agreement")


def score_columns(rows: Sequence[Mapping]) -> list[str]:
    """The columns of `scores.jsonl` that can be minimised: in every row, and lower is better."""
    shared = [c for c in rows[0] if all(c in row for row in rows)] if rows else []
    return [column for column in shared if column not in _NO_DAMAGE]


@dataclass(frozen=True)
class Candidates:
    """A space of words with their scores, for a parent and the engines that must load the child.

    scores: (layer, kind, word) -> damage; the parent's own words score 0 where they have none.
    near: an architecture, and how many places may hold another word than it does.
    """

    parent: ModelConfig
    space: Space
    engines: tuple[str, ...]
    scores: Mapping[tuple[int, str, str], float]
    near: tuple[Architecture, int] | None = None

    @classmethod
    def of(
        cls,
        parent: ModelConfig,
        space: Space,
        engines: Sequence[str],
        rows: Sequence[Mapping],
        metric: str,
    ) -> Candidates:
        """From rows of `scores.jsonl`. Raises SearchError for a column that they have not."""
        columns = score_columns(rows)
        if rows and metric not in columns:
            why = "higher is better there" if metric == "agreement" else "scores.jsonl has none"
            raise SearchError(f"search.minimize = {metric!r}: {why}; {nearest(metric, columns)}")
        # An engine that the library was made for binds whatever is chosen from it.
        bound = (*engines, *space.servable)
        table = {(r["layer"], r["kind"], r["word"]): float(r[metric]) for r in rows}
        return cls(parent, space, tuple(dict.fromkeys(bound)), table)

    def score(self, layer: int, kind: str, word: str) -> float:
        """The damage of a word, or of a pair (kind `block`), in its place."""
        key = (layer, kind, word)
        if kind != "block" and word == self.space.words(layer, kind)[0]:
            return self.scores.get(key, 0.0)
        return self.scores[key]

    def total(self, words: Words) -> float:
        """The score of an architecture."""
        found = 0.0
        for layer, (attention, ffn) in enumerate(words):
            if (pair := Unit.pair(layer, attention, ffn)) in self.pairs:
                found += self.score(*pair)
            else:
                found += self.score(layer, "attention", attention) + self.score(layer, "ffn", ffn)
        return found

    @property
    def limits(self) -> dict[str, float]:
        """What holds whatever the budget: `KEEP`, and staying near."""
        return KEEP | ({CHANGED: self.near[1]} if self.near else {})

    @functools.cached_property
    def pairs(self) -> frozenset[Unit]:
        return frozenset(self.space.pairs)

    @functools.cached_property
    def refused(self) -> frozenset[Cut]:
        """The (layer, attention, FFN) that an engine cannot load whatever is around them."""
        if not self.engines:
            return frozenset()
        found = forbidden_pairs(self.space, self.parent, self.engines)
        return frozenset((layer, a, f) for layer, pairs in enumerate(found) for a, f in pairs)

    def forbidden(self, cuts: Collection[Cut]) -> list[Cut]:
        """What may not stand together as two words; trained together, two words are never those
        two trained apart."""
        return [*self.refused, *map(_cut, self.space.pairs), *cuts]

    def options(self, case: Case, cuts: Collection[Cut] = ()) -> list[Option]:
        """Every word at every place, and every pair trained together that may be served."""
        costs = functools.cache(lambda *words: _costs(case, dict(words)))  # equal in every layer
        found = []
        for layer in range(len(self.space.layers)):
            for kind in KINDS:
                for word in self.space.words(layer, kind):
                    score = self.score(layer, kind, word)
                    cost = costs((kind, word)) | self._changed(layer, {kind: word})
                    found.append(Option(layer, kind, word, score, cost))
        for pair in self.space.pairs:
            if _cut(pair) in self.refused or _cut(pair) in cuts:
                continue
            cost = costs(*pair.parts) | self._changed(pair.layer, dict(pair.parts))
            found.append(Option(*pair, self.score(*pair), cost))
        return found

    def _changed(self, layer: int, words: Mapping[str, str]) -> dict[str, float]:
        if self.near is None:
            return {}
        own = set(zip(KINDS, self.near[0][layer], strict=True))
        return {CHANGED: float(len(set(words.items()) - own))}

    def refuses(self, words: Words) -> bool:
        """Whether one of the engines cannot load an architecture."""
        config = self.parent.with_words(list(words))
        return any(refusals(config, engine) for engine in self.engines)


def _cut(pair: Unit) -> Cut:
    (_, attention), (_, ffn) = pair.parts
    return pair.layer, attention, ffn


def _costs(case: Case, words: Mapping[str, str]) -> dict[str, float]:
    """What a place's words, or a pair's, cost under each limit; what `KEEP` counts is negative."""
    found = case.costs(words)
    for name, (kind, prefix) in _KEPT.items():
        found[name] = -1.0 if words.get(kind, "").startswith(prefix) else 0.0
    return found


def keeps(words: Words) -> bool:
    """Whether at least one attention and one FFN are left."""
    return all(
        any(pair[KINDS.index(kind)].startswith(prefix) for pair in words)
        for kind, prefix in _KEPT.values()
    )


def words_of(solution: Solution, layers: int) -> Architecture:
    """The (attention, FFN) words of every layer that a solution chose."""
    chosen: dict[tuple[int, str], str] = {}
    for option in solution.options:
        chosen |= {(option.layer, kind): word for kind, word in Unit(*option.key).parts}
    return [(chosen[i, "attention"], chosen[i, "ffn"]) for i in range(layers)]
