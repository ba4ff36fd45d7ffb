"""The runs that a report is about, and what they logged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tessera.model.lineage import ancestors
from tessera.report.show import tables
from tessera.runs.files import RunError
from tessera.runs.manifest import (
    Manifest,
    read_manifest,
    read_metrics,
    read_timings,
    runs_in,
    whole_lines,
)

Row = dict[str, Any]


@dataclass(frozen=True)
class RunData:
    """One run; what it lacks reads as empty."""

    path: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.manifest.name

    @cached_property
    def metrics(self) -> list[Row]:
        return read_metrics(self.path)

    @cached_property
    def timings(self) -> list[Row]:
        return read_timings(self.path)

    @cached_property
    def tables(self) -> dict[str, list[Row]]:
        return tables(self.path)

    @property
    def tokens(self) -> float:
        """Tokens that its steps went through."""
        rows = [r for r in self.timings if r.get("seconds") and r.get("tokens_per_second")]
        return sum(row["seconds"] * row["tokens_per_second"] for row in rows)

    def lines(self, name: str) -> list[Row]:
        """A file of JSON lines beside the tables; a torn last line is none."""
        file = self.path / name
        return whole_lines(file)[0] if file.is_file() else []

    def json(self, name: str) -> Any:
        file = self.path / "tables" / f"{name}.json"
        return json.loads(file.read_text()) if file.is_file() else None


@dataclass(frozen=True)
class Runs:
    """The runs of a recipe in the order they began, or those one run was made from."""

    path: Path
    all: tuple[RunData, ...]

    def having(self, table: str) -> list[RunData]:
        """The runs that hold a table of this name."""
        return [run for run in self.all if run.tables.get(table)]

    def find(self, name: str) -> RunData | None:
        return next((run for run in self.all if run.name == name), None)


def read_runs(path: Path) -> Runs:
    """Raises RunError where there is neither a run nor a directory of runs."""
    if (path / "run.json").is_file():
        found = [one for one in ancestors(path) if (one / "run.json").is_file()]
    else:
        found = runs_in(path)
    if not found:
        raise RunError(f"{path} holds no runs; give a recipe's runs (runs/NAME) or one of them")
    runs = [RunData(one, read_manifest(one)) for one in found]
    return Runs(path, tuple(sorted(runs, key=lambda run: run.manifest.started)))
