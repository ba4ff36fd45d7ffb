"""Sections as one HTML page that needs nothing else: no network, no fonts, no script to be read.

Every text is escaped, a model's above all; the only markup that passes is SVG drawn here.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from tessera.report.blocks import Block, Figure, Samples, Section, Table, Text
from tessera.report.runs import Row
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
