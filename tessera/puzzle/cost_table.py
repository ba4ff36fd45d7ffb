"""Cost tables read back: what each word costs in each scenario, and sums over architectures.

A table is of one scenario at one batch; `Costs` holds all that a cost stage priced, where every
scenario was priced at its own batch or at each of a list of batches to choose from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from tessera.model.config import KINDS
from tessera.runs.run import read_json, read_table

Words = Sequence[Sequence[str]]
DEFAULT = "default"  # the scenario of a recipe that names none


class Scenario(BaseModel):
    """The work a cost is quoted for: `batch` requests of `prompt` tokens, `new` tokens each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: int = Field(default=8, ge=1)
    prompt: int = Field(default=64, ge=1)
    new: int = Field(default=128, ge=2)

    @property
    def cached_tokens(self) -> int:
        return self.batch * (self.prompt + self.new)


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


@dataclass(frozen=True)
class Costs:
    """Every table of a cost stage, by (scenario, batch), and where its seconds come from.

    `tables/scenarios.json` holds {scenarios: {name: {batch, prompt, new}}, batches, source,
    device, bytes_per_parameter, bytes_per_kv}; rows of `tables/costs.jsonl` say which scenario and
    batch they belong to.
    """

    tables: Mapping[tuple[str, int], CostTable]
    scenarios: Mapping[str, Scenario]
    batches: tuple[int, ...]  # to choose from; empty: every scenario at its own
    source: str
    device: str | None
    bytes_per_parameter: float
    bytes_per_kv: float

    def at(self, batch: int | None) -> dict[str, CostTable]:
        """Scenario -> its table at this batch, or at the scenario's own."""
        return {
            name: self.tables[name, batch or scenario.batch]
            for name, scenario in self.scenarios.items()
        }


def read_costs(directory: Path) -> Costs:
    """The tables that a finished cost stage left."""
    told = read_json(directory, "scenarios")
    scenarios = {name: Scenario(**one) for name, one in told["scenarios"].items()}
    rows: dict[tuple[str, int], list[dict]] = {}
    for row in read_table(directory, "costs"):
        key = (row.pop("scenario"), row.pop("batch"))
        rows.setdefault(key, []).append(row)
    tables = {
        (name, batch): CostTable.from_rows(
            found, scenarios[name].model_copy(update={"batch": batch})
        )
        for (name, batch), found in rows.items()
    }
    return Costs(
        tables,
        scenarios,
        tuple(told["batches"]),
        told["source"],
        told["device"],
        told["bytes_per_parameter"],
        told["bytes_per_kv"],
    )


def unavailable(directory: Path) -> set[tuple[str, str]]:
    """The (kind, word) that a finished cost stage gave no price, as its engine cannot load them."""
    told = read_json(directory, "scenarios").get("unavailable", [])
    return {(one["kind"], one["word"]) for one in told}
