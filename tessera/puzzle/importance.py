"""Which FFN channels matter: how far a layer's output moves without them (Puzzle App. A).

    independent    C_i = mean |x_i| · ‖W_i‖                          each channel alone
    iterative      c_i = mean ‖s + x_i W_i‖,   s = Y_full - Y_now    each beside those gone already
                       = mean √(‖s‖² + 2 x_i (s·W_i) + x_i² ‖W_i‖²)

x_i is channel i of the input of `down_proj`, W_i its column. The iterative score takes the least
of them out in rounds, the first rounds the largest, and ranks channels by when they went: two
channels that make up for one another are then not both dispensable (ModelOpt).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.data.batch import Batch
from tessera.model.config import SwiGLU
from tessera.model.context import Context
from tessera.model.layers import FeedForward, Subblock
from tessera.model.transformer import Transformer
from tessera.train.losses import chunks
from tessera.train.parallel import gathered

Importance = Literal["iterative", "independent"]
ROUNDS = 16  # passes over the calibration tokens a layer


@torch.no_grad()
def iterative_importance(
    parent: Transformer, batches: Sequence[Batch], layers: Collection[int]
) -> dict[int, Tensor]:
    """Ranks `(F,)` of the channels of every SwiGLU among `layers`, the one removed last highest.

    Holds the residual stream of all calibration tokens N and one residual of them, `2·(N, C)`,
    never `(N, F)`; layers above the last one asked for do not run.
    """
    contexts = [parent.prepare(Context(b.positions, b.segments)) for b in batches]
    with gathered(parent):
        states = [parent.embed_tokens(batch.tokens) for batch in batches]
    found: dict[int, Tensor] = {}
    for layer, block in enumerate(parent.blocks[: max(layers, default=-1) + 1]):
        with gathered(block):
            middles = [x + block.attention(x, c) for x, c in zip(states, contexts, strict=True)]
            if layer in layers and isinstance(block.ffn.variant, SwiGLU):
                real = [x[b.segments >= 0] for x, b in zip(middles, batches, strict=True)]
                found[layer] = removal_order(block.ffn, torch.cat(real))
            states = [x + block.ffn(x, c) for x, c in zip(middles, contexts, strict=True)]
    return found


@torch.no_grad()
def removal_order(ffn: Subblock, x: Tensor, rounds: int = ROUNDS) -> Tensor:
    """`(F,)`: place of each channel in the order of removal, 0 the first to go.

    x `(N, C)` enters the subblock. Memory beside x: `(N, C)` and some chunks of tokens by F.
    """
    weight = _down(ffn)
    normed, gone = ffn.norm(x), torch.zeros_like(x)  # gone is s: what the channels removed gave
    left = torch.arange(weight.shape[1], device=x.device)
    taken, order = left[:0], []
    for stay in schedule(len(left), rounds):
        harm = torch.zeros(len(left), dtype=torch.float64, device=x.device)
        for part in chunks(x, weight.shape[1]):
            inner = channels(ffn, normed[part], torch.cat((taken, left)))
            lost, inner = inner.split([len(taken), len(left)], dim=1)
            gone[part] += lost @ weight[:, taken].t()
            harm += _harm(inner, gone[part], weight[:, left])
        least = harm.argsort(stable=True)
        taken, left = left[least[: len(left) - stay]], left[least[len(left) - stay :].sort().values]
        order.append(taken)
    rank = torch.empty(weight.shape[1], device=x.device)
    rank[torch.cat(order)] = torch.arange(len(rank), dtype=rank.dtype, device=x.device)
    return rank


def schedule(width: int, rounds: int) -> list[int]:
    """How many channels are left after each round: width·(1 - r/rounds)², falling, 0 at the end.

    Front-loaded: while little is gone the channels hardly depend on one another.
    """
    left = [round(width * (1 - r / rounds) ** 2) for r in range(1, rounds + 1)]
    return [n for n, before in zip(left, [width, *left], strict=False) if n < before]


def channels(ffn: Subblock, normed: Tensor, which: Tensor | slice = slice(None)) -> Tensor:
    """Channels of the input of `down_proj`, `(…, F)` or as many as `which`, of the normed input."""
    op = ffn.op
    assert isinstance(op, FeedForward)
    gate, up = (
        F.linear(normed, p.weight[which], None if p.bias is None else p.bias[which])
        for p in (op.gate_proj, op.up_proj)
    )
    return F.silu(gate) * up


def _harm(inner: Tensor, gone: Tensor, weight: Tensor) -> Tensor:
    """Σ over tokens of ‖s + x_i W_i‖, float64: x `(N, F)`, s `(N, C)`, W `(C, F)` -> `(F,)`."""
    square = (gone @ weight).mul_(2).mul_(inner).add_(gone.square().sum(-1, keepdim=True))
    square.addcmul_(inner.square(), weight.square().sum(0))
    return square.clamp_min_(0).sqrt_().sum(0).double()


def _down(ffn: Subblock) -> Tensor:
    assert isinstance(ffn.op, FeedForward)
    return ffn.op.down_proj.weight
