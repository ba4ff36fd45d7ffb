"""Cost tables: what each word costs in a scenario at one batch, and sums over architectures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt

from tessera.model.config import KINDS
from tessera.runs.recipe import Config
from tessera.runs.run import read_json, read_table

Words = Sequence[Sequence[str]]
DEFAULT = "default"  # the scenario of a recipe that names none


class Scenario(Config):
    """The work a cost is quoted for: `batch` requests of `prompt` tokens, `new` tokens each."""

    batch: int = Field(default=8, ge=1)
    prompt: int = Field(default=64, ge=1)
    new: int = Field(default=128, ge=2)

    @property
    def cached_tokens(self) -> int:
        return self.batch * (self.prompt + self.new)


class PricedConfig(Config):
    scenario: Scenario = Scenario()
    scenarios: dict[str, Scenario] = {}  # by name; when given, they replace `scenario`
    batches: list[PositiveInt] = []  # price every scenario at each; empty: at its own

    @property
    def named(self) -> dict[str, Scenario]:
        return dict(self.scenarios) or {DEFAULT: self.scenario}

    def priced(self) -> list[tuple[str, Scenario]]:
        """(name, scenario) of every table to write: each scenario at each batch."""
        return [
            (name, scenario.model_copy(update={"batch": batch}))
            for name, scenario in self.named.items()
            for batch in dict.fromkeys(self.batches or [scenario.batch])
        ]

    def described(
        self, source: str, device: str | None, bytes_per_parameter: float, bytes_per_kv: float
    ) -> dict[str, Any]:
        """What `scenarios.json` says of the tables at least."""
        return {
            "scenarios": {name: one.model_dump() for name, one in self.named.items()},
            "batches": list(dict.fromkeys(self.batches)),
            "source": source,
            "device": device,
            "bytes_per_parameter": bytes_per_parameter,
            "bytes_per_kv": bytes_per_kv,
        }


@dataclass(frozen=True)
class CostTable:
    """Columns of each word and of the base, for one scenario; `seconds` is prefill, which yields
    the first token, and `new - 1` decode steps."""

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
    """The tables of a cost stage by (scenario, batch), and what `scenarios.json` says of them."""

    tables: Mapping[tuple[str, int], CostTable]
    scenarios: Mapping[str, Scenario]
    batches: tuple[int, ...]  # to choose from; empty: every scenario at its own
    source: str
    device: str | None
    bytes_per_parameter: float
    bytes_per_kv: float

    @property
    def first(self) -> CostTable:
        return next(iter(self.tables.values()))


def read_costs(directory: Path) -> Costs:
    found = read_json(directory, "scenarios")
    scenarios = {name: Scenario(**one) for name, one in found["scenarios"].items()}
    rows: dict[tuple[str, int], list[dict]] = {}
    for row in read_table(directory, "costs"):
        rows.setdefault((row.pop("scenario"), row.pop("batch")), []).append(row)
    tables = {
        (name, batch): CostTable.from_rows(own, scenarios[name].model_copy(update={"batch": batch}))
        for (name, batch), own in rows.items()
    }
    columns = ("source", "device", "bytes_per_parameter", "bytes_per_kv")
    return Costs(tables, scenarios, tuple(found["batches"]), *(found[key] for key in columns))


def unavailable(directory: Path) -> set[tuple[str, str]]:
    """The (kind, word) that a finished cost stage gave no price, as its engine cannot load them."""
    rows = read_json(directory, "scenarios").get("unavailable", [])
    return {(row["kind"], row["word"]) for row in rows}


def share_of(row: Mapping, column: str) -> float | None:
    own, parent = row["predicted"].get(column), row["parent"].get(column)
    return own / parent if own and parent else None
