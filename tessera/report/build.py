"""A report from runs: the sections that have something to show, in the order of the path.

A section is a function of the runs that yields blocks; to add one, write it and name it here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from tessera.report import puzzle, reasoning, summary, training
from tessera.report.blocks import Block, Figure, Section, Table, Text
from tessera.report.runs import Runs, read_runs

SECTIONS: tuple[tuple[str, Callable[[Runs], Iterable[Block]]], ...] = (
    ("In short", summary.summary),
    ("The child", puzzle.architecture),
    ("Frontier", puzzle.frontier),
    ("Speed", puzzle.speed),
    ("Accuracy, thinking on and off", reasoning.accuracy),
    ("Training", training.curves),
    ("Reinforcement learning", reasoning.reinforcement),
    ("Samples", reasoning.samples),
    ("Cost", training.cost),
    ("Lineage", training.lineage),
)


def sections(path: Path) -> tuple[Runs, list[Section]]:
    """The runs of a path and what there is to say of them. Raises RunError for no runs."""
    runs = read_runs(path)
    found = [Section(title, list(make(runs))) for title, make in SECTIONS]
    return runs, [one for one in found if any(not isinstance(b, Text) for b in one.blocks)]


def plain(found: Iterable[Section]) -> list[dict[str, Any]]:
    """Sections as JSON values: texts, tables and samples; a drawing's numbers are in its table."""
    return [
        {"title": one.title, "blocks": [_plain(b) for b in one.blocks if not isinstance(b, Figure)]}
        for one in found
    ]


def _plain(block: Block) -> dict[str, Any]:
    if isinstance(block, Table):
        return {"table": block.name, "rows": list(block.rows)}
    assert is_dataclass(block)
    return asdict(block)
