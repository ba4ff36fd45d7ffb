"""Cost tables read back, and budgets in the user's words made linear.

    throughput = "1.25x"     at least 1.25 times the parent's tokens a second
    bytes = "0.7x"           weights and KV cache at most 0.7 of the parent's
    latency = 0.8            seconds for the whole scenario, absolute

`throughput` >= T becomes seconds <= batch·new / T; every other column is a sum over words plus
the base (embedding, head, sampling).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from tessera.model.config import KINDS
from tessera.recipe import nearest

COUNTED = ("parameters", "bytes", "kv_bytes_per_token")
MEASURED = ("prefill_seconds", "decode_seconds", "seconds")
NAMES = (*COUNTED, "prefill_seconds", "decode_seconds", "latency", "throughput")

Words = Sequence[Sequence[str]]


class Scenario(BaseModel):
    """The work a cost is quoted for: `batch` requests of `prompt` tokens, `new` tokens each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: int = Field(default=8, ge=1)
    prompt: int = Field(default=64, ge=1)
    new: int = Field(default=128, ge=2)

    @property
    def cached_tokens(self) -> int:
        return self.batch * (self.prompt + self.new)


class ConstraintError(ValueError):
    """A budget that cannot be understood; the text says which are."""


@dataclass(frozen=True)
class CostTable:
    """Columns of each word and of the base, for one scenario.

    `seconds` is the whole scenario for the batch: prefill, then `new - 1` decode steps (the
    prefill yields the first token).
    """

    base: Mapping[str, float]
    words: Mapping[tuple[str, str], Mapping[str, float]]
    scenario: Scenario

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, object]], scenario: Scenario) -> CostTable:
        table: dict[tuple[str, str], dict[str, float]] = {}
        for row in rows:
            columns = {k: float(v) for k, v in row.items() if k not in ("kind", "word")}  # type: ignore[arg-type]
            if "decode_seconds" in columns:
                decode = (scenario.new - 1) * columns["decode_seconds"]
                columns["seconds"] = columns["prefill_seconds"] + decode
            table[str(row["kind"]), str(row["word"])] = columns
        return cls(table.pop(("base", "")), table, scenario)

    @property
    def measured(self) -> bool:
        return "seconds" in self.base

    def total(self, words: Words) -> dict[str, float]:
        """Every column summed over an architecture, base included; and `throughput`, tokens/s."""
        total = dict(self.base)
        for pair in words:
            for kind, word in zip(KINDS, pair, strict=True):
                for column, value in self.words[kind, word].items():
                    total[column] += value
        if self.measured:
            total["latency"] = total["seconds"]
            total["throughput"] = self.scenario.batch * self.scenario.new / total["seconds"]
        return total


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
