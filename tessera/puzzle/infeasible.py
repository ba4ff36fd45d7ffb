"""Why no architecture meets the constraints, and the nearest ones that could be met.

For each constraint c the least cost that any architecture has is found twice by the integer
program itself: alone, and under the other constraints. The first that lies above what was asked
is told in the user's own words and units, rounded to the side that can be met.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from tessera.puzzle.constraints import column_of
from tessera.puzzle.cost_table import CostTable, Words

Least = Callable[[str, Mapping[str, float]], float | None]


def explain(
    constraints: Mapping[str, float | str],
    limits: Mapping[str, float],
    costs: CostTable,
    parent: Words,
    least: Least,
) -> str:
    """One line a constraint that binds: what was asked, and the nearest that can be met.

    limits: `budgets` of the constraints. least(column, others): the smallest sum of a column
    over the words of any architecture that meets the other limits; None where none does.
    """
    lines = []
    for name, asked in constraints.items():
        column = column_of(name)
        others = {key: limit for key, limit in limits.items() if key != column}
        for given, when in (({}, "in this space"), (others, "with the others as asked")):
            low = least(column, given)
            if low is not None and low > limits[column]:
                reached = _reached(name, asked, low, costs, parent)
                lines.append(f"  {name} = {_quoted(asked)}: {reached} {when}")
                break
    what = "\n".join(lines) or "  no two words that the engines can load fit together"
    return (
        f"no architecture meets the constraints:\n{what}\n"
        "Relax one, or offer cheaper words in the space of the [bld] table. One attention and one "
        "FFN always stay"
    )


def _reached(name: str, asked: float | str, low: float, costs: CostTable, parent: Words) -> str:
    """`at most "1.32x" can be reached`, `at least 12,400 is needed`."""
    own, value = costs.total(parent)[name], low + costs.base[column_of(name)]
    most = name == "throughput"
    if most:
        value = costs.scenario.batch * costs.scenario.new / value
    relative = str(asked).strip().endswith("x")
    value = _rounded(value / own if relative else value, up=not most)
    shown = f'"{value:.6g}x"' if relative else f"{value:,.6g}"
    return f"at most {shown} can be reached" if most else f"at least {shown} is needed"


def _rounded(value: float, up: bool) -> float:
    """Three significant digits, to the side that can be met."""
    if value <= 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return (math.ceil if up else math.floor)(value / step) * step


def _quoted(value: float | str) -> str:
    return f'"{value}"' if isinstance(value, str) else f"{value:,.6g}"
