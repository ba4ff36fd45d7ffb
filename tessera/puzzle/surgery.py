"""What BLD begins with: statistics of the parent, and a variant's first weights (Puzzle App. A).

narrower FFN   keep the channels of the largest importance
fewer KV heads mean of the K and V projections of the heads that merge
linear FFN     W_down · W_up                (the gate is left out)
linear attn    W_o · W_v, V rows repeated over the query groups (each token attends to itself)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera import dist
from tessera.data.batch import Batch
from tessera.model.config import GQA, KINDS, Chain, ModelConfig, NoOp, SwiGLU, Variant, name
from tessera.model.context import Context
from tessera.model.cpu import multiply
from tessera.model.layers import Attention, FeedForward, LinearMap, Subblock
from tessera.model.parallel import gathered
from tessera.model.transformer import Block, Transformer
from tessera.puzzle.ranges import Held

Importance = Literal["iterative", "independent"]
ROUNDS = 16  # in which a layer's channels are removed


class Layer(NamedTuple):
    """A layer on a batch: the residual stream `(B,T,C)` before, within and after its block, and
    what each kind of subblock adds to it."""

    block: Block
    context: Context
    x: Tensor
    middle: Tensor
    out: Tensor
    added: dict[str, Tensor]

    def replaced(self, kind: str, unit: nn.Module) -> Tensor:
        if kind == "block":
            return unit(self.x, self.context)
        if kind == "attention":
            middle = self.x + unit(self.x, self.context)
            return middle + self.block.ffn(middle, self.context)
        return self.middle + unit(self.middle, self.context)

    def against(self, kind: str, unit: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """What a unit makes the block give, and what the parent's gives: tensors whose sums differ
        as the outputs do. The stream is in neither where it is common, for its rounding is larger
        than the difference."""
        if kind == "block":
            return [unit(self.x, self.context)], [self.out]
        if kind == "attention":
            attention = unit(self.x, self.context)
            ffn = self.block.ffn(self.x + attention, self.context)
            return [attention, ffn], [*self.added.values()]
        return [unit(self.middle, self.context)], [self.added["ffn"]]


@torch.no_grad()
def walk(module: Transformer, batch: Batch, held: Held | None = None) -> Iterator[Layer]:
    """Each layer (of `held`, else of all); its sharded parameters are whole until the next one is
    asked for.

    Where another process waits for what leaves the last of them, all run first, and it is sent.
    """
    held = held or Held(range(len(module.blocks)))
    if not held.layers:
        return
    context = module.prepare(Context(batch.positions, batch.segments))
    if held.before is None:
        with gathered(module):
            x = module.embed_tokens(batch.tokens)
    else:
        shape = *batch.tokens.shape, module.config.hidden_size
        empty = torch.empty(shape, dtype=module.head.dtype, device=batch.tokens.device)
        x = dist.receive(empty, held.before)
    layers = _run([module.blocks[layer] for layer in held.layers], context, x)
    if held.after is None:
        yield from layers
        return
    kept = list(layers)
    sent = dist.send(kept[-1].out, held.after)
    while kept:
        yield kept.pop(0)
    sent.wait()


def _run(blocks: Sequence[Block], context: Context, x: Tensor) -> Iterator[Layer]:
    for block in blocks:
        with gathered(block):
            attention = block.attention(x, context)
            middle = x + attention
            ffn = block.ffn(middle, context)
            out = middle + ffn
            yield Layer(block, context, x, middle, out, {"attention": attention, "ffn": ffn})
        x = out


@dataclass(frozen=True)
class ParentStatistics:
    """What calibration batches say about each of the parent's layers.

    channel_importance: `(F,)` a layer, larger is kept first, None where the FFN is no SwiGLU.
    linear_scale: per kind, the factor that brings a linear map of the paper's weights closest
        (least squares) to the subblock's own output; without it few hundred steps are too few.
    output_scale: mean over tokens of ‖block output‖².
    block_influence: 1 - cos(block input, block output), mean over tokens (ShortGPT's score).

    Of layers that another process holds there are numbers and no `channel_importance`.
    """

    channel_importance: list[Tensor | None]
    linear_scale: dict[str, list[float]]
    output_scale: list[float]
    block_influence: list[float]


class _Found(NamedTuple):
    """The same of one layer."""

    importance: Tensor | None
    linear: dict[str, float]
    output: float
    influence: float


@torch.no_grad()
def collect_statistics(
    parent: Transformer,
    batches: Sequence[Batch],
    importance: Importance = "independent",
    layers: Collection[int] | None = None,
    held: Held | None = None,
    advance: Callable[[], None] = lambda: None,
) -> ParentStatistics:
    """One pass of the parent over calibration batches, in step: a layer has seen all of them before
    the next one begins. `iterative` importance is for the FFNs of `layers` (None: all) only.

    held: the layers of this process; every process of the job calls this. advance: is called after
    each of them.
    """
    held = held or Held(range(len(parent.blocks)))
    walks = [walk(parent, batch, held) for batch in batches]
    real = [(batch.segments >= 0).float() for batch in batches]
    found: dict[int, _Found] = {}
    for at, layer in zip(zip(*walks, strict=True), held.layers, strict=True):
        iterative = importance == "iterative" and (layers is None or layer in layers)
        found[layer] = _statistics_of(at, real, iterative)
        advance()
    numbers = {layer: one._replace(importance=None) for layer, one in found.items()}
    known = {layer: one for part in dist.gather(numbers) for layer, one in part.items()} | found
    every = [known[layer] for layer in sorted(known)]
    return ParentStatistics(
        [one.importance for one in every],
        {kind: [one.linear[kind] for one in every] for kind in KINDS},
        [one.output for one in every],
        [one.influence for one in every],
    )


def _statistics_of(at: Sequence[Layer], real: Sequence[Tensor], iterative: bool) -> _Found:
    """at: the layer on each batch; real: 1.0 where a batch has a token."""
    tokens = sum(float(one.sum()) for one in real)
    output = influence = 0.0
    for layer, mask in zip(at, real, strict=True):
        x, out = layer.x.float(), layer.out.float()
        output += float((out.square().sum(-1) * mask).sum())
        influence += float(((1 - F.cosine_similarity(x, out, dim=-1)) * mask).sum())
    linear = {}
    for kind, inputs in (("attention", [o.x for o in at]), ("ffn", [o.middle for o in at])):
        subblock = getattr(at[0].block, kind)
        linear[kind] = _linear_scale(subblock, inputs, [o.added[kind] for o in at], real)
    ffn, middles = at[0].block.ffn, [layer.middle for layer in at]
    if not isinstance(ffn.variant, SwiGLU):
        importance = None
    elif iterative:
        pairs = zip(middles, real, strict=True)
        importance = removal_order(ffn, torch.cat([x[mask > 0] for x, mask in pairs]))
    else:
        activity = [
            torch.einsum("btf,bt->f", channels(ffn, ffn.norm(x)).float().abs(), mask)
            for x, mask in zip(middles, real, strict=True)
        ]
        norms = feed_forward(ffn).down_proj.weight.float().norm(dim=0)
        importance = functools.reduce(torch.add, [one * norms for one in activity]) / tokens
    return _Found(importance, linear, output / tokens, influence / tokens)


def _linear_scale(
    subblock: Subblock, inputs: Sequence[Tensor], outputs: Sequence[Tensor], real: Sequence[Tensor]
) -> float:
    """Σxy / Σx² of what a linear map gives and the subblock's own output."""
    if not isinstance(subblock.variant, GQA | SwiGLU):
        return 1.0
    weight, xy, xx = linear_weight(subblock.op), 0.0, 0.0
    for x, own, mask in zip(inputs, outputs, real, strict=True):
        guess = F.linear(subblock.norm(x).float(), weight)
        xy += float(((guess * own.float()).sum(-1) * mask).sum())
        xx += float((guess.square().sum(-1) * mask).sum())
    return xy / xx if xx else 1.0


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
    """The paper's `(C, C)` matrix in an operation's place, in float32; a chain's is its product."""
    if isinstance(op, FeedForward):
        return op.down_proj.weight.float() @ op.up_proj.weight.float()
    if isinstance(op, LinearMap):
        first, *others = (weight.float() for weight in op.weights)
        return functools.reduce(lambda product, weight: weight @ product, others, first)
    assert isinstance(op, Attention)
    groups = op.q_proj.out_features // op.v_proj.out_features
    v = op.v_proj.weight.float().view(op.num_key_value_heads, 1, op.head_dim, -1)
    v = v.expand(-1, groups, -1, -1).reshape(op.q_proj.out_features, -1)
    return op.o_proj.weight.float() @ v


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
def removal_order(ffn: Subblock, x: Tensor, rounds: int = ROUNDS) -> Tensor:
    """Ranks `(F,)` of the channels of a SwiGLU, the one removed last highest, on x `(N, C)`, what
    enters the subblock.

    How far a layer's output moves without a channel, which is channel i of the input of
    `down_proj`, x_i, times its column W_i (Puzzle App. A):

        independent    C_i = mean |x_i| · ‖W_i‖                          each channel alone
        iterative      c_i = mean ‖s + x_i W_i‖,   s = Y_full - Y_now    each beside those gone
                           = mean √(‖s‖² + x_i (2 s·W_i + x_i ‖W_i‖²))

    The iterative score takes the least of them out in rounds and ranks channels by when they went,
    so two that make up for one another are not both dispensable (ModelOpt). Channels are computed
    once: a round adds x_j (W_j·W_i) of those taken to the s·W_i of those left. Memory: a few
    `(F, N)` of one layer.
    """
    columns = feed_forward(ffn).down_proj.weight.float().t().contiguous()  # (F, C)
    inner = channels(ffn, ffn.norm(x)).float().t().contiguous()  # (F, N)
    left = torch.arange(len(columns), device=x.device)
    twice = torch.zeros_like(inner)  # 2 s·W_i
    square = inner.new_zeros(inner.shape[1])  # ‖s‖²
    order = []
    for stay in schedule(len(columns), rounds):
        lengths = columns.square().sum(1, keepdim=True)
        parts = zip(*(t.split(CHANNELS) for t in (inner, twice, lengths)), strict=True)
        harm = torch.cat([_harm(square, *part) for part in parts])
        least = harm.argsort(stable=True)
        gone, kept = least[: len(left) - stay], least[len(left) - stay :].sort().values
        order.append(left[gone])
        lost, along = inner[gone], multiply(columns, columns[gone])  # W_i·W_j (left, gone)
        square += (lost * twice[gone].add_(multiply(along[gone], lost.t()))).sum(0)
        left, inner, columns = left[kept], inner[kept], columns[kept]
        twice = twice[kept].add_(multiply(along[kept], lost.t()), alpha=2)
    return torch.cat(order).argsort().float()


CHANNELS = 64  # weighed at once, so that what is made on the way stays in a CPU's cache


def _harm(square: Tensor, inner: Tensor, twice: Tensor, lengths: Tensor) -> Tensor:
    """Σ over tokens of ‖s + x_i W_i‖, of some channels."""
    found = torch.addcmul(twice, inner, lengths)
    return torch.addcmul(square, inner, found).clamp_min_(0).sqrt_().sum(1)


def schedule(width: int, rounds: int) -> list[int]:
    """How many channels are left after each round: width·(1 - r/rounds)², the most go first, while
    channels hardly depend on one another."""
    left = [round(width * (1 - r / rounds) ** 2) for r in range(1, rounds + 1)]
    return [n for n, before in zip(left, [width, *left], strict=False) if n < before]


def channels(ffn: Subblock, normed: Tensor) -> Tensor:
    """The input `(…, F)` of `down_proj`, of the normed input."""
    op = feed_forward(ffn)
    return F.silu(op.gate_proj(normed)) * op.up_proj(normed)


def feed_forward(ffn: Subblock) -> FeedForward:
    assert isinstance(ffn.op, FeedForward)
    return ffn.op
