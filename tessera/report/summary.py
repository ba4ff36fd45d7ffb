"""The first section: what came of it, a line a finding, before anything is explained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tessera.progress import clock
from tessera.report.blocks import Block, Table
from tessera.report.runs import Row, Runs
from tessera.table import Column, cell

VIEW = (
    Column("finding", ("finding",), cell),
    Column("value", ("value",), cell),
    Column("of", ("of",), cell),
)


def summary(runs: Runs) -> Iterator[Block]:
    """Speed and closeness of what was compared, the last evaluations, exports, and the cost."""
    rows = [*_speeds(runs), *_answers(runs), *_exports(runs)]
    if rows:
        spent = sum(run.manifest.seconds for run in runs.all)
        cpu = sum(run.manifest.cpu_seconds for run in runs.all)
        told = clock(spent) + (f", {clock(cpu)} of CPU" if cpu else "")
        rows.append({"finding": "time", "value": told, "of": f"{len(runs.all)} runs"})
        yield Table("summary", rows, VIEW)


def _speeds(runs: Runs) -> Iterator[Row]:
    """Each compared model against the first, as it was measured and as it was promised."""
    for run in runs.having("compare"):
        first, *others = run.tables["compare"]
        for row in others:
            value = f"{row['speedup']:.2f}x"
            if row.get("promised"):
                value += f" (promised {row['promised']:.2f}x)"
            value += f", {row['agreement']:.1%} of its next tokens"
            yield {"finding": f"speed against {first['model']}", "value": value, "of": row["model"]}


def _answers(runs: Runs) -> Iterator[Row]:
    """What the last model to be asked with the switch said, with the error of each share."""
    asked = [run for run in runs.having("eval") if _modes(run.tables["eval"]) & {"on", "off"}]
    for run in asked[-1:]:
        for row in run.tables["eval"]:
            if row.get("value") is None:
                continue
            error = f" ± {row['stderr']:.3f}" if row.get("stderr") is not None else ""
            value = f"{row['value']:.3f}{error}"
            if row.get("tokens") is not None:
                value += f", {row['tokens']:.1f} tokens"
            if row.get("obedience") is not None:
                value += f", the switch obeyed by {row['obedience']:.1%}"
            finding = f"{row['task']}, thinking {row['mode']}"
            yield {"finding": finding, "value": value, "of": run.name}


def _modes(rows: list[Row]) -> set[Any]:
    return {row.get("mode") for row in rows}


def _exports(runs: Runs) -> Iterator[Row]:
    """Whether the files of an export compute what the model does."""
    for run in runs.all:
        told = run.json("export") if run.manifest.stage == "export" else None
        if told:
            parity = told.get("parity") or {}
            checked = f"{parity.get('tokens_equal')} of {parity.get('tokens')} greedy tokens equal"
            value = f"{told['format']}, {checked if parity else 'not checked'}"
            yield {"finding": "export", "value": value, "of": run.name}
