"""The same function in shapes the engines have words and kernels for, by adding zeros.

FFN: a channel with zero gate, up and down adds `silu(0) * 0`. Biases: a zero one. Heads: the
rotary frequencies of `D` are every m-th of those of `m*D`, so dimension `i` of a head moves to
`m*i` in its half, zeros between; q grows by `sqrt(m)` because engines divide scores by the root
of the padded size. All three leave the outputs as they were, up to rounding.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.export.engines import padded_head_dim, spans
from tessera.model.config import ModelConfig, SwiGLU
from tessera.model.transformer import Transformer, holding

MULTIPLE = 256  # the DeciLM dialect's widths


def padded_width(width: int) -> int:
    """The next FFN width the DeciLM dialect can say."""
    return -(-width // MULTIPLE) * MULTIPLE


def expressible(config: ModelConfig) -> ModelConfig:
    """The nearest config the dialect can say: widths, head size and biases padded."""
    blocks = tuple(
        block.with_("ffn", SwiGLU(padded_width(block.ffn.intermediate_size)))
        if isinstance(block.ffn, SwiGLU)
        else block
        for block in config.blocks
    )
    bias = config.qkv_bias or config.o_bias
    head_dim = padded_head_dim(config.head_dim)
    return replace(config, blocks=blocks, head_dim=head_dim, qkv_bias=bias, o_bias=bias)


def notes(config: ModelConfig) -> list[str]:
    """What `expressible` adds, in words, for the reader of the model card."""
    wide = expressible(config)
    lines = []
    if wide.head_dim != config.head_dim:
        lines.append(
            f"head_dim {config.head_dim} padded with zeros to {wide.head_dim}, a size that vLLM's "
            "CPU kernels know; the KV cache grows with it"
        )
    padded: dict[str, list[int]] = {}
    for layer, (old, new) in enumerate(zip(config.blocks, wide.blocks, strict=True)):
        if old != new:
            padded.setdefault(f"{old.words[1]} padded with zeros to {new.words[1]}", []).append(
                layer
            )
    lines += [f"{what} in {spans(layers)}" for what, layers in padded.items()]
    if (wide.qkv_bias, wide.o_bias) != (config.qkv_bias, config.o_bias):
        lines.append("attention biases completed with zeros: the dialect has one key for all four")
    return lines


def widen(module: Transformer) -> Transformer:
    """The same function as `module`, in the shapes of `expressible(module.config)`.

    Tensors that need no padding are shared with `module`, not copied.
    """
    config = expressible(module.config)
    state = {k: _spread(k, v, module.config, config) for k, v in module.state_dict().items()}
    wide = holding(config, lambda key, shape: _pad(state.get(key), shape, module.head))
    return wide.requires_grad_(False)


def _spread(key: str, value: Tensor, old: ModelConfig, new: ModelConfig) -> Tensor:
    """Heads of an attention tensor moved to their places in the padded size."""
    part = key.rpartition(".op.")[2].removesuffix(".weight").removesuffix(".bias")
    if old.head_dim == new.head_dim or part not in ("q_proj", "k_proj", "v_proj", "o_proj"):
        return value
    if part == "o_proj":  # its input are the heads, its bias knows none
        return value if key.endswith("bias") else _spread_rows(value.T, old, new).T.contiguous()
    scale = (new.head_dim / old.head_dim) ** 0.5 if part == "q_proj" else 1.0
    return _spread_rows(value, old, new) * scale


def _spread_rows(value: Tensor, old: ModelConfig, new: ModelConfig) -> Tensor:
    """`(heads*D, …)` -> `(heads*m*D, …)`: dimension i of a half at m*i, zeros between."""
    times = new.head_dim // old.head_dim
    halves = value.unflatten(0, (-1, old.head_dim // 2))
    spread = halves.new_zeros(halves.shape[0], new.head_dim // 2, *halves.shape[2:])
    spread[:, ::times] = halves
    return spread.flatten(0, 1)


def _pad(value: Tensor | None, shape: torch.Size, like: Tensor) -> Tensor:
    """`value` with zeros at the end of every dimension up to `shape`; all zeros for None."""
    if value is None:
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    if value.shape == shape:
        return value
    missing = [new - old for new, old in zip(shape, value.shape, strict=True)]
    return F.pad(value, [n for size in reversed(missing) for n in (0, size)])
