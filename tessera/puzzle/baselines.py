"""The two simple methods a search has to beat, at the same budget.

`uniform_width`: every FFN cut to one width (Minitron's width pruning without its head cuts).
`dropped_layers`: whole layers removed, least block influence first (ShortGPT; Minitron §depth).

Each takes the least it must to meet the constraints; where it cannot meet them at all, it
returns its cheapest architecture, and the comparison's measured speed says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tessera.model.config import ModelConfig
from tessera.puzzle.constraints import CostTable, budgets
from tessera.puzzle.space import Space

Architecture = list[tuple[str, ...]]


def uniform_width(
    constraints: Mapping[str, float | str], parent: ModelConfig, space: Space, costs: CostTable
) -> Architecture:
    """The widest single FFN width that meets the constraints."""
    offered = [w for w in space.words(0, "ffn") if w.startswith("swiglu-")]
    offered.sort(key=lambda word: -int(word.removeprefix("swiglu-")))
    candidates = ([(attention, word) for attention, _ in parent.words] for word in offered)
    return _first_within(candidates, constraints, parent, costs)


def dropped_layers(
    constraints: Mapping[str, float | str],
    parent: ModelConfig,
    influence: Sequence[float],
    costs: CostTable,
) -> Architecture:
    """The parent without its n least influential layers, n as small as the constraints allow."""
    order = sorted(range(len(influence)), key=influence.__getitem__)

    def candidates() -> Iterator[Architecture]:
        for count in range(len(order)):
            gone = set(order[:count])
            yield [
                ("noop", "noop") if layer in gone else words
                for layer, words in enumerate(parent.words)
            ]

    return _first_within(candidates(), constraints, parent, costs)


def _first_within(
    candidates: Iterator[Architecture],
    constraints: Mapping[str, float | str],
    parent: ModelConfig,
    costs: CostTable,
) -> Architecture:
    limits = budgets(constraints, costs, parent.words)
    words: Architecture = []
    for words in candidates:
        total = costs.total(words)
        if all(total[c] - costs.base[c] <= limit * (1 + 1e-9) for c, limit in limits.items()):
            break
    return words
