"""The two simple methods a search has to beat, at the same budget.

`uniform_width`: every FFN cut to one width (Minitron's width pruning without its head cuts).
`dropped_layers`: whole layers removed, least block influence first (ShortGPT; Minitron §depth).

Both are coarse: a layer of five is a fifth of the model. Each returns the architecture nearest to
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
    order = sorted(range(len(influence)), key=influence.__getitem__)

    def candidates() -> Iterator[Architecture]:
        for count in range(len(order)):
            gone = set(order[:count])
            yield [
                ("noop", "noop") if layer in gone else words
                for layer, words in enumerate(parent.words)
            ]

    return _nearest(candidates(), constraints, parent, costs)


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
