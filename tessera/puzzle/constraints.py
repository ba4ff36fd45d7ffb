"""Budgets in the user's words made linear.

    throughput = "1.25x"     at least 1.25 times the parent's tokens a second
    bytes = "0.7x"           weights and KV cache at most 0.7 of the parent's
    latency = 0.8            seconds for the whole scenario, absolute

`throughput` >= T becomes seconds <= batch·new / T; every other column is a sum over words plus
the base (embedding, head, sampling).
"""

from __future__ import annotations

from collections.abc import Mapping

from tessera.puzzle.cost_table import CostTable, Words
from tessera.recipe import nearest

COUNTED = ("parameters", "bytes", "kv_bytes_per_token")
MEASURED = ("prefill_seconds", "decode_seconds", "seconds")
NAMES = (*COUNTED, "prefill_seconds", "decode_seconds", "latency", "throughput")


class ConstraintError(ValueError):
    """A budget that cannot be understood; the text says which are."""


def column_of(name: str) -> str:
    """The linear column that a constraint's name bounds."""
    return "seconds" if name in ("throughput", "latency") else name


def check(constraints: Mapping[str, float | str]) -> None:
    """Raise ConstraintError for names and values that no cost table could make sense of."""
    if not constraints:
        raise ConstraintError(
            f"empty, so the parent itself is the answer; give at least one of {', '.join(NAMES)}, "
            'for example constraints = { throughput = "1.5x" }'
        )
    for name, value in constraints.items():
        if name not in NAMES:
            raise ConstraintError(f"{name!r} is no cost; {nearest(name, NAMES)}")
        _absolute(name, value, 1.0)


def budgets(
    constraints: Mapping[str, float | str], costs: CostTable, parent: Words
) -> dict[str, float]:
    """Linear column -> most its words may sum to, the base already taken off.

    Raises ConstraintError for what `check` refuses, and for seconds that were not measured.
    """
    check(constraints)
    own = costs.total(parent)
    found = {}
    for name, value in constraints.items():
        if name not in COUNTED and not costs.measured:
            raise ConstraintError(
                f"the constraint {name} needs measured seconds, and the cost stage ran with "
                "measure = false; set cost.measure = true, or constrain parameters or bytes"
            )
        bound = _absolute(name, value, own[name])
        if name == "throughput":
            bound = costs.scenario.batch * costs.scenario.new / bound
        column = column_of(name)
        found[column] = min(bound - costs.base[column], found.get(column, float("inf")))
    return found


def _absolute(name: str, value: float | str, parent: float) -> float:
    text = str(value).strip()
    try:
        number = float(text.removesuffix("x"))
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise ConstraintError(
            f'{name} = {value!r}: give a positive number, or a share of the parent such as "0.8x"'
        )
    return number * parent if text.endswith("x") else number
