"""What a subblock keeps of each token for its backward pass, in numbers: layers.py and fused.py.

norm         its input; its output, which the products behind it keep
attention    q, k, v by documents; the output by documents and by rows
FFN          gate and up; the rest is made again
chain        what is between its matrices
"""

from __future__ import annotations

from collections.abc import Iterable

from tessera.model.config import GQA, Chain, ModelConfig, NoOp, SwiGLU, Variant
from tessera.train.parallel import splits

DOCUMENTS = 4 / 3  # rows of documents grouped by length are padded by a third at most (context.py)


def kept(config: ModelConfig, variant: Variant, ways: int = 1) -> float:
    """Numbers a token that one subblock keeps, on one of `ways` tensor-parallel processes."""
    ways = ways if splits(config, variant, ways) else 1
    match variant:
        case NoOp():
            return 0.0
        case SwiGLU(intermediate_size=width):
            return 2 * config.hidden_size + 2 * width / ways
        case GQA(num_key_value_heads=heads):
            q, kv = config.num_attention_heads * config.head_dim, heads * config.head_dim
            return 2 * config.hidden_size + (DOCUMENTS * (2 * q + 2 * kv) + q) / ways
        case Chain():
            return 2 * config.hidden_size + variant.inner(config.hidden_size)


def working(config: ModelConfig, variants: Iterable[Variant], ways: int = 1) -> float:
    """Numbers a token that the backward pass of the widest FFN holds beside what is kept.

    silu(gate), its product with up, and the slopes of that product, of gate and of up; around
    them slopes of the residual stream.
    """
    widths = [v.intermediate_size for v in variants if isinstance(v, SwiGLU)]
    return 5 * max(widths, default=0) / ways + 4 * config.hidden_size
