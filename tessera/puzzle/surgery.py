"""What BLD begins with: statistics of the parent, and a variant's first weights (Puzzle App. A).

narrower FFN   keep the channels of the largest importance
fewer KV heads mean of the K and V projections of the heads that merge
linear FFN     W_down · W_up                (the gate is left out)
linear attn    W_o · W_v, V rows repeated over the query groups (each token attends to itself)
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera import dist
from tessera.data.batch import Batch
from tessera.model.config import GQA, KINDS, Chain, ModelConfig, NoOp, SwiGLU, Variant, name
from tessera.model.context import Context
from tessera.model.layers import Attention, FeedForward, LinearMap, Subblock
from tessera.model.parallel import gathered
from tessera.model.transformer import Block, Transformer
from tessera.train.losses import chunks

Importance = Literal["iterative", "independent"]
ROUNDS = 16  # passes over the calibration tokens a layer


class Layer(NamedTuple):
    """A layer on a batch: the residual stream `(B,T,C)` before, within and after its block."""

    block: Block
    context: Context
    x: Tensor
    middle: Tensor
    out: Tensor

    def replaced(self, kind: str, unit: nn.Module) -> Tensor:
        if kind == "block":
            return unit(self.x, self.context)
        if kind == "attention":
            middle = self.x + unit(self.x, self.context)
            return middle + self.block.ffn(middle, self.context)
        return self.middle + unit(self.middle, self.context)


@torch.no_grad()
def walk(
    module: Transformer, batch: Batch, depth: int | None = None
) -> Iterator[tuple[Layer, dict[str, Tensor]]]:
    """Each of the first `depth` layers, and what each kind of subblock adds to the stream there; a
    layer's sharded parameters are whole until the next one is asked for."""
    context = module.prepare(Context(batch.positions, batch.segments))
    with gathered(module):
        x = module.embed_tokens(batch.tokens)
    for block in module.blocks[:depth]:
        with gathered(block):
            attention = block.attention(x, context)
            middle = x + attention
            ffn = block.ffn(middle, context)
            out = middle + ffn
            yield Layer(block, context, x, middle, out), {"attention": attention, "ffn": ffn}
        x = out


@dataclass(frozen=True)
class ParentStatistics:
    """What calibration batches say about each of the parent's layers.

    channel_importance: `(F,)` a layer, larger is kept first, None where the FFN is no SwiGLU.
    linear_scale: per kind, the factor that brings a linear map of the paper's weights closest
        (least squares) to the subblock's own output; without it few hundred steps are too few.
    output_scale: mean over tokens of ‖block output‖².
    block_influence: 1 - cos(block input, block output), mean over tokens (ShortGPT's score).
    """

    channel_importance: list[Tensor | None]
    linear_scale: dict[str, list[float]]
    output_scale: list[float]
    block_influence: list[float]


@torch.no_grad()
def collect_statistics(
    parent: Transformer,
    batches: Sequence[Batch],
    importance: Importance = "independent",
    layers: Collection[int] | None = None,
) -> ParentStatistics:
    """One pass of the parent over calibration batches; for `iterative` importance a second one, for
    the FFNs of `layers` (None: all) only."""
    depth, tokens = len(parent.blocks), 0.0
    activity: list[Tensor | None] = [None] * depth
    sums = {what: [0.0] * depth for what in ("output", "influence")}
    fits = {kind: [(0.0, 0.0)] * depth for kind in KINDS}  # Σxy and Σx² of a linear map's fit
    for batch in batches:
        real = (batch.segments >= 0).float()
        tokens += float(real.sum())
        for i, (layer, added) in enumerate(walk(parent, batch)):
            for kind, x in (("attention", layer.x), ("ffn", layer.middle)):
                subblock = getattr(layer.block, kind)
                if isinstance(subblock.variant, GQA | SwiGLU):
                    linear = F.linear(subblock.norm(x), linear_weight(subblock.op))
                    xy, xx = fits[kind][i]
                    xy += float(((linear * added[kind]).sum(-1) * real).sum())
                    xx += float((linear.square().sum(-1) * real).sum())
                    fits[kind][i] = xy, xx
            ffn = layer.block.ffn
            if isinstance(ffn.variant, SwiGLU):
                inner = channels(ffn, ffn.norm(layer.middle)).abs()
                found = torch.einsum("btf,bt->f", inner, real)
                found = found * feed_forward(ffn).down_proj.weight.norm(dim=0)
                known = activity[i]
                activity[i] = found if known is None else known + found
            sums["output"][i] += float((layer.out.square().sum(-1) * real).sum())
            distance = 1 - F.cosine_similarity(layer.x, layer.out, dim=-1)
            sums["influence"][i] += float((distance * real).sum())
    wanted = range(depth) if layers is None else layers
    iterative = importance == "iterative"
    ranks = iterative_importance(parent, batches, wanted) if iterative else {}
    independent = [None if one is None else one / tokens for one in activity]
    return ParentStatistics(
        [ranks.get(layer, own) for layer, own in enumerate(independent)],
        {kind: [xy / xx if xx else 1.0 for xy, xx in found] for kind, found in fits.items()},
        [one / tokens for one in sums["output"]],
        [one / tokens for one in sums["influence"]],
    )


