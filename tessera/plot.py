"""Line charts as SVG text, without a dependency: what a browser, a README or a paper can show.

Every line has a colour and a marker of its own, so that it can be told apart in grey, too. The
chart follows the reader's light or dark scheme; hovering over a point tells what it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 800, 460
LEFT, RIGHT, TOP, BOTTOM = 74, 178, 52, 62  # margins: numbers, legend, title, axis
MARK = 4.5  # radius of a marker
# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLE = """
text { font-family: system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #333 }
.page { fill: #fff } .grid { stroke: #e3e3e3 } .axis { stroke: #777 } .small { fill: #555 }
@media (prefers-color-scheme: dark) {
 text { fill: #ddd } .small { fill: #aaa } .page { fill: #16181d } .grid { stroke: #33363d }
 .axis { stroke: #888 }
}"""


@dataclass(frozen=True)
class Series:
    """One line: its name in the legend, and (x, y, what hovering tells) of its points."""

    name: str
    points: Sequence[tuple[float, float, str]]


@dataclass(frozen=True)
class Axis:
    """A range of values on a range of pixels, linear or logarithmic, with its ticks."""

    low: float
    high: float
    pixels: tuple[float, float]
    ticks: Sequence[float]
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], pixels: tuple[float, float], log: bool = False) -> Axis:
        """The axis that holds all values; a linear one begins and ends at a tick."""
        low, high = min(values), max(values)
        if log:
            low, high = low / 1.15, high * 1.15
            return cls(low, high, pixels, log_ticks(low, high), True)
        ticks = linear_ticks(low, high)
        return cls(ticks[0], ticks[-1], pixels, ticks)

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(value)
        first, last = self.pixels
        return first + (last - first) * (at - low) / (high - low)


def linear_ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """About so many round numbers, the first at or below `low`, the last at or above `high`."""
    span = (high - low) or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / wanted))
    step = unit * next(m for m in (1, 2, 2.5, 5, 10) if span / (unit * m) <= wanted)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every decade within the range; powers of ten alone where those are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        ticks = [m * 10.0**d for d in decades for m in mantissas if low <= m * 10.0**d <= high]
        if len(ticks) >= 4:
            return ticks
    return ticks if len(ticks) > 1 else [t for t in linear_ticks(low, high) if low <= t <= high]


def line_chart(series: Sequence[Series], *, title: str, x: str, y: str, log: bool = False) -> str:
    """An SVG document; x and y are the axes' labels, with units. `log`: of the y axis.

    Every y must be above zero where the axis is logarithmic.
    """
    points = [point for one in series for point in one.points]
    across = Axis.over([p[0] for p in points], (LEFT, WIDTH - RIGHT))
    up = Axis.over([p[1] for p in points], (HEIGHT - BOTTOM, TOP), log)
    body = [
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(LEFT, 28, title, size=16, weight=600),
        *_frame(across, up, x, y),
    ]
    for index, one in enumerate(series):
        body += _line(one, index, across, up)
        body += _entry(one.name, index)
    head = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
    named = f'role="img" aria-label="{escape(title)}"'
    return (
        f'<svg {head} width="{WIDTH}" height="{HEIGHT}" {named}>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _frame(across: Axis, up: Axis, x: str, y: str) -> list[str]:
    """Grid, ticks, axes and their labels."""
    (left, right), (bottom, top) = across.pixels, up.pixels
    found = []
    for tick in up.ticks:
        found.append(_rule("grid", left, up(tick), right, up(tick)))
        found.append(_text(left - 9, up(tick) + 4, f"{tick:g}", anchor="end", small=True))
    for tick in across.ticks:
        found.append(_rule("grid", across(tick), bottom, across(tick), top))
        found.append(_text(across(tick), bottom + 19, f"{tick:g}", anchor="middle", small=True))
    found.append(_rule("axis", left, bottom, right, bottom))
    found.append(_rule("axis", left, bottom, left, top))
    found.append(_text((left + right) / 2, bottom + 45, x, anchor="middle"))
    middle = (bottom + top) / 2
    turned = _text(0, 0, y, anchor="middle")
    return [*found, f'<g transform="translate(20 {middle:.1f}) rotate(-90)">{turned}</g>']


def _line(one: Series, index: int, across: Axis, up: Axis) -> list[str]:
    colour = COLOURS[index % len(COLOURS)]
    places = [(across(x), up(y), told) for x, y, told in one.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
    line = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
    marks = [
        f"<g>{_mark(index, x, y, colour)}<title>{escape(told)}</title></g>" for x, y, told in places
    ]
    return [line, *marks]


def _entry(name: str, index: int) -> list[str]:
    """A line of the legend."""
    x, y = WIDTH - RIGHT + 22, TOP + 12 + 24 * index
    colour = COLOURS[index % len(COLOURS)]
    line = f'<line x1="{x}" y1="{y}" x2="{x + 24}" y2="{y}" stroke="{colour}" stroke-width="2"/>'
    return [line, _mark(index, x + 12, y, colour), _text(x + 32, y + 4, name)]


def _mark(index: int, x: float, y: float, colour: str) -> str:
    if index % 5 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{MARK}" fill="{colour}"/>'
    shapes: tuple[Callable[[float], list[tuple[float, float]]], ...] = (
        lambda r: [(-r, -r), (r, -r), (r, r), (-r, r)],
        lambda r: [(0, -1.3 * r), (1.2 * r, r), (-1.2 * r, r)],
        lambda r: [(0, -1.4 * r), (1.4 * r, 0), (0, 1.4 * r), (-1.4 * r, 0)],
        lambda r: [(0, 1.3 * r), (1.2 * r, -r), (-1.2 * r, -r)],
    )
    corners = shapes[index % 5 - 1](0.9 * MARK)
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" fill="{colour}"/>'


def _rule(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    colour = "#e3e3e3" if kind == "grid" else "#777"
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line class="{kind}" {ends} stroke="{colour}"/>'


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    size: int = 13,
    weight: int = 400,
    small: bool = False,
) -> str:
    kind = ' class="small"' if small else ""
    font = f'font-size="{12 if small else size}" font-weight="{weight}"'
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text{kind} {place} {font}>{escape(text)}</text>"
