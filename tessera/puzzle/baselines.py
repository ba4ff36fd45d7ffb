"""The three simple methods a search has to beat, at the same budget.

`uniform_width`: every FFN cut to one width (Minitron's width pruning without its head cuts).
`dropped_layers`: whole layers removed, least block influence first (ShortGPT; Minitron §depth).
`dropped_attention`: attention removed, least replace-one damage first; every FFN stays.

All are coarse: a layer of five is a fifth of the model. Each returns the architecture nearest to
the budget, which may lie on either side of it; the comparison measures the speed it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tessera.model.config import ModelConfig
from tessera.puzzle.constraints import budgets
from tessera.puzzle.cost_table import CostTable
from tessera.puzzle.space import Space

Architecture = list[tuple[str, str]]


def uniform_width(
    constraints: Mapping[str, float | str], parent: ModelConfig, space: Space, costs: CostTable
) -> Architecture:
    """The single FFN width nearest to the constraints."""
    offered = [word for word in space.words(0, "ffn") if word.startswith("swiglu-")]
    candidates = ([(attention, word) for attention, _ in parent.words] for word in offered)
    return _nearest(candidates, constraints, parent, costs)


def dropped_layers(
    constraints: Mapping[str, float | str],
    parent: ModelConfig,
    influence: Sequence[float],
    costs: CostTable,
) -> Architecture:
    """The parent without its n least influential layers, n nearest to the constraints."""
    return _nearest(_dropped(parent, influence, ("noop", "noop")), constraints, parent, costs)


def dropped_attention(
    constraints: Mapping[str, float | str],
    parent: ModelConfig,
    damage: Sequence[float],
    costs: CostTable,
) -> Architecture:
    """The parent without the n attentions whose removal does least damage, n as above."""
    return _nearest(_dropped(parent, damage, ("noop", None)), constraints, parent, costs)


def _dropped(
    parent: ModelConfig, ranking: Sequence[float], left: tuple[str | None, str | None]
) -> Iterator[Architecture]:
    """The parent's words with `left` in its n lowest-ranking layers; None keeps what is there."""
    order = sorted(range(len(ranking)), key=ranking.__getitem__)
    for count in range(len(order)):
        gone = set(order[:count])
        yield [
            (left[0] or words[0], left[1] or words[1]) if layer in gone else words
            for layer, words in enumerate(parent.words)
        ]


def _nearest(
    candidates: Iterable[Architecture],
    constraints: Mapping[str, float | str],
    parent: ModelConfig,
    costs: CostTable,
) -> Architecture:
    """The candidate whose tightest constraint is nearest to its budget, on either side."""
    limits = budgets(constraints, costs, parent.words)

    def distance(words: Architecture) -> float:
        total = costs.total(words)
        shares = [total[c] / (limit + costs.base[c]) for c, limit in limits.items()]
        return abs(math.log(max(shares)))

    return min(candidates, key=distance)
