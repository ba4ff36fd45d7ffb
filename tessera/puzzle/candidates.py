"""What a search chooses from, and the simple methods that it has to beat.

An architecture's score is the sum over its words, or its pairs where two words were trained
together (Puzzle §2.4). Each simple method takes the best it has among those that meet the
constraints; the coarse ones may have none, and then give the nearest and say so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tessera.export.engines import refusals
from tessera.model.config import KINDS, ModelConfig
from tessera.puzzle.constraints import BatchChoice
from tessera.puzzle.cost_table import Words
from tessera.puzzle.program import Option, SearchError, Solution
from tessera.puzzle.space import Space, Unit, forbidden_pairs
from tessera.table import nearest

Architecture = list[tuple[str, str]]
Choices = Sequence[BatchChoice]

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
    """A space of words with their scores, for a parent and the engines that must load the child."""

    parent: ModelConfig
    space: Space
    engines: tuple[str, ...]
    scores: Mapping[Unit, float]  # the parent's own words score 0 where they have none
    near: tuple[Architecture, int] | None = None  # how many places may hold another word than it

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
        """From rows of `scores.jsonl`. Raises SearchError unless metric is a column of every row
        where lower is better."""
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
        if unit.kind != "block" and unit.word == self.space.words(unit.layer, unit.kind)[0]:
            return self.scores.get(unit, 0.0)
        return self.scores[unit]

    def block_score(self, layer: int, attention: str, ffn: str) -> float:
        pair = Unit.pair(layer, attention, ffn)
        if pair in self.pairs:
            return self.score(pair)
        return sum(self.score(Unit(layer, kind, word)) for kind, word in pair.parts)

    def total(self, words: Words) -> float:
        found = 0.0  # not sum(), which compensates rounding
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
        """(layer, attention, FFN) that may not stand together as two words trained apart."""
        pairs = (*self.refused, *self.space.pairs, *cuts)
        return [(pair.layer, *(word for _, word in pair.parts)) for pair in pairs]  # type: ignore[misc]

    def options(self, choice: BatchChoice, cuts: Collection[Unit] = ()) -> list[Option]:
        """Every word at every place, and every pair trained together that may be served."""

        @functools.cache  # equal in every layer
        def costs(*words: tuple[str, str]) -> dict[str, float]:
            held = dict(words)
            kept = {
                name: -1.0 if held.get(kind, "").startswith(prefix) else 0.0
                for name, (kind, prefix) in _KEPT.items()
            }
            return choice.costs(held) | kept

        def changed(unit: Unit) -> dict[str, float]:
            if self.near is None:
                return {}
            own = set(zip(KINDS, self.near[0][unit.layer], strict=True))
            return {CHANGED: float(len(set(unit.parts) - own))}

        apart = (
            Unit(layer, kind, word)
            for layer in range(len(self.space.layers))
            for kind in KINDS
            for word in self.space.words(layer, kind)
        )
        together = (p for p in self.space.pairs if p not in self.refused and p not in cuts)
        return [
            Option(*unit, self.score(unit), costs(*unit.parts) | changed(unit))
            for unit in (*apart, *together)
        ]

    def refuses(self, words: Words) -> bool:
        config = self.parent.with_words(list(words))
        return any(refusals(config, engine) for engine in self.engines)


def keeps_both_kinds(words: Words) -> bool:
    return all(
        any(pair[KINDS.index(kind)].startswith(prefix) for pair in words)
        for kind, prefix in _KEPT.values()
    )


def chosen_words(solution: Solution, layers: int) -> Architecture:
    chosen: dict[tuple[int, str], str] = {}
    for option in solution.options:
        chosen |= {(option.layer, kind): word for kind, word in Unit(*option.key).parts}
    return [(chosen[i, "attention"], chosen[i, "ffn"]) for i in range(layers)]


def uniform(candidates: Candidates, choices: Choices) -> Found:
    """One attention word and one FFN width in every layer, as in Minitron's width pruning."""
    attention = _everywhere(candidates, "attention", "gqa-")
    ffn = _everywhere(candidates, "ffn", "swiglu-")
    offered = [list(zip(a, f, strict=True)) for a in attention for f in ffn]
    offered.sort(key=candidates.total)
    return _first(candidates, choices, offered)


def dropped_layers(candidates: Candidates, choices: Choices, influence: Sequence[float]) -> Found:
    """The parent without its least influential layers, as few as needed (ShortGPT)."""
    return _dropped(candidates, choices, "dropped", KINDS, influence.__getitem__)


