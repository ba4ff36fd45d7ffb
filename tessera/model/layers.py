"""The operations inside a subblock, and `attend`, the only place that knows attention kernels.

Shape letters, here and everywhere: B batch, T tokens, C hidden_size, H query heads, K key/value
heads, D head_dim, F intermediate_size, V vocab_size, L layers.

RoPE is rotate-half, Hugging Face's convention.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from tessera.model.config import GQA, Chain, ModelConfig, NoOp, SwiGLU, Variant
from tessera.model.context import Context
from tessera.model.cpu import Projection, gated_down, linear, rms_norm
from tessera.model.sequence import summed_gradient


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last dimension.

    mesh: of the processes that share the weight and norm other tokens or heads each.
    """

    mesh: DeviceMesh | None = None

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.mesh is None else summed_gradient(self.weight, self.mesh)
        return rms_norm(x, weight, self.eps)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Inverse frequencies `(D/2,)`, stretched as `rope_scaling` says.

    `llama3`: those of wavelengths beyond the original context are divided by `factor`, of short
    ones kept, between them interpolated.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    inverse = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return inverse
    if scaling.rope_type == "linear":
        return inverse / scaling.factor
    span = scaling.original_max_position_embeddings * inverse / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((span - low) / (high - low)).clamp(0, 1)
    return inverse * (keep + (1 - keep) / scaling.factor)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` `(…, heads, D)` rotated by its positions' angles, in float32 and back in x's dtype."""
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos + rotated * sin).type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
    """Causal attention inside each document. q `(B,T,H,D)`, k and v `(B,T,K,D)` -> `(B,T,H,D)`.

    Packed rows are cut into their documents, which are grouped by length, so the work grows with
    the documents' squared lengths. A prefix that documents share is read by all of them.
    """
    if context.simple:
        return _sdpa(q, k, v, context.sliding_mask(q.shape[1]))
    plan = context.documents
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    parts = []
    for group, mask in zip(plan.groups, context.masks, strict=True):
        index = group.index  # (N, T_n): rows are documents, padded at the end
        q, k, v = (x[index.flatten()].unflatten(0, index.shape) for x in flat)
        if group.prefix is not None:
            there = group.prefix
            before = (x[there.flatten()].unflatten(0, there.shape) for x in flat[1:])
            k, v = (torch.cat(pair, 1) for pair in zip(before, (k, v), strict=True))
        parts.append(_sdpa(q, k, v, mask).flatten(0, 1))
    return torch.cat(parts)[plan.inverse].unflatten(0, context.positions.shape)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query attention with RoPE. x `(B,T,C)` -> `(B,T,C)`."""

    def __init__(self, config: ModelConfig, variant: GQA) -> None:
        super().__init__()
        hidden, dim = config.hidden_size, config.head_dim
        self.head_dim = dim
        self.num_key_value_heads = variant.num_key_value_heads
        q, kv = config.num_attention_heads * dim, variant.num_key_value_heads * dim
        self.q_proj = Projection(hidden, q, bias=config.qkv_bias)
        self.k_proj = Projection(hidden, kv, bias=config.qkv_bias)
        self.v_proj = Projection(hidden, kv, bias=config.qkv_bias)
        self.o_proj = Projection(q, hidden, bias=config.o_bias)
        if config.qk_norm:  # Qwen3: normalise every head before RoPE
            self.q_norm = RMSNorm(dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(dim, config.rms_norm_eps)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = context.rope
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        return self.o_proj(attend(q, k, v, context).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU. x `(B,T,C)` -> `(B,T,C)`."""

    def __init__(self, config: ModelConfig, variant: SwiGLU) -> None:
        super().__init__()
        hidden, width, bias = config.hidden_size, variant.intermediate_size, config.mlp_bias
        self.gate_proj = Projection(hidden, width, bias=bias)
        self.up_proj = Projection(hidden, width, bias=bias)
        self.down_proj = Projection(width, hidden, bias=bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return gated_down(self.gate_proj(x), self.up_proj(x), self.down_proj)


class LinearMap(nn.Module):
    """A chain of matrices: `weight` (DeciLM's name), `weight_1`, …. x `(B,T,C)` -> `(B,T,C)`."""

    def __init__(self, config: ModelConfig, variant: Chain) -> None:
        super().__init__()
        for number, shape in enumerate(variant.shapes(config.hidden_size)):
            weight = nn.Parameter(torch.empty(shape))
            nn.init.normal_(weight, std=shape[1] ** -0.5)
            self.register_parameter(f"weight_{number}" if number else "weight", weight)

    @property
    def weights(self) -> list[nn.Parameter]:
        """The matrices, the first applied first."""
        return list(self.parameters())

    def forward(self, x: Tensor, context: Context) -> Tensor:
        for weight in self.weights:
            x = linear(x, weight)
        return x


class Subblock(nn.Module):
    """Norm and operation of one word; returns the residual delta `(B,T,C)`, or 0 for `noop`."""

    op: nn.Module

    def __init__(self, config: ModelConfig, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        if isinstance(variant, NoOp):
            return
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        match variant:
            case GQA():
                self.op = Attention(config, variant)
            case SwiGLU():
                self.op = FeedForward(config, variant)
            case Chain():
                self.op = LinearMap(config, variant)

    def forward(self, x: Tensor, context: Context) -> Tensor | float:
        if isinstance(self.variant, NoOp):
            return 0.0
        return self.op(self.norm(x), context)
