"""What a little more of each budget would buy: shadow prices, by solving again.

Every budget is loosened and tightened by one percent and the search solved anew, over every batch:
words are whole, so the honest price is a difference of two optima, and zero is an answer. The dual
of the linear relaxation stands beside it as the price on average, with no steps in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tessera.puzzle.candidates import KEEP, Candidates
from tessera.puzzle.cases import Case
from tessera.puzzle.constraints import Limit
from tessera.puzzle.program import Infeasible, TimedOut, duals
from tessera.puzzle.sweep import Effort, Found, best_of

STEP = 0.01  # of a bound
_PROVED = 1e-6


def shadow_prices(
    candidates: Candidates, cases: Sequence[Case], found: Found, effort: Effort
) -> list[dict[str, Any]]:
    """One row a budget of the recipe: what was asked and used, and what a step either way does.

    `gain` is what a looser budget lowers the score by and `loss` what a tighter one raises it by;
    None where the optimum was not proved, and for the loss where nothing meets the tighter one.
    `step` and `price` (score a unit, of the relaxation) are in the unit of the budget.
    """
    dual = duals(candidates.options(found.case), found.case.room() | KEEP, candidates.forbidden(()))
    budgets = dict.fromkeys(one.budget for one in found.case.limits)
    return [_row(candidates, cases, found, effort, budget, dual) for budget in budgets]


def _row(
    candidates: Candidates,
    cases: Sequence[Case],
    found: Found,
    effort: Effort,
    budget: str,
    dual: dict[str, float],
) -> dict[str, Any]:
    assert found.solution is not None
    totals = found.case.totals(found.words)
    bounds = [one for one in found.case.limits if one.budget == budget]
    tight = max(bounds, key=lambda one: one.total(totals) / one.most)
    score = found.solution.score if found.solution.gap < _PROVED else None
    looser, _ = _score(candidates, cases, effort, budget, 1 + STEP)
    tighter, possible = _score(candidates, cases, effort, budget, 1 - STEP)
    row = {
        "budget": budget,
        "asked": tight.asked,
        "unit": tight.amount.unit,
        "used": tight.number(tight.total(totals)),
        "step": abs(tight.number(tight.most * (1 + STEP)) - tight.number(tight.most)),
        "gain": None if score is None or looser is None else max(0.0, score - looser),
        "loss": None if score is None or tighter is None else max(0.0, tighter - score),
        "tighter_possible": possible,
        "price": sum(dual[one.key] * _slope(one) for one in bounds),
    }
    binds = not possible or any((row[side] or 0.0) > _PROVED for side in ("gain", "loss"))
    row["binds"] = binds
    return row | {"told": _told(row, tight)}


def _score(
    candidates: Candidates, cases: Sequence[Case], effort: Effort, budget: str, factor: float
) -> tuple[float | None, bool]:
    """(the optimum under a budget scaled by a factor, if proved; whether there is any)."""
    scaled = [case.scaled(budget, factor) for case in cases]
    try:
        solution = best_of(candidates, scaled, effort, set()).solution
    except Infeasible:
        return None, False
    except TimedOut:
        return None, True
    assert solution is not None
    return (solution.score if solution.gap < _PROVED else None), True


def _slope(one: Limit) -> float:
    """By how much the bound moves with one unit of what the user wrote."""
    number = one.number(one.most)
    return one.unit / number**2 if one.inverse else one.unit


def _told(row: dict[str, Any], one: Limit) -> str:
    """`latency = "30 ms": 0.3 ms more would lower the score by 0.012; …`."""
    more, less = ("less", "more") if one.inverse else ("more", "less")
    step = one.amount.told(float(f"{row['step']:.3g}")).strip('"')
    asked = f'"{one.asked}"' if isinstance(one.asked, str) else f"{one.asked:,.6g}"
    used = one.amount.told(float(f"{row['used']:.4g}")).strip('"')
    head = f"{row['budget']} = {asked} ({used} used)"
    if not row["binds"]:
        return f"{head}: does not bind; {step} {more} buys nothing, {step} {less} costs nothing"
    return f"{head}: {step} {more} {_gain(row)}; {step} {less} {_loss(row)}"


def _gain(row: dict[str, Any]) -> str:
    if row["gain"] is None:
        return f"was not solved in time (the relaxation's price: {row['price']:.3g} a unit)"
    if row["gain"] > _PROVED:
        return f"would lower the score by {row['gain']:.3g}"
    return f"buys nothing yet (words are whole; {row['price']:.3g} a unit on average)"


def _loss(row: dict[str, Any]) -> str:
    if not row["tighter_possible"]:
        return "cannot be met"
    if row["loss"] is None:
        return "was not solved in time"
    return f"would cost {row['loss']:.3g}" if row["loss"] > _PROVED else "would cost nothing"