def dropped_attention(candidates: Candidates, choices: Choices) -> Found:
    """The parent without the attentions whose removal scores least, as few as that."""

    def harm(layer: int) -> float:
        return candidates.score(Unit(layer, "attention", "noop"))

    return _dropped(candidates, choices, "dropped-attention", KINDS[:1], harm)


def greedy(candidates: Candidates, choices: Choices) -> Found:
    """Puzzle's own baseline: layer by layer, by ascending mean score, the best block within an
    equal share of the budget, what a layer leaves over rolled to the next."""
    found = [_placed([one], _greedy(candidates, one)) for one in choices]
    able = [f for f in found if not candidates.refuses(f.words) and keeps_both_kinds(f.words)]
    if not able:
        raise SearchError(
            f'method = "greedy" found nothing that {", ".join(candidates.engines) or "keeps both"} '
            "can load; take another method, or a looser budget"
        )
    return min(able, key=lambda one: (not one.meets, candidates.total(one.words)))


def _everywhere(candidates: Candidates, kind: str, prefix: str) -> list[list[str]]:
    offered = [candidates.space.words(i, kind) for i in range(len(candidates.space.layers))]
    shared = [w for w in offered[0] if w.startswith(prefix) and all(w in o for o in offered)]
    own = [words[0] for words in offered]
    lists = [own, *([word] * len(offered) for word in shared)]
    return [words for i, words in enumerate(lists) if words not in lists[:i]]


def _dropped(
    candidates: Candidates,
    choices: Choices,
    method: str,
    kinds: Sequence[str],
    harm: Callable[[int], float],
) -> Found:
    space = candidates.space
    layers = range(len(space.layers))
    able = [i for i in layers if all("noop" in space.words(i, kind) for kind in kinds)]
    if not able:
        raise SearchError(
            f'method = "{method}" needs the word noop for the {" and the ".join(kinds)} of some '
            "layer; add it to the space of the [bld] table"
        )

    def fewer() -> Iterator[Architecture]:
        words = list(candidates.parent.words)
        yield words
        for layer in sorted(able, key=harm):
            ffn = "noop" if "ffn" in kinds else words[layer][1]
            less = [*words[:layer], ("noop", ffn), *words[layer + 1 :]]
            if keeps_both_kinds(less) and not candidates.refuses(less):
                words = less
                yield words

    return _first(candidates, choices, fewer())


def _first(candidates: Candidates, choices: Choices, offered: Iterable[Architecture]) -> Found:
    missed: list[Found] = []
    for words in offered:
        if candidates.refuses(words):
            continue
        found = _placed(choices, words)
        if found.meets:
            return found
        missed.append(found)
    if not missed:
        raise SearchError(
            f"{', '.join(candidates.engines)} cannot load the parent; `tessera show` says why"
        )
    return min(missed, key=lambda one: one.choice.excess(one.words))


def _placed(choices: Choices, words: Architecture) -> Found:
    """An architecture at the fastest batches where it meets the constraints, else the nearest."""
    fits = [one for one in choices if one.excess(words) <= 1 + 1e-9]
    if fits:
        return Found(words, min(fits, key=lambda one: one.seconds_per_token(words)))
    return Found(words, min(choices, key=lambda one: one.excess(words)), meets=False)


def _greedy(candidates: Candidates, choice: BatchChoice) -> Architecture:
    space = candidates.space
    layers = range(len(space.layers))
    blocks = {  # (score, words, costs) of every block that may stand in a layer
        layer: [
            (candidates.block_score(layer, a, f), (a, f), choice.costs({"attention": a, "ffn": f}))
            for a in space.words(layer, "attention")
            for f in space.words(layer, "ffn")
            if Unit.pair(layer, a, f) not in candidates.refused
        ]
        for layer in layers
    }
    share = {key: most / len(layers) for key, most in choice.bounds().items()}
    bound = {one.key: one.bound for one in choice.constraints}
    spare = dict.fromkeys(share, 0.0)
    chosen: dict[int, tuple[str, str]] = {}
    mean = {i: sum(score for score, _, _ in found) / len(found) for i, found in blocks.items()}
    for layer in sorted(layers, key=mean.__getitem__):
        most = {key: share[key] + spare[key] for key in share}

        def order(block: tuple, most: dict[str, float] = most) -> tuple[float, float]:
            score, _, costs = block
            return max(0.0, *((costs[key] - most[key]) / bound[key] for key in most)), score

        _, chosen[layer], costs = min(blocks[layer], key=order)
        spare = {key: most[key] - costs[key] for key in share}
    return [chosen[layer] for layer in layers]
