"""The operations inside a subblock.

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
from torch.func import functional_call

from tessera.model.attention import attend
from tessera.model.config import GQA, Chain, ModelConfig, NoOp, SwiGLU, Variant
from tessera.model.context import Context
from tessera.model.cpu import Projection, by_tiles, gated_down, linear, rms_norm, rope
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
    if by_tiles(x):
        return rope(x, cos, sin)
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos + rotated * sin).type_as(x)


class Attention(nn.Module):
    """Grouped-query attention with RoPE. x `(B,T,C)` -> `(B,T,C)`."""

    entered = "q_proj.weight", "k_proj.weight", "v_proj.weight"

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

    entered = "gate_proj.weight", "up_proj.weight"

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

    entered = ("weight",)

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
        if torch.is_grad_enabled() and self.norm.weight.requires_grad and not x.requires_grad:
            return self._of_constant(x, context)
        return self.op(self.norm(x), context)

    def _of_constant(self, x: Tensor, context: Context) -> Tensor:
        """The same, where nothing before it learns: the norm's weight multiplies the matrices that
        x enters and takes its gradient from theirs. The gradient of what enters would be two of the
        nine products of an FFN."""
        weights = {key: self.op.get_parameter(key) * self.norm.weight for key in self.op.entered}  # type: ignore[union-attr]
        normed = F.rms_norm(x, (x.shape[-1],), eps=self.norm.eps)
        return functional_call(self.op, weights, (normed, context))
