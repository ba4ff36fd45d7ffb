"""The mosaic as SVG: a row a layer, bars for attention and FFN, the parent's behind in outline."""

from __future__ import annotations

from html import escape

from tessera.model.config import FFN, GQA, Attention, Chain, ModelConfig, SwiGLU

ROW, WIDTH, HEAD = 20, 440, 20
TRACKS = ((34, 140), (190, 240))  # x and width of attention's and FFN's bars


def mosaic(config: ModelConfig, parent: ModelConfig) -> str:
    """An SVG element; a bar is KV heads of the parent's most, FFN width of its widest."""
    blocks = [*config.blocks, *parent.blocks]
    heads = [b.attention.num_key_value_heads for b in blocks if isinstance(b.attention, GQA)]
    widths = [b.ffn.intermediate_size for b in blocks if isinstance(b.ffn, SwiGLU)]
    most = (max(heads, default=1), max(widths, default=1))
    body = [_text(TRACKS[0][0], 13, "attention"), _text(TRACKS[1][0], 13, "FFN")]
    for layer, block in enumerate(config.blocks):
        y = HEAD + ROW * layer
        body.append(_text(4, y + 14, str(layer)))
        own = parent.blocks[layer] if layer < len(parent.blocks) else block
        pairs = ((block.attention, own.attention), (block.ffn, own.ffn))
        for (x, width), full, word, (now, was) in zip(
            TRACKS, most, block.words, pairs, strict=True
        ):
            body.append(_bar("was", x, y, width * _share(was, full)))
            body.append(_bar("now", x, y, width * _share(now, full)))
            body.append(_text(x + 5, y + 14, word, "word"))
    height = HEAD + ROW * len(config.blocks)
    return (
        f'<svg class="mosaic" viewBox="0 0 {WIDTH} {height}" role="img" '
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


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{escape(text)}</text>'
