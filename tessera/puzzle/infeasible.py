"""Why no architecture meets the constraints, the nearest that could be met, the cheapest way out.

For each limit the least cost that any architecture has is found twice by the integer program
itself: alone, and under the other limits. The first that lies above what was asked is told in the
user's own words and units, rounded to the side that can be met. The cheapest way out loosens the
limits together, so that the sum of their relative changes is least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from tessera.puzzle.cases import Case
from tessera.puzzle.constraints import Limit

Least = Callable[[str, Mapping[str, float]], float | None]
_SMALL = 1e-9  # a relative change below this is the solver's rounding


def explain(case: Case, slack: Mapping[str, float], least: Least, where: str = "") -> str:
    """What was asked, one line a limit that binds, and the cheapest set of changes that helps.

    slack: limit's key -> how far it gives way in that set. least(key, others): the smallest sum
    of a limit's cost over the words of any architecture within the others; None if there is none.
    """
    room = case.room()
    lines = []
    for one in case.limits:
        others = {key: most for key, most in room.items() if key != one.key}
        for given, when in (({}, "in this space"), (others, "with the others as asked")):
            low = least(one.key, given)
            if low is not None and low - room[one.key] > _SMALL * one.most:
                reached = _reached(one, low + one.base(case.tables))
                lines.append(f"  {one.key} = {_asked(one)}: {reached} {when}")
                break
    told = "\n".join(lines) or "  each can be met alone, but not all of them together"
    return (
        f"no architecture meets the constraints{where}:\n{told}\n"
        f"{_way_out(case, slack)}\n"
        "Or offer cheaper words in the space of the [bld] table. One attention and one FFN always "
        "stay"
    )


def _way_out(case: Case, slack: Mapping[str, float]) -> str:
    """`The cheapest way out: latency = "34 ms" (13 % more), the others as asked`."""
    changes = []
    for one in case.limits:
        share = slack[one.key] / one.most
        if share > _SMALL:
            changes.append(f"{nearest(one, one.most + slack[one.key])} ({_change(one, share)})")
    rest = ", the others as asked" if len(changes) < len(case.limits) else ""
    return f"The cheapest way out: {', '.join(changes)}{rest}"


def _change(one: Limit, share: float) -> str:
    """`13 % more`; of a rate, by how much it falls."""
    percent = 100 * (share / (1 + share) if one.inverse else share)
    told = f"{percent:,.0f}" if percent >= 10 else f"{percent:.2g}"
    return f"{told} % {'less' if one.inverse else 'more'}"


def nearest(one: Limit, total: float) -> str:
    """The budget that just allows a total, as a recipe has it: `latency = "34 ms"`."""
    number = rounded(one.number(total), up=not one.inverse)
    if one.name == "fits":
        return f"{one.key} in {one.amount.told(number)}"
    return f"{one.key} = {one.amount.told(number)}"


def _reached(one: Limit, total: float) -> str:
    """`at most "1.32x" can be reached`, `at least 12,400 is needed`."""
    told = one.amount.told(rounded(one.number(total), up=not one.inverse))
    if one.name == "fits":
        there = one.amount.told(float(f"{one.amount.number:.3g}"))
        return f"at least {told} is needed, of the {there} that there are"
    return f"at most {told} can be reached" if one.inverse else f"at least {told} is needed"


def rounded(value: float, up: bool) -> float:
    """Three significant digits, to the side that can be met."""
    if value <= 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    steps = math.ceil(value / step - _SMALL) if up else math.floor(value / step + _SMALL)
    return steps * step


def _asked(one: Limit) -> str:
    return f'"{one.asked}"' if isinstance(one.asked, str) else f"{one.asked:,.6g}"
