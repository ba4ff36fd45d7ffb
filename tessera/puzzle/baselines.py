"""The simple methods a search has to beat, at the same budget and for the same engines.

`uniform`: one attention word and one FFN width in every layer (Minitron's width pruning, on the
library's own words). `dropped`: whole layers removed, least block influence first (ShortGPT).
`dropped_attention`: attention removed, least replace-one damage first. `greedy`: Puzzle's own
baseline, an equal budget a layer, what a layer leaves over rolled to the next.

Each takes the best it has among those that meet the constraints; the coarse ones, for which a
layer of five is a fifth of the model, may have none, and then give the nearest and say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from tessera.model.config import KINDS
from tessera.puzzle.candidates import Architecture, Candidates, keeps
from tessera.puzzle.constraints import Case
from tessera.puzzle.program import SearchError
from tessera.puzzle.space import Unit
from tessera.puzzle.sweep import Found


def uniform(candidates: Candidates, cases: Sequence[Case]) -> Found:
    """The same two words everywhere: of those that meet the constraints, the least damaging."""
    attention = _everywhere(candidates, "attention", "gqa-")
    ffn = _everywhere(candidates, "ffn", "swiglu-")
    offered = [list(zip(a, f, strict=True)) for a in attention for f in ffn]
    offered.sort(key=candidates.total)
    return _first(candidates, cases, offered)


def dropped_layers(
    candidates: Candidates, cases: Sequence[Case], influence: Sequence[float]
) -> Found:
    """The parent without its least influential layers, as few as meet the constraints.

    A layer whose space has no `noop` stays. Raises SearchError where none has.
    """
    able = _removable(candidates, "dropped", KINDS)
    ranking = {layer: influence[layer] for layer in able}
    return _first(candidates, cases, _dropped(candidates, ranking, ("noop", "noop")))


def dropped_attention(
    candidates: Candidates, cases: Sequence[Case], damage: Mapping[int, float]
) -> Found:
    """The parent without the attentions whose removal does least damage, as few as that."""
    return _first(candidates, cases, _dropped(candidates, damage, ("noop", None)))


def greedy(candidates: Candidates, cases: Sequence[Case]) -> Found:
    """Layer by layer, the least harmful first, the best block that its share of the budget buys."""
    found = [_place(candidates, [case], _greedy(candidates, case)) for case in cases]
    able = [one for one in found if not candidates.refuses(one.words) and keeps(one.words)]
    if not able:
        raise SearchError(
            f'method = "greedy": {", ".join(candidates.engines) or "nothing"} cannot load what it '
            "chose, and it never looks back; take another method, or a looser budget"
        )
    return min(able, key=lambda one: (not one.meets, candidates.total(one.words)))


def removal_scores(candidates: Candidates) -> dict[int, float]:
    """Layer -> the score of removing its attention, where the space can; SearchError if nowhere."""
    able = _removable(candidates, "dropped-attention", ("attention",))
    return {layer: candidates.score(layer, "attention", "noop") for layer in able}


def _removable(candidates: Candidates, method: str, kinds: Sequence[str]) -> list[int]:
    """Layers whose space has `noop` for all of these kinds; SearchError where there is none."""
    space = candidates.space
    layers = range(len(space.layers))
    able = [i for i in layers if all("noop" in space.words(i, kind) for kind in kinds)]
    if not able:
        raise SearchError(
            f'method = "{method}" needs the word noop for the {" and the ".join(kinds)} of some '
            "layer; add it to the space of the [bld] table"
        )
    return able


def _everywhere(candidates: Candidates, kind: str, prefix: str) -> list[list[str]]:
    """Each layer's own words of a kind, and every single word that all the layers offer."""
    offered = [candidates.space.words(i, kind) for i in range(len(candidates.space.layers))]
    shared = [w for w in offered[0] if w.startswith(prefix) and all(w in o for o in offered)]
    own = [words[0] for words in offered]
    lists = [own, *([word] * len(offered) for word in shared)]
    return [words for i, words in enumerate(lists) if words not in lists[:i]]


def _dropped(
    candidates: Candidates, ranking: Mapping[int, float], left: tuple[str | None, str | None]
) -> Iterator[Architecture]:
    """The parent, then with `left` in one more of its lowest-ranking layers at a time.

    None keeps what is there. A layer that an engine cannot do without is passed over.
    """
    words = list(candidates.parent.words)
    yield words
    for layer in sorted(ranking, key=ranking.__getitem__):
        attention, ffn = words[layer]
        gone = (left[0] or attention, left[1] or ffn)
        fewer = [*words[:layer], gone, *words[layer + 1 :]]
        if keeps(fewer) and not candidates.refuses(fewer):
            words = fewer
            yield words


def _first(candidates: Candidates, cases: Sequence[Case], offered: Iterable[Architecture]) -> Found:
    """The first architecture that meets the constraints somewhere, else the one nearest to that."""
    missed: list[Found] = []
    for words in offered:
        if candidates.refuses(words):
            continue
        found = _place(candidates, cases, words)
        if found.meets:
            return found
        missed.append(found)
    if not missed:
        raise SearchError(
            f"{', '.join(candidates.engines)} cannot load the parent itself, nor anything like it; "
            "`tessera show` says why"
        )
    return min(missed, key=lambda one: one.case.excess(one.words))


def _place(candidates: Candidates, cases: Sequence[Case], words: Architecture) -> Found:
    """An architecture in the fastest case that it meets, else in the nearest."""
    fits = [case for case in cases if case.excess(words) <= 1 + 1e-9]
    if fits:
        return Found(words, min(fits, key=lambda case: case.seconds_per_token(words)))
    return Found(words, min(cases, key=lambda case: case.excess(words)), meets=False)


def _greedy(candidates: Candidates, case: Case) -> Architecture:
    """Puzzle's greedy choice: layers by ascending mean score, leftovers rolled over."""
    layers = range(len(candidates.space.layers))
    blocks = {layer: _blocks(candidates, case, layer) for layer in layers}
    share = {key: most / len(layers) for key, most in case.room().items()}
    spare = dict.fromkeys(share, 0.0)
    chosen: dict[int, tuple[str, str]] = {}

    def mean(layer: int) -> float:
        return sum(score for score, _, _ in blocks[layer]) / len(blocks[layer])

    for layer in sorted(layers, key=mean):
        most = {key: share[key] + spare[key] for key in share}

        def over(costs: dict[str, float], most: dict[str, float] = most) -> float:
            unit = {one.key: one.most for one in case.limits}
            return max(0.0, *((costs[key] - most[key]) / unit[key] for key in most))

        _, words, costs = min(blocks[layer], key=lambda block: (over(block[2]), block[0]))
        chosen[layer] = words
        spare = {key: most[key] - costs[key] for key in share}
    return [chosen[layer] for layer in layers]


def _blocks(candidates: Candidates, case: Case, layer: int) -> list[tuple]:
    """(score, words, costs) of every block that may stand in a layer."""
    found = []
    for attention in candidates.space.words(layer, "attention"):
        for ffn in candidates.space.words(layer, "ffn"):
            if (layer, attention, ffn) in candidates.refused:
                continue
            if (pair := Unit.pair(layer, attention, ffn)) in candidates.pairs:
                score = candidates.score(*pair)
            else:
                score = candidates.score(layer, "attention", attention)
                score += candidates.score(layer, "ffn", ffn)
            costs = case.costs({"attention": attention, "ffn": ffn})
            found.append((score, (attention, ffn), costs))
    return found
