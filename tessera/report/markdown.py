"""Sections as Markdown: texts, tables and samples; drawings are left to the page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tessera.report.blocks import Block, Figure, Samples, Section, Table, Text
from tessera.table import Column, cell


def markdown(title: str, told: str, found: Sequence[Section]) -> str:
    """A document for a README, an issue or a model card."""
    parts = [f"# {_safe(title)}", _safe(told)]
    for section in found:
        parts.append(f"## {_safe(section.title)}")
        parts += [text for block in section.blocks if (text := _block(block))]
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    match block:
        case Text(text):
            return _safe(text)
        case Figure():
            return f"**{_safe(block.title)}.** {_safe(block.note)}" if block.note else ""
        case Table():
            return _table(block)
        case Samples(items):
            return "\n\n".join(_sample(*one) for one in items)


def _table(one: Table) -> str:
    keys = list(dict.fromkeys(key for row in one.rows for key in row))
    view = {column.key: column for column in one.view}
    columns = [view.get(key, Column(key, (key,), cell)) for key in keys]
    lines = [[" ".join(c.heading).replace("- ", "") for c in columns], ["---"] * len(columns)]
    for row in one.rows:
        values = [(c, row.get(c.key)) for c in columns]
        lines.append([cell(None) if v is None else c.text(v) for c, v in values])
    table = "\n".join(f"| {' | '.join(map(_safe, line))} |" for line in lines)
    return f"**{_safe(one.name)}**\n\n{table}"


def _sample(question: str, answers: Sequence[tuple[str, str]]) -> str:
    # Four spaces make a block of code that nothing in the text can end.
    texts = [
        f"{_safe(label)}\n\n" + "\n".join(f"    {line}" for line in text.splitlines())
        for label, text in answers
    ]
    return "\n\n".join([f"**{_safe(question)}**", *texts])


def _safe(text: str) -> str:
    """One line of text that is neither HTML nor the end of a cell."""
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|")
