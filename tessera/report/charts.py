"""Charts for a page: small, without a legend or a style of their own, coloured by CSS variables.

Unlike `plot.line_chart`, which is a document that stands alone, these share the page's style; the
ranges of both axes go along as data, so that a few lines of script can read values off.

The mosaic as SVG: a row a layer, bars for attention and FFN, the parent's behind in outline.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tessera.model.config import FFN, GQA, Attention, Chain, ModelConfig, SwiGLU
from tessera.plot import COLOURS, Axis, Series

WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 42
MOST = 240  # points of a line; more are averaged
MARKED = 24  # lines of at most so many points show each


def chart(
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    log: bool = False,
    joined: bool = True,
    diagonal: bool = False,
) -> str:
    """An SVG element of lines, or of points where not `joined`; empty where there are none.

    log: of y; what is not above zero is left out. diagonal: the line where y equals x.
    """
    kept = [_kept(one, log) for one in series]
    points = [point for one in kept for point in one]
    if not points:
        return ""
    across = Axis.over([p[0] for p in points], (LEFT, WIDTH - RIGHT))
    up = Axis.over([p[1] for p in points], (HEIGHT - BOTTOM, TOP), log)
    body = _frame(across, up, x, y)
    if diagonal:
        low, high = max(across.low, up.low), min(across.high, up.high)
        if low < high:
            body.append(_rule("same", across(low), up(low), across(high), up(high)))
    for index, (one, found) in enumerate(zip(series, kept, strict=True)):
        body += _drawn(one.name, found, index, across, up, joined)
    ranges = f'data-x="{across.low:g},{across.high:g}" data-y="{up.low:g},{up.high:g},{int(log)}"'
    label = escape(f"{y} against {x}", quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{label}" {ranges}>{"".join(body)}</svg>'
    )


def legend(series: Sequence[Series]) -> list[tuple[str, str]]:
    """(name, colour) of each line, in the order that `chart` colours them."""
    return [(one.name, COLOURS[i % len(COLOURS)]) for i, one in enumerate(series) if one.points]


def _kept(one: Series, log: bool) -> list[tuple[float, float, str]]:
    points = [p for p in one.points if not log or p[1] > 0]
    if len(points) <= MOST:
        return points
    size = -(-len(points) // MOST)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(p[-1][0], sum(q[1] for q in p) / len(p), f"mean of {len(p)} steps") for p in parts]


def _drawn(
    name: str,
    points: Sequence[tuple[float, float, str]],
    index: int,
    across: Axis,
    up: Axis,
    joined: bool,
) -> list[str]:
    colour = COLOURS[index % len(COLOURS)]
    path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y, _ in points)
    dash = ' stroke-dasharray="5 3"' if index // len(COLOURS) % 2 else ""
    line = (
        f'<polyline data-name="{escape(name, quote=True)}" points="{path}" fill="none" '
        f'stroke="{colour if joined else "none"}" stroke-width="1.6"{dash}/>'
    )
    if joined and len(points) > MARKED:
        return [line]
    return [line] + [
        f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.6" fill="{colour}">'
        f"<title>{escape(told)}</title></circle>"
        for x, y, told in points
    ]


def _frame(across: Axis, up: Axis, x: str, y: str) -> list[str]:
    found = []
    for tick in up.ticks:
        found.append(_rule("grid", LEFT, up(tick), WIDTH - RIGHT, up(tick)))
        found.append(_text(LEFT - 6, up(tick) + 4, _number(tick), "end"))
    for tick in across.ticks:
        found.append(_text(across(tick), HEIGHT - BOTTOM + 16, _number(tick), "middle"))
    found.append(_rule("axis", LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM))
    found.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x, "middle"))
    turned = _text(0, 0, y, "middle")
    middle = (HEIGHT - BOTTOM + TOP) / 2
    return [*found, f'<g transform="translate(11 {middle:.0f}) rotate(-90)">{turned}</g>']


def _number(value: float) -> str:
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{name}"
    return f"{value:g}"


def _rule(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


ROW, MOSAIC_WIDTH, HEAD = 20, 440, 20
TRACKS = ((34, 140), (190, 240))  # x and width of attention's and FFN's bars


def mosaic(config: ModelConfig, parent: ModelConfig) -> str:
    """An SVG element; a bar is KV heads of the parent's most, FFN width of its widest."""
    blocks = [*config.blocks, *parent.blocks]
    heads = [b.attention.num_key_value_heads for b in blocks if isinstance(b.attention, GQA)]
    widths = [b.ffn.intermediate_size for b in blocks if isinstance(b.ffn, SwiGLU)]
    most = (max(heads, default=1), max(widths, default=1))
    body = [_label(TRACKS[0][0], 13, "attention"), _label(TRACKS[1][0], 13, "FFN")]
    for layer, block in enumerate(config.blocks):
        y = HEAD + ROW * layer
        body.append(_label(4, y + 14, str(layer)))
        own = parent.blocks[layer] if layer < len(parent.blocks) else block
        pairs = ((block.attention, own.attention), (block.ffn, own.ffn))
        for (x, width), full, word, (now, was) in zip(
            TRACKS, most, block.words, pairs, strict=True
        ):
            body.append(_bar("was", x, y, width * _share(was, full)))
            body.append(_bar("now", x, y, width * _share(now, full)))
            body.append(_label(x + 5, y + 14, word, "word"))
    height = HEAD + ROW * len(config.blocks)
    return (
        f'<svg class="mosaic" viewBox="0 0 {MOSAIC_WIDTH} {height}" role="img" '
        f'aria-label="mosaic of the layers">{"".join(body)}</svg>'
    )


def _share(variant: Attention | FFN, full: int) -> float:
    match variant:
        case GQA(size) | SwiGLU(size):
            return size / full
        case Chain():
            return 0.04
        case _:
            return 0.0


def _bar(kind: str, x: float, y: float, width: float) -> str:
    return f'<rect class="{kind}" x="{x}" y="{y + 1}" width="{width:.1f}" height="{ROW - 3}"/>'


def _label(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{escape(text)}</text>'