@torch.no_grad()
def cut(
    parent: Subblock,
    config: ModelConfig,
    variant: Variant,
    importance: Tensor | None = None,
    linear_scale: float = 1.0,
) -> Subblock:
    """A subblock of `variant` with the parent's weights. importance `(F,)`: channels with the most
    are kept; None: the norm of down_proj's columns. linear_scale: of a linear map's weights."""
    child = Subblock(config, variant)
    if isinstance(variant, NoOp):
        return child
    copy_parameters(parent.norm, child.norm)
    match parent.op, child.op:
        case Attention() as old, Attention() as new:
            _pool_kv_heads(old, new)
        case FeedForward() as old, FeedForward() as new:
            _keep_channels(old, new, importance)
        case LinearMap() as old, LinearMap() as new if variant == parent.variant:
            copy_parameters(old, new)
        case old, LinearMap() as new:
            assert isinstance(variant, Chain)
            factors = variant.factors(linear_scale * linear_weight(old))
            for weight, first in zip(new.weights, factors, strict=True):
                weight.copy_(first)
        case _:
            raise ValueError(f"{name(variant)} cannot be cut from {name(parent.variant)}")
    return child


@torch.no_grad()
def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Every parameter into that of its name; `state_dict` would take gathered ones apart again."""
    for key, parameter in source.named_parameters():
        target.get_parameter(key).copy_(parameter)


def _pool_kv_heads(parent: Attention, child: Attention) -> None:
    copy_parameters(parent.q_proj, child.q_proj)
    copy_parameters(parent.o_proj, child.o_proj)
    if hasattr(parent, "q_norm"):
        copy_parameters(parent.q_norm, child.q_norm)
        copy_parameters(parent.k_norm, child.k_norm)
    heads = child.num_key_value_heads
    for old, new in ((parent.k_proj, child.k_proj), (parent.v_proj, child.v_proj)):
        pooled = old.weight.view(heads, -1, parent.head_dim, old.in_features).mean(1)
        new.weight.copy_(pooled.reshape_as(new.weight))
        if old.bias is not None:
            new.bias.copy_(old.bias.view(heads, -1, parent.head_dim).mean(1).flatten())


def linear_weight(op: nn.Module) -> Tensor:
    """The paper's `(C, C)` matrix in an operation's place; a chain's is its product."""
    if isinstance(op, FeedForward):
        return op.down_proj.weight @ op.up_proj.weight
    if isinstance(op, LinearMap):
        first, *others = op.weights
        return functools.reduce(lambda product, weight: weight @ product, others, first)
    assert isinstance(op, Attention)
    groups = op.q_proj.out_features // op.v_proj.out_features
    v = op.v_proj.weight.view(op.num_key_value_heads, 1, op.head_dim, -1)
    v = v.expand(-1, groups, -1, -1).reshape(op.q_proj.out_features, -1)
    return op.o_proj.weight @ v


def _keep_channels(parent: FeedForward, child: FeedForward, importance: Tensor | None) -> None:
    if importance is None:
        importance = parent.down_proj.weight.norm(dim=0)
    kept = importance.topk(child.gate_proj.out_features).indices.sort().values
    child.down_proj.weight.copy_(parent.down_proj.weight[:, kept])
    for old, new in ((parent.gate_proj, child.gate_proj), (parent.up_proj, child.up_proj)):
        new.weight.copy_(old.weight[kept])
        if old.bias is not None:
            new.bias.copy_(old.bias[kept])
    if parent.down_proj.bias is not None:
        child.down_proj.bias.copy_(parent.down_proj.bias)


