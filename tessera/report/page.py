"""A report as one HTML page that fetches nothing, as Markdown, or as JSON values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment

from tessera.report import sections as found
from tessera.report.sections import Block, Figure, Mosaic, Runs, Samples, Section, Table, Text
from tessera.table import cell, columns_of

SECTIONS: tuple[tuple[str, Callable[[Runs], Iterable[Block]]], ...] = (
    ("In short", found.summary),
    ("The child", found.architecture),
    ("Frontier", found.frontier),
    ("Speed", found.speed),
    ("Accuracy, thinking on and off", found.accuracy),
    ("Training", found.curves),
    ("Reinforcement learning", found.reinforcement),
    ("Samples", found.samples),
    ("Cost", found.cost),
    ("Lineage", found.lineage),
)


def sections(path: Path) -> tuple[Runs, list[Section]]:
    """The runs of a path, and the sections that have more than text to show.

    Raises RunError where there are no runs.
    """
    runs = found.read_runs(path)
    made = [Section(title, [*_whole(title, blocks, runs)]) for title, blocks in SECTIONS]
    return runs, [one for one in made if any(not isinstance(b, Text) for b in one.blocks)]


def _whole(title: str, blocks: Callable[[Runs], Iterable[Block]], runs: Runs) -> Iterator[Block]:
    """The blocks of a section, up to where a damaged run stops it."""
    try:
        yield from blocks(runs)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        runs.problems.append(f"{title}: a run of it is damaged ({error!r})")


class Cells(NamedTuple):
    """A table's headings, and (text, whether it is a number) of its cells, row by row."""

    headings: list[str]
    rows: list[list[tuple[str, bool]]]


def cells(table: Table) -> Cells:
    """Columns of the table's view come first, in its order, behind `run`; the others follow."""
    columns = columns_of(table.rows, table.view)
    columns.sort(key=lambda column: column.key != "run")
    rows = []
    for row in table.rows:
        values = [(column, row.get(column.key)) for column in columns]
        rows.append(
            [(cell(None) if v is None else c.text(v), type(v) in (int, float)) for c, v in values]
        )
    return Cells([" ".join(column.heading).replace("- ", "") for column in columns], rows)


def html(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page. All text is escaped; only SVG of `charts.py` passes as markup."""

    def grouped(blocks: Sequence[Block]) -> list[list[Block]]:
        drawn = groupby(blocks, lambda block: isinstance(block, Figure | Mosaic))
        return [list(group) for _, group in drawn]

    here = files("tessera.report")
    template = Environment(autoescape=True).from_string(
        (here / "page.html.jinja").read_text("utf-8"), {"cells": cells, "grouped": grouped}
    )
    style = (here / "page.css").read_text("utf-8")
    return template.render(title=title, subtitle=subtitle, sections=sections, style=style) + "\n"


def markdown(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The texts, tables and samples as a document; of a drawing its note."""
    parts = [f"# {_line(title)}", _line(subtitle)]
    for section in sections:
        parts.append(f"## {_line(section.title)}")
        parts += [text for block in section.blocks if (text := _markdown_block(block))]
    return "\n\n".join(parts) + "\n"


def _markdown_block(block: Block) -> str:
    match block:
        case Text(text):
            return _line(text)
        case Figure() | Mosaic():
            return f"**{_line(block.title)}.** {_line(block.note)}" if block.note else ""
        case Table():
            headings, rows = cells(block)
            lines = [
                headings,
                ["---"] * len(headings),
                *([text for text, _ in row] for row in rows),
            ]
            table = "\n".join(f"| {' | '.join(map(_line, line))} |" for line in lines)
            return f"**{_line(block.name)}**\n\n{table}"
        case Samples(items):
            parts = []
            for question, answers in items:
                parts.append(f"**{_line(question)}**")
                for label, text in answers:  # nothing in a text ends a block of four spaces
                    lines = "\n".join(f"    {line}" for line in text.splitlines())
                    parts.append(f"{_line(label)}\n\n{lines}")
            return "\n\n".join(parts)


def _line(text: str) -> str:
    """One line of text that is neither HTML nor the end of a cell."""
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def plain(sections: Iterable[Section]) -> list[dict[str, Any]]:
    """Sections as JSON values, without drawings: their numbers stand in tables."""
    return [
        {
            "title": one.title,
            "blocks": [
                {"table": b.name, "rows": list(b.rows)} if isinstance(b, Table) else asdict(b)
                for b in one.blocks
                if not isinstance(b, Figure | Mosaic)
            ],
        }
        for one in sections
    ]
