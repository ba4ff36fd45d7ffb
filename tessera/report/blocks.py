"""What a section is made of: values that HTML, Markdown and JSON each show in their own way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tessera.table import Column


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows with their full keys; `view` says how known ones are shown, the rest follow.

    folded: behind a click, for what few readers want.
    """

    name: str
    rows: Sequence[dict[str, Any]]
    view: Sequence[Column] = ()
    folded: bool = False


@dataclass(frozen=True)
class Figure:
    """A drawing: trusted SVG of our own, a caption, and (name, colour) of its lines."""

    title: str
    svg: str
    note: str = ""
    legend: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Samples:
    """Texts that models wrote, under the question: (question, [(label, text)])."""

    items: Sequence[tuple[str, Sequence[tuple[str, str]]]]


Block = Text | Table | Figure | Samples


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]
