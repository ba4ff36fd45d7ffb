"""How many operations the mathematics of a microbatch takes, and what share of the peak that is.

    forward     2 a weight of a matrix and token, 4 H D a pair of a token and one that it attends to
    backward    what gradients are asked for: of weights, and of inputs that depend on any

A multiply-add is two operations; pairs are those inside documents in causal order, so padding and
masked halves count as nothing, nor does what is computed again (gradient checkpointing). That is
the "model FLOPs" of PaLM (2204.02311, appendix B), whose share of the peak is MFU.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch

from tessera import devices, dist
from tessera.data.batch import Batch
from tessera.model.config import GQA, Linear, ModelConfig, NoOp, SwiGLU, Variant
from tessera.model.matmul import multiply


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
    """Forward operations: a token in matrices that read the input and in others, and a pair."""

    entry: int = 0
    inner: int = 0
    pair: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.entry + other.entry, self.inner + other.inner, self.pair + other.pair)

    def forward(self, work: Work) -> int:
        return (self.entry + self.inner) * work.tokens + self.pair * work.pairs

    def training(self, work: Work) -> int:
        """Forward, and the gradients of weights and of what entered."""
        return 3 * self.forward(work)

    def local(self, work: Work) -> int:
        """Training of a subblock whose input is data: the gradient of what entered is not made."""
        return self.training(work) - self.entry * work.tokens


def subblock_cost(config: ModelConfig, variant: Variant) -> Cost:
    """The operations of one subblock's matrices."""
    hidden, dim = config.hidden_size, config.head_dim
    match variant:
        case GQA(num_key_value_heads=kv):
            heads = config.num_attention_heads * dim
            return Cost(2 * hidden * (heads + 2 * kv * dim), 2 * heads * hidden, 4 * heads)
        case SwiGLU(intermediate_size=width):
            return Cost(4 * hidden * width, 2 * width * hidden)
        case Linear():
            return Cost(2 * hidden * hidden)
        case NoOp():
            return Cost()


def block_cost(config: ModelConfig, layer: int) -> Cost:
    """The operations of both subblocks of a layer."""
    block = config.blocks[layer]
    return subblock_cost(config, block.attention) + subblock_cost(config, block.ffn)


def model_cost(config: ModelConfig, *, head: bool = True) -> Cost:
    """The operations of a whole model; the embedding is a lookup and costs none."""
    total = Cost(0, 2 * config.hidden_size * config.vocab_size if head else 0)
    for layer in range(len(config.blocks)):
        total += block_cost(config, layer)
    return total


@functools.cache
def peak(dtype: torch.dtype) -> float | None:
    """Operations a second that this process's device could do in products of `dtype`, if known.

    A GPU's by its data sheet; a CPU's by the best of some float32 products of 1024 x 1024.
    """
    if dist.device().type != "cuda":
        return _probed() if dtype == torch.float32 else None
    name = torch.cuda.get_device_name(dist.device())
    sheet = next((d for d in devices.DEVICES.values() if d.name in name), None)
    return sheet.peak["bf16"] if sheet and dtype == torch.bfloat16 else None


def _probed(size: int = 1024, tries: int = 5) -> float:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator) for _ in range(2))
    best = float("inf")
    for _ in range(tries):
        begun = time.perf_counter()
        multiply(a, b)
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best
