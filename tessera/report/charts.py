"""Charts of a report, as SVG elements drawn by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# The palette of Okabe and Ito: colour-blind readers can tell its colours apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^Dv"
INK = "#80868f"  # readable on the light page and on the dark one
MAX_POINTS = 240  # points of a line; longer lines are averaged
MAX_MARKED = 24  # lines of at most this many points show each of them
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tessera",
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
}


@dataclass(frozen=True)
class Series:
    """A line of a chart: its name in the legend and its points (x, y)."""

    name: str
    points: Sequence[tuple[float, float]]


def chart(
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    log: bool = False,
    joined: bool = True,
    diagonal: bool = False,
) -> str:
    """An SVG element of lines, or of points where not `joined`; empty where there are no points.

    x, y: labels of the axes, with units. log: logarithmic y axis; points at or below zero are
    left out. diagonal: also draw the line where y equals x.
    """
    shown = [(one.name, averaged([p for p in one.points if not log or p[1] > 0])) for one in series]
    if not any(points for _, points in shown):
        return ""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.add_subplot(xlabel=x, ylabel=y)
        axes.grid(True)
        for index, (name, points) in enumerate(shown):
            if points:
                marker = MARKERS[index % len(MARKERS)]
                axes.plot(
                    *zip(*points, strict=True),
                    color=COLOURS[index % len(COLOURS)],
                    linestyle=("-", "--")[index // len(COLOURS) % 2] if joined else "",
                    marker=marker if len(points) <= MAX_MARKED or not joined else "",
                    markersize=4,
                    linewidth=1.4,
                    label=name,
                )
        if log:
            axes.set_yscale("log")
        if diagonal:
            axes.axline((1, 1), slope=1, color=INK, linestyle=":", linewidth=1)
        if len(shown) > 1:
            figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=8)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    document = out.getvalue()
    return document[document.index("<svg") :]


def averaged(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points: the means of as many neighbours as it takes, at the last's x."""
    size = -(-len(points) // MAX_POINTS) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]
