"""The simple methods a search has to beat, at the same budget and for the same engines.

Each takes the best it has among those that meet the constraints; the coarse ones, for which a
layer of five is a fifth of the model, may have none, and then give the nearest and say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from tessera.model.config import KINDS
from tessera.puzzle.candidates import Architecture, Candidates, Found, keeps_both_kinds
from tessera.puzzle.constraints import BatchChoice
from tessera.puzzle.program import SearchError
from tessera.puzzle.space import Unit

Choices = Sequence[BatchChoice]


def uniform(candidates: Candidates, choices: Choices) -> Found:
    """One attention word and one FFN width in every layer: of those that meet the constraints, the
    least damaging (Minitron's width pruning, on the library's own words)."""
    attention = _everywhere(candidates, "attention", "gqa-")
    ffn = _everywhere(candidates, "ffn", "swiglu-")
    offered = [list(zip(a, f, strict=True)) for a in attention for f in ffn]
    offered.sort(key=candidates.total)
    return _first(candidates, choices, offered)


def dropped_layers(candidates: Candidates, choices: Choices, influence: Sequence[float]) -> Found:
    """The parent without its least influential layers, as few as meet the constraints (ShortGPT).

    A layer whose space has no `noop` stays. Raises SearchError where none has.
    """
    ranking = {layer: influence[layer] for layer in _removable(candidates, "dropped", KINDS)}
    return _first(candidates, choices, _dropped(candidates, ranking, KINDS))


def dropped_attention(candidates: Candidates, choices: Choices) -> Found:
    """The parent without the attentions whose removal scores least, as few as that."""
    kinds = ("attention",)
    able = _removable(candidates, "dropped-attention", kinds)
    ranking = {layer: candidates.score(Unit(layer, "attention", "noop")) for layer in able}
    return _first(candidates, choices, _dropped(candidates, ranking, kinds))


def greedy(candidates: Candidates, choices: Choices) -> Found:
    """Puzzle's own baseline: layer by layer, by ascending mean score, the best block within an
    equal share of the budget, what a layer leaves over rolled to the next."""
    found = [_placed([one], _greedy(candidates, one)) for one in choices]
    able = [f for f in found if not candidates.refuses(f.words) and keeps_both_kinds(f.words)]
    if not able:
        raise SearchError(
            f'method = "greedy": {", ".join(candidates.engines) or "nothing"} cannot load what it '
            "chose, and it never looks back; take another method, or a looser budget"
        )
    return min(able, key=lambda one: (not one.meets, candidates.total(one.words)))


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
    candidates: Candidates, ranking: Mapping[int, float], kinds: Sequence[str]
) -> Iterator[Architecture]:
    """The parent, then without `kinds` in one more of its lowest-ranking layers at a time.

    A layer that an engine cannot do without is passed over.
    """
    words = list(candidates.parent.words)
    yield words
    for layer in sorted(ranking, key=ranking.__getitem__):
        ffn = "noop" if "ffn" in kinds else words[layer][1]
        fewer = [*words[:layer], ("noop", ffn), *words[layer + 1 :]]
        if keeps_both_kinds(fewer) and not candidates.refuses(fewer):
            words = fewer
            yield words


def _first(candidates: Candidates, choices: Choices, offered: Iterable[Architecture]) -> Found:
    """The first architecture that meets the constraints somewhere, else the one nearest to that."""
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
            f"{', '.join(candidates.engines)} cannot load the parent itself, nor anything like it; "
            "`tessera show` says why"
        )
    return min(missed, key=lambda one: one.choice.excess(one.words))


def _placed(choices: Choices, words: Architecture) -> Found:
    """An architecture at the fastest batches where it meets the constraints, else the nearest."""
    fits = [one for one in choices if one.excess(words) <= 1 + 1e-9]
    if fits:
        return Found(words, min(fits, key=lambda one: one.seconds_per_token(words)))
    return Found(words, min(choices, key=lambda one: one.excess(words)), meets=False)


def _greedy(candidates: Candidates, choice: BatchChoice) -> Architecture:
    layers = range(len(candidates.space.layers))
    blocks = {layer: _blocks(candidates, choice, layer) for layer in layers}
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


def _blocks(candidates: Candidates, choice: BatchChoice, layer: int) -> list[tuple]:
    """(score, words, costs) of every block that may stand in a layer."""
    return [
        (
            candidates.block_score(layer, attention, ffn),
            (attention, ffn),
            choice.costs({"attention": attention, "ffn": ffn}),
        )
        for attention in candidates.space.words(layer, "attention")
        for ffn in candidates.space.words(layer, "ffn")
        if Unit.pair(layer, attention, ffn) not in candidates.refused
    ]