@torch.no_grad()
def iterative_importance(
    parent: Transformer, batches: Sequence[Batch], layers: Collection[int]
) -> dict[int, Tensor]:
    """Ranks `(F,)` of the channels of every SwiGLU among `layers`, the one removed last highest.

    How far a layer's output moves without a channel, which is channel i of the input of
    `down_proj`, x_i, times its column W_i (Puzzle App. A):

        independent    C_i = mean |x_i| · ‖W_i‖                          each channel alone
        iterative      c_i = mean ‖s + x_i W_i‖,   s = Y_full - Y_now    each beside those gone
                           = mean √(‖s‖² + 2 x_i (s·W_i) + x_i² ‖W_i‖²)

    The iterative score takes the least of them out in rounds and ranks channels by when they went,
    so two that make up for one another are not both dispensable (ModelOpt). Memory: a few `(N, C)`
    of all calibration tokens N, never `(N, F)`.
    """
    found: dict[int, Tensor] = {}
    walks = [walk(parent, batch, max(layers, default=-1) + 1) for batch in batches]
    for number, at in enumerate(zip(*walks, strict=True)):
        ffn = at[0][0].block.ffn
        if number in layers and isinstance(ffn.variant, SwiGLU):
            pairs = zip(at, batches, strict=True)
            found[number] = removal_order(
                ffn, torch.cat([layer.middle[b.segments >= 0] for (layer, _), b in pairs])
            )
    return found


@torch.no_grad()
def removal_order(ffn: Subblock, x: Tensor, rounds: int = ROUNDS) -> Tensor:
    """`(F,)`: place of each channel in the order of removal, 0 the first to go, on x `(N, C)`, what
    enters the subblock."""
    weight = feed_forward(ffn).down_proj.weight
    normed, gone = ffn.norm(x), torch.zeros_like(x)  # gone is s: what the channels removed gave
    left = torch.arange(weight.shape[1], device=x.device)
    taken, order = left[:0], []
    for stay in schedule(len(left), rounds):
        harm = torch.zeros(len(left), dtype=dist.widest_float(x.device), device=x.device)
        for part in chunks(x, weight.shape[1]):
            inner = channels(ffn, normed[part], torch.cat((taken, left)))
            lost, inner = inner.split([len(taken), len(left)], dim=1)
            gone[part] += lost @ weight[:, taken].t()
            # Σ over tokens of ‖s + x_i W_i‖, with x `(n, F)`, s `(n, C)` and W `(C, F)`.
            there, own = gone[part], weight[:, left]
            square = (there @ own).mul_(2).mul_(inner).add_(there.square().sum(-1, keepdim=True))
            square.addcmul_(inner.square(), own.square().sum(0))
            harm += square.clamp_min_(0).sqrt_().sum(0).to(harm.dtype)
        least = harm.argsort(stable=True)
        taken, left = left[least[: len(left) - stay]], left[least[len(left) - stay :].sort().values]
        order.append(taken)
    rank = torch.empty(weight.shape[1], device=x.device)
    rank[torch.cat(order)] = torch.arange(len(rank), dtype=rank.dtype, device=x.device)
    return rank


def schedule(width: int, rounds: int) -> list[int]:
    """How many channels are left after each round: width·(1 - r/rounds)², the most go first, while
    channels hardly depend on one another."""
    left = [round(width * (1 - r / rounds) ** 2) for r in range(1, rounds + 1)]
    return [n for n, before in zip(left, [width, *left], strict=False) if n < before]


def channels(ffn: Subblock, normed: Tensor, which: Tensor | slice = slice(None)) -> Tensor:
    """Channels of the input of `down_proj`, `(…, F)` or as many as `which`, of the normed input."""
    op = feed_forward(ffn)
    gate, up = (
        F.linear(normed, p.weight[which], None if p.bias is None else p.bias[which])
        for p in (op.gate_proj, op.up_proj)
    )
    return F.silu(gate) * up


def feed_forward(ffn: Subblock) -> FeedForward:
    assert isinstance(ffn.op, FeedForward)
    return ffn.op
