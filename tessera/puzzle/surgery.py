"""A variant's first weights, taken from the parent (Puzzle App. A).

    narrower FFN   keep the channels with the largest C_i = mean|x_i| · ‖W_down[:, i]‖₂
    fewer KV heads mean of the K and V projections of the heads that merge
    linear FFN     W_down · W_up                (the gate is left out)
    linear attn    W_o · W_v, V rows repeated over the query groups (each token attends to itself)

x_i is the input of `down_proj`. The norm is the parent's, kept also in front of a linear map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.data.batch import Batch
from tessera.model.config import GQA, Linear, ModelConfig, NoOp, SwiGLU, Variant, name
from tessera.model.context import Context
from tessera.model.layers import Attention, FeedForward, LinearMap, Subblock
from tessera.model.transformer import Transformer


@dataclass(frozen=True)
class ParentStatistics:
    """What calibration batches say about each of the parent's layers.

    channel_importance: `(F,)` a layer, the C_i above, None where the FFN is no SwiGLU.
    output_scale: mean over tokens of ‖block output‖².
    block_influence: 1 - cos(block input, block output), mean over tokens (ShortGPT's score).
    """

    channel_importance: list[Tensor | None]
    output_scale: list[float]
    block_influence: list[float]


@torch.no_grad()
def collect_statistics(parent: Transformer, batches: Sequence[Batch]) -> ParentStatistics:
    """One pass of the parent over calibration batches."""
    depth = len(parent.layers)
    importance: list[Tensor | None] = [None] * depth
    scale, influence, tokens = [0.0] * depth, [0.0] * depth, 0.0
    for batch in batches:
        context = parent.prepare(Context(batch.positions, batch.segments))
        real = (batch.segments >= 0).float()
        tokens += float(real.sum())
        x = parent.embed_tokens(batch.tokens)
        for layer, block in enumerate(parent.layers):
            middle = x + block.attention(x, context)
            if isinstance(block.ffn.variant, SwiGLU):
                found = _channel_activity(block.ffn, middle, real)
                known = importance[layer]
                importance[layer] = found if known is None else known + found
            out = middle + block.ffn(middle, context)
            scale[layer] += float((out.square().sum(-1) * real).sum())
            cosine = F.cosine_similarity(x, out, dim=-1)
            influence[layer] += float(((1 - cosine) * real).sum())
            x = out
    return ParentStatistics(
        [None if c is None else c / tokens for c in importance],
        [s / tokens for s in scale],
        [i / tokens for i in influence],
    )


def _channel_activity(ffn: Subblock, x: Tensor, real: Tensor) -> Tensor:
    op = ffn.op
    assert isinstance(op, FeedForward)
    normed = ffn.norm(x)
    inner = F.silu(op.gate_proj(normed)) * op.up_proj(normed)
    activity = torch.einsum("btf,bt->f", inner.abs(), real)
    return activity * op.down_proj.weight.norm(dim=0)


@torch.no_grad()
def cut(
    parent: Subblock, config: ModelConfig, variant: Variant, importance: Tensor | None = None
) -> Subblock:
    """A subblock of `variant` whose weights come from the parent's subblock.

    `importance` `(F,)` orders the parent's FFN channels, largest kept first; without it the
    norm of down_proj's columns does.
    """
    child = Subblock(config, variant)
    if isinstance(variant, NoOp):
        return child
    child.norm.load_state_dict(parent.norm.state_dict())
    match parent.op, variant:
        case Attention(), GQA():
            _pool_kv_heads(parent.op, child.op)
        case Attention(), Linear():
            child.op.weight.copy_(linear_from_attention(parent.op))
        case FeedForward(), SwiGLU():
            _keep_channels(parent.op, child.op, importance)
        case FeedForward(), Linear():
            child.op.weight.copy_(parent.op.down_proj.weight @ parent.op.up_proj.weight)
        case LinearMap(), Linear():
            child.op.load_state_dict(parent.op.state_dict())
        case _:
            raise ValueError(f"{name(variant)} cannot be cut from {name(parent.variant)}")
    return child


def _pool_kv_heads(parent: Attention, child: Attention) -> None:
    child.q_proj.load_state_dict(parent.q_proj.state_dict())
    child.o_proj.load_state_dict(parent.o_proj.state_dict())
    if hasattr(parent, "q_norm"):
        child.q_norm.load_state_dict(parent.q_norm.state_dict())
        child.k_norm.load_state_dict(parent.k_norm.state_dict())
    heads = child.num_key_value_heads
    for old, new in ((parent.k_proj, child.k_proj), (parent.v_proj, child.v_proj)):
        pooled = old.weight.view(heads, -1, parent.head_dim, old.in_features).mean(1)
        new.weight.copy_(pooled.reshape_as(new.weight))
        if old.bias is not None:
            new.bias.copy_(old.bias.view(heads, -1, parent.head_dim).mean(1).flatten())


def linear_from_attention(op: Attention) -> Tensor:
    """`(C, C)`: W_o · W_v with V's rows repeated for each query head of its group."""
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
