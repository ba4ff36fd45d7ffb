"""How many operations a microbatch takes, and how many numbers its backward pass keeps.

    forward     2 a weight of a matrix and token, 4 H D a pair of a token and one that it attends to
    backward    twice as many: gradients of weights, and of inputs

A multiply-add is two operations. Padding, masked halves and what is computed again count as
nothing: the "model FLOPs" of PaLM (2204.02311, appendix B), whose share of the peak is MFU.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tessera import devices, dist
from tessera.data.batch import Batch
from tessera.model.config import GQA, Chain, ModelConfig, NoOp, SwiGLU, Variant
from tessera.model.cpu import multiply
from tessera.model.parallel import splits

# Of the chips in `devices.py`, with less than the peaks there: a share of those would mislead.
SLOWER_BOARDS = ("H100 PCIe", "H100 NVL", "H200 NVL", "RTX 4090 D", "RTX 4090 Laptop")


@dataclass(frozen=True, slots=True)
class Work:
    """What a microbatch holds: tokens that are no padding, and pairs that attention looks at."""

    tokens: int
    pairs: int

    @classmethod
    def of(cls, batch: Batch, sliding_window: int | None = None) -> Work:
        """The token at position p of its document attends to p + 1 tokens, or to the window."""
        seen = batch.positions[batch.segments >= 0] + 1
        if sliding_window is not None:
            seen = seen.clamp(max=sliding_window)
        return cls(seen.numel(), int(seen.sum()))


@dataclass(frozen=True, slots=True)
class Cost:
    """Forward operations of a token in matrices, and of a pair in attention."""

    token: int = 0
    pair: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.token + other.token, self.pair + other.pair)

    def forward(self, work: Work) -> int:
        return self.token * work.tokens + self.pair * work.pairs

    def training(self, work: Work) -> int:
        return 3 * self.forward(work)


def subblock_cost(config: ModelConfig, variant: Variant) -> Cost:
    hidden, dim = config.hidden_size, config.head_dim
    match variant:
        case GQA(num_key_value_heads=kv):
            heads = config.num_attention_heads * dim
            return Cost(4 * hidden * (heads + kv * dim), 4 * heads)
        case SwiGLU(intermediate_size=width):
            return Cost(6 * hidden * width)
        case Chain():
            return Cost(sum(2 * rows * columns for rows, columns in variant.shapes(hidden)))
        case NoOp():
            return Cost()


def block_cost(config: ModelConfig, layer: int) -> Cost:
    block = config.blocks[layer]
    return subblock_cost(config, block.attention) + subblock_cost(config, block.ffn)


def model_cost(config: ModelConfig, *, head: bool = True) -> Cost:
    """The operations of a whole model; the embedding is a lookup and costs none."""
    total = Cost(2 * config.hidden_size * config.vocab_size if head else 0)
    for layer in range(len(config.blocks)):
        total += block_cost(config, layer)
    return total


@functools.cache
def peak(dtype: torch.dtype) -> float | None:
    """Operations a second that this process's device could do in products of `dtype`, if known.

    A GPU's by its data sheet; a CPU's by the best of some float32 products of 1024 x 1024.
    """
    if dist.device().type == "cuda":
        name = torch.cuda.get_device_name(dist.device())
        return _sheet_peak(name) if dtype == torch.bfloat16 else None
    if dist.device().type != "cpu" or dtype != torch.float32:
        return None
    size, generator, best = 1024, torch.Generator().manual_seed(0), float("inf")
    a, b = (torch.randn(size, size, generator=generator) for _ in range(2))
    for _ in range(5):
        begun = time.perf_counter()
        multiply(a, b)
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def _sheet_peak(name: str) -> float | None:
    if any(board in name for board in SLOWER_BOARDS):
        return None
    found = (device for device in devices.DEVICES.values() if device.name in name)
    return next((device.peak["bf16"] for device in found), None)


DOCUMENTS = (
    4 / 3
)  # rows of documents grouped by length are padded by a third at most (attention.py)


def kept(config: ModelConfig, variant: Variant, ways: int = 1) -> float:
    """Numbers a token that one subblock keeps, on one of `ways` tensor-parallel processes.

    Norm: its own tokens of the input, and the output of all. Attention: q, k, v and the output by
    documents, and the output by rows. FFN: gate and up; the rest is made again. A chain: what is
    between its matrices.
    """
    around = config.hidden_size * (1 + 1 / ways)
    ways = ways if splits(config, variant, ways) else 1
    match variant:
        case NoOp():
            return 0.0
        case SwiGLU(intermediate_size=width):
            return around + 2 * width / ways
        case GQA(num_key_value_heads=heads):
            q, kv = config.num_attention_heads * config.head_dim, heads * config.head_dim
            return around + (DOCUMENTS * (2 * q + 2 * kv) + q) / ways
        case Chain():
            return around + variant.inner(config.hidden_size)


def working(config: ModelConfig, variants: Iterable[Variant], ways: int = 1) -> float:
    """Numbers a token that the backward pass of the widest FFN holds beside what is kept.

    silu(gate), its product with up, and three slopes; around them those of the residual stream.
    """
    widths = [v.intermediate_size for v in variants if isinstance(v, SwiGLU)]
    return 5 * max(widths, default=0) / ways + 4 * config.hidden_size
