"""What a little more of each budget would buy: shadow prices, by solving again.

Every budget is loosened and tightened by one percent, and by ten where one changes nothing, and the
search solved anew over every batch: words are whole, so the honest price is a difference of two
optima, and zero is an answer. The dual of the linear relaxation stands beside it as the price on
average, with no steps in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tessera.puzzle.candidates import Candidates
from tessera.puzzle.constraints import Case, Limit
from tessera.puzzle.program import Infeasible, TimedOut, divisible
from tessera.puzzle.sweep import Effort, Found, best_of

STEPS = (0.01, 0.1)  # of a bound
_PROVED = 1e-6


def shadow_prices(
    candidates: Candidates, cases: Sequence[Case], found: Found, effort: Effort
) -> list[dict[str, Any]]:
    """One row a budget of the recipe: what was asked and used, and what a step either way does.

    `gain` is what a budget looser by `looser_by` lowers the score by, `loss` what one tighter by
    `tighter_by` raises it by; None where an optimum was not proved, and for the loss where nothing
    meets the tighter budget. Steps and `price` (score a unit, of the relaxation) are in the unit
    of the budget.
    """
    options = candidates.options(found.case)
    _, dual = divisible(options, found.case.room() | candidates.limits, candidates.forbidden(()))
    budgets = dict.fromkeys(one.budget for one in found.case.limits)
    solver = _Again(candidates, cases, found, effort)
    return [_row(solver, budget, dual) for budget in budgets]


@dataclass(frozen=True)
class _Again:
    """The search, to be solved again under another budget."""

    candidates: Candidates
    cases: Sequence[Case]
    found: Found
    effort: Effort

    def change(self, budget: str, sign: int) -> tuple[float, float | None, bool]:
        """(relative step, how the score changes, whether anything meets it): the first step that
        matters, else the last."""
        change: float | None = None
        for step in STEPS:
            scaled = [case.scaled(budget, 1 + sign * step) for case in self.cases]
            change, possible = self._score(scaled)
            if change is None or abs(change) > _PROVED:
                return step, change, possible
        return STEPS[-1], change, True

    def _score(self, scaled: Sequence[Case]) -> tuple[float | None, bool]:
        """(change of the optimum, if both are proved; whether there is any)."""
        own = self.found.solution
        assert own is not None
        try:
            solution = best_of(self.candidates, scaled, self.effort, set()).solution
        except Infeasible:
            return None, False
        except TimedOut:
            return None, True
        assert solution is not None
        proved = max(own.gap, solution.gap) < _PROVED
        return (solution.score - own.score if proved else None), True


def _row(solver: _Again, budget: str, dual: Mapping[str, float]) -> dict[str, Any]:
    found = solver.found
    totals = found.case.totals(found.words)
    bounds = [one for one in found.case.limits if one.budget == budget]
    tight = max(bounds, key=lambda one: one.total(totals) / one.most)
    up, gain, _ = solver.change(budget, 1)
    down, loss, possible = solver.change(budget, -1)
    row = {
        "budget": budget,
        "asked": tight.asked,
        "unit": tight.amount.unit,
        "used": tight.number(tight.total(totals)),
        "looser_by": _step(tight, 1 + up),
        "gain": None if gain is None else max(0.0, -gain),
        "tighter_by": _step(tight, 1 - down),
        "loss": None if loss is None else max(0.0, loss),
        "tighter_possible": possible,
        "price": sum(dual[one.key] * _slope(one) for one in bounds),
    }
    matters = any(row[side] is None or row[side] > _PROVED for side in ("gain", "loss"))
    row["binds"] = matters
    return row | {"told": _told(row, tight)}


def _step(one: Limit, factor: float) -> float:
    """A relative step of the bound, in the unit of what the user wrote."""
    return abs(one.number(one.most * factor) - one.number(one.most))


def _slope(one: Limit) -> float:
    """By how much the bound moves with one unit of what the user wrote."""
    number = one.number(one.most)
    return one.unit / number**2 if one.inverse else one.unit


def _told(row: Mapping[str, Any], one: Limit) -> str:
    """`latency = "30 ms" (29.1 ms used): 0.3 ms more would lower the score by 0.012; …`."""
    more, less = ("less", "more") if one.inverse else ("more", "less")
    used = "reached" if one.inverse else "used"
    asked = f'"{one.asked}"' if isinstance(one.asked, str) else f"{one.asked:,.6g}"
    head = f"{row['budget']} = {asked} ({_plain(one, row['used'])} {used})"
    up, down = (_plain(one, row[side]) for side in ("looser_by", "tighter_by"))
    if not row["binds"]:
        return f"{head}: does not bind; {up} {more} buys nothing, {down} {less} costs nothing"
    return f"{head}: {up} {more} {_gain(row)}, {down} {less} {_loss(row)}"


def _plain(one: Limit, number: float) -> str:
    """`0.3 ms`: three digits and the unit, no quotes."""
    return one.amount.told(float(f"{number:.3g}")).strip('"')


def _gain(row: Mapping[str, Any]) -> str:
    price = f"{row['price']:.2g} per {row['unit'] or 'unit'}"
    if row["gain"] is None:
        return f"was not solved in time (by the relaxation, {price})"
    if row["gain"] > _PROVED:
        return f"would lower the score by {row['gain']:.3g}"
    return f"buys nothing (words are whole; on average {price})"


def _loss(row: Mapping[str, Any]) -> str:
    if not row["tighter_possible"]:
        return "cannot be met"
    if row["loss"] is None:
        return "was not solved in time"
    return f"would cost {row['loss']:.3g}" if row["loss"] > _PROVED else "costs nothing"
