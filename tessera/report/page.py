"""Sections as one HTML page that needs nothing else: no network, no fonts, no script to be read.

Every text is escaped, a model's above all; the only markup that passes is SVG drawn here.

Sections as Markdown: texts, tables and samples; drawings are left to the page.

A report from runs: the sections that have something to show, in the order of the path.

A section is a function of the runs that yields blocks; to add one, write it and name it here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, is_dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from tessera.report import (
    sections as puzzle,
)
from tessera.report import (
    sections as reasoning,
)
from tessera.report import (
    sections as summary,
)
from tessera.report import (
    sections as training,
)
from tessera.report.sections import (
    Block,
    Figure,
    Row,
    Runs,
    Samples,
    Section,
    Table,
    Text,
    read_runs,
)
from tessera.table import Column, cell

# No request leaves the page, whatever got into it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(title: str, told: str, found: Sequence[Section]) -> str:
    """The document; `told` is the line under its title."""
    here = files("tessera.report")
    style, script = ((here / name).read_text("utf-8") for name in ("page.css", "page.js"))
    index = "".join(f'<a href="#s{i}">{escape(s.title)}</a>' for i, s in enumerate(found))
    body = "\n".join(
        f'<section id="s{i}"><h2>{escape(s.title)}</h2>{_blocks(s.blocks)}</section>'
        for i, s in enumerate(found)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f"<header><h1>{escape(title)}</h1><p>{escape(told)}</p><nav>{index}</nav></header>"
        f"<main>{body}</main><script>{script}</script></body></html>\n"
    )


def _blocks(blocks: Sequence[Block]) -> str:
    """Neighbouring figures stand beside one another where there is room."""
    parts, figures = [], []
    for block in (*blocks, None):
        if isinstance(block, Figure):
            figures.append(_figure(block))
            continue
        if figures:
            parts.append(f'<div class="figures">{"".join(figures)}</div>')
            figures = []
        parts += [_block(block)] if block else []
    return "".join(parts)


def _block(block: Text | Table | Samples | Figure) -> str:
    match block:
        case Text(text):
            return f"<p>{escape(text)}</p>"
        case Table():
            return _table(block)
        case Samples():
            return "".join(_sample(*one) for one in block.items)
        case Figure():
            return _figure(block)


def _figure(one: Figure) -> str:
    keys = "".join(
        f'<li><i style="background:{colour}"></i>{escape(name)}</li>' for name, colour in one.legend
    )
    names = f'<ul class="legend">{keys}</ul>' if len(one.legend) > 1 else ""
    note = f"<p>{escape(one.note)}</p>" if one.note else ""
    head = f"<figcaption>{escape(one.title)}</figcaption>"
    return f'<figure>{head}{names}{one.svg}<output aria-live="off"></output>{note}</figure>'


def _table(one: Table) -> str:
    keys = list(dict.fromkeys(key for row in one.rows for key in row))
    columns = [column for column in one.view if column.key in keys]
    known = {column.key for column in columns}
    columns = [
        *(Column(key, (key,), cell) for key in keys if key not in known and key == "run"),
        *columns,
        *(Column(key, (key,), cell) for key in keys if key not in known and key != "run"),
    ]
    head = "".join(f"<th>{escape(' '.join(c.heading).replace('- ', ''))}</th>" for c in columns)
    body = "".join(
        f"<tr>{''.join(_cell(column, row) for column in columns)}</tr>" for row in one.rows
    )
    table = (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
    name = escape(one.name)
    if one.folded:
        return f"<details><summary>{name}</summary>{table}</details>"
    return f"<h3>{name}</h3>{table}"


def _cell(column: Column, row: Row) -> str:
    value = row.get(column.key)
    text = cell(None) if value is None else column.text(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"<td{' class=n' if number else ''}>{escape(text)}</td>"


def _sample(question: str, answers: Sequence[tuple[str, str]]) -> str:
    body = "".join(
        f"<div><b>{escape(label)}</b><pre>{escape(text)}</pre></div>" for label, text in answers
    )
    return f'<article><h3>{escape(question)}</h3><div class="answers">{body}</div></article>'


def markdown(title: str, told: str, found: Sequence[Section]) -> str:
    """A document for a README, an issue or a model card."""
    parts = [f"# {_safe(title)}", _safe(told)]
    for section in found:
        parts.append(f"## {_safe(section.title)}")
        parts += [text for block in section.blocks if (text := _markdown_block(block))]
    return "\n\n".join(parts) + "\n"


def _markdown_block(block: Block) -> str:
    match block:
        case Text(text):
            return _safe(text)
        case Figure():
            return f"**{_safe(block.title)}.** {_safe(block.note)}" if block.note else ""
        case Table():
            return _markdown_table(block)
        case Samples(items):
            return "\n\n".join(_markdown_sample(*one) for one in items)


def _markdown_table(one: Table) -> str:
    keys = list(dict.fromkeys(key for row in one.rows for key in row))
    view = {column.key: column for column in one.view}
    columns = [view.get(key, Column(key, (key,), cell)) for key in keys]
    lines = [[" ".join(c.heading).replace("- ", "") for c in columns], ["---"] * len(columns)]
    for row in one.rows:
        values = [(c, row.get(c.key)) for c in columns]
        lines.append([cell(None) if v is None else c.text(v) for c, v in values])
    table = "\n".join(f"| {' | '.join(map(_safe, line))} |" for line in lines)
    return f"**{_safe(one.name)}**\n\n{table}"


def _markdown_sample(question: str, answers: Sequence[tuple[str, str]]) -> str:
    # Four spaces make a block of code that nothing in the text can end.
    texts = [
        f"{_safe(label)}\n\n" + "\n".join(f"    {line}" for line in text.splitlines())
        for label, text in answers
    ]
    return "\n\n".join([f"**{_safe(question)}**", *texts])


def _safe(text: str) -> str:
    """One line of text that is neither HTML nor the end of a cell."""
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|")


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
