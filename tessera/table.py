"""Rows of numbers as text for a person: aligned columns, digits grouped, nothing cut silently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def render_table(rows: Sequence[Row], limit: int | None = None) -> str:
    """The rows as aligned text under their column names; the last line counts those left out."""
    shown = list(rows if limit is None else rows[:limit])
    columns = list(dict.fromkeys(key for row in shown for key in row))
    cells = [[cell(row.get(column)) for column in columns] for row in shown]
    numeric = [all(_is_number(row.get(column)) for row in shown) for column in columns]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [_line(columns, widths, numeric), _line(["-" * w for w in widths], widths, numeric)]
    lines += [_line(row, widths, numeric) for row in cells]
    if len(shown) < len(rows):
        lines.append(f"... and {len(rows) - len(shown)} more rows (--json prints all)")
    return "\n".join(lines)


def cell(value: Any) -> str:
    """One value: counts with thousands grouped, other numbers to four digits, `-` for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " ".join(map(cell, value))
    return str(value)


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    padded = [
        text.rjust(width) if to_right else text.ljust(width)
        for text, width, to_right in zip(cells, widths, right, strict=True)
    ]
    return "  ".join(padded).rstrip()
