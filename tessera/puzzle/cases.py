"""The ways of serving that a search may choose from: each scenario at one batch (Puzzle §2.6).

The batch is no variable of the integer program, because seconds and memory at another batch are
other numbers: each choice of batches is a case of its own, solved by itself, and the best is kept.

The parent is held to the same rule as the child: shares of it are taken at its own best batch,
the one with the most tokens a second among those where it meets the memory that was asked for in
units. A child with a smaller KV cache then gains twice, by its words and by a larger batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tessera.puzzle.budget_words import ConstraintError, read_amount, read_fits
from tessera.puzzle.constraints import Asked, Limit, Setting, limits
from tessera.puzzle.cost_table import Costs, CostTable, Words
from tessera.runs.recipe import nearest


@dataclass(frozen=True)
class Demand:
    """What serving may cost: budgets for every scenario, budgets of one, and their weights."""

    constraints: Mapping[str, Asked]
    own: Mapping[str, Mapping[str, Asked]]
    weights: Mapping[str, float]

    def at(self, scenario: str) -> dict[str, Asked]:
        """The budgets that hold in a scenario, by name."""
        return {**self.constraints, **self.own.get(scenario, {})}

    def check(self, costs: Costs) -> None:
        """Raise ConstraintError for a scenario that was not priced."""
        for name in {**self.own, **self.weights}:
            if name not in costs.scenarios:
                raise ConstraintError(
                    f"search.scenarios.{name}: the cost stage priced no such scenario; "
                    f"{nearest(name, costs.scenarios)}"
                )


@dataclass(frozen=True)
class Case:
    """Each scenario at one batch, and the bounds that hold there.

    reference: the parent's own tables, as in `constraints.Setting`.
    """

    tables: Mapping[str, CostTable]
    reference: Mapping[str, CostTable | None]
    weights: Mapping[str, float]
    limits: tuple[Limit, ...]

    def room(self) -> dict[str, float]:
        """Limit's key -> the most that the words may sum to."""
        return {one.key: one.most - one.base(self.tables) for one in self.limits}

    def costs(self, words: Mapping[str, str]) -> dict[str, float]:
        """Limit's key -> what the words of a place (kind -> word) cost."""
        return {
            one.key: sum(one.of(self.tables, *key) for key in words.items()) for one in self.limits
        }

    def totals(self, words: Words) -> dict[str, dict[str, float]]:
        """Scenario -> every column of an architecture."""
        return {name: table.total(words) for name, table in self.tables.items()}

    def excess(self, words: Words) -> float:
        """The largest total of an architecture as a share of its bound; at most 1 meets all."""
        totals = self.totals(words)
        return max(one.total(totals) / one.most for one in self.limits)

    def seconds_per_token(self, words: Words) -> float:
        """Weighted over scenarios; 0 where nothing was measured."""
        found = 0.0
        for name, total in self.totals(words).items():
            if "seconds" in total:
                found += self.weights[name] / total["throughput"]
        return found

    def scaled(self, budget: str, factor: float) -> Case:
        """With one budget of the recipe looser (factor above 1) or tighter."""
        changed = (o.scaled(factor) if o.budget == budget else o for o in self.limits)
        return replace(self, limits=tuple(changed))

    def towards(self, parent: Words, share: float) -> Case:
        """With bounds only `share` of the way from the parent's own cost here to what was asked."""
        totals = self.totals(parent)
        own = [one.total(totals) for one in self.limits]
        moved = (
            replace(one, most=spent + share * (one.most - spent))
            for one, spent in zip(self.limits, own, strict=True)
        )
        return replace(self, limits=tuple(moved))

    def __str__(self) -> str:
        """`batch 16`, or `batches chat 16, long 4`."""
        batches = {name: table.scenario.batch for name, table in self.tables.items()}
        if len(batches) == 1:
            return f"batch {next(iter(batches.values()))}"
        return "batches " + ", ".join(f"{name} {batch}" for name, batch in batches.items())


def cases(demand: Demand, costs: Costs, parent: Words) -> tuple[Case, ...]:
    """Every choice of batches, smallest first; one where the cost stage priced none.

    Scenarios are served apart, so each may have a batch of its own. Raises ConstraintError for
    budgets that this cost stage cannot answer.
    """
    demand.check(costs)
    weights = {name: demand.weights.get(name, 1.0) for name in costs.scenarios}
    reference = {name: _reference(name, demand, costs, parent) for name in costs.scenarios}
    batches = [
        [(name, batch) for batch in sorted(costs.batches) or [scenario.batch]]
        for name, scenario in costs.scenarios.items()
    ]
    found = []
    for choice in itertools.product(*batches):
        tables = {name: costs.tables[name, batch] for name, batch in choice}
        setting = Setting(tables, parent, reference, weights, costs.bytes_per_parameter)
        bounds = limits(demand.constraints, demand.own, setting)
        found.append(Case(tables, reference, weights, bounds))
    return tuple(found)


def _reference(name: str, demand: Demand, costs: Costs, parent: Words) -> CostTable | None:
    """The table at the parent's best batch in a scenario; None where it meets memory at none."""
    if not costs.batches:
        return costs.tables[name, costs.scenarios[name].batch]
    tables = [costs.tables[name, batch] for batch in costs.batches]
    fitting = [t for t in tables if _in_memory(t, demand.at(name), costs, parent)]

    def speed(table: CostTable) -> float:
        return table.total(parent).get("throughput", table.scenario.batch)

    return max(fitting, key=speed, default=None)


def _in_memory(table: CostTable, asked: Mapping[str, Asked], costs: Costs, parent: Words) -> bool:
    """Whether the parent meets the bytes that were asked for in units."""
    total = table.total(parent)
    if "fits" in asked:
        fits = read_fits(asked["fits"])
        cached = total["kv_bytes_per_token"] * fits.tokens(table.scenario)
        if total["parameters"] * costs.bytes_per_parameter + cached > fits.memory:
            return False
    if "bytes" in asked:
        amount = read_amount("bytes", asked["bytes"], "bytes")
        return amount.relative or total["bytes"] <= amount.value
    return True
