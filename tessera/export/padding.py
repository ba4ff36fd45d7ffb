"""The same function in shapes that engines have words and kernels for, by adding zeros.

FFN: a channel with zero gate, up and down adds `silu(0) * 0`. Biases: a zero one. Head size: the
rotary frequencies of `D` are every m-th of those of `m*D`, so dimension `i` of a head moves to
`m*i` in its half, zeros between; q grows by `sqrt(m)` because engines divide scores by the root
of the padded size. KV heads: each stands once for every head that it served. An absent subblock:
a zero output projection. All leave the outputs as they were, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.export.engines import padded_head_dim, spans
from tessera.model.config import GQA, BlockConfig, ModelConfig, SwiGLU
from tessera.model.transformer import Transformer, holding

MULTIPLE = 256  # the DeciLM dialect's widths


def expressible(config: ModelConfig) -> ModelConfig:
    """The nearest config the DeciLM dialect can say: widths, head size and biases padded."""
    blocks = tuple(
        block.with_("ffn", SwiGLU(-(-block.ffn.intermediate_size // MULTIPLE) * MULTIPLE))
        if isinstance(block.ffn, SwiGLU)
        else block
        for block in config.blocks
    )
    bias = config.qkv_bias or config.o_bias
    head_dim = padded_head_dim(config.head_dim)
    return replace(config, blocks=blocks, head_dim=head_dim, qkv_bias=bias, o_bias=bias)


def uniform(config: ModelConfig) -> ModelConfig:
    """Equal layers that hold every layer of this config: most KV heads, greatest width."""
    heads = [b.attention.num_key_value_heads for b in config.blocks if isinstance(b.attention, GQA)]
    widths = [b.ffn.intermediate_size for b in config.blocks if isinstance(b.ffn, SwiGLU)]
    block = BlockConfig(GQA(max(heads, default=1)), SwiGLU(max(widths, default=1)))
    return replace(config, blocks=(block,) * config.num_hidden_layers)


def expressible_notes(config: ModelConfig) -> list[str]:
    """What `expressible` adds, for the reader of the model card."""
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
            what = f"{old.words[1]} padded with zeros to {new.words[1]}"
            padded.setdefault(what, []).append(layer)
    lines += [f"{what} in {spans(layers)}" for what, layers in padded.items()]
    if (wide.qkv_bias, wide.o_bias) != (config.qkv_bias, config.o_bias):
        lines.append("attention biases completed with zeros: the dialect has one key for all four")
    return lines


def uniform_notes(config: ModelConfig) -> list[str]:
    """What `uniform` costs, for the reader of the model card."""
    wide = uniform(config)
    return [
        f"every layer padded to {' '.join(wide.words[0])}: {wide.num_params():,} parameters "
        f"instead of {config.num_params():,}, the same outputs, none of the speed"
    ]


def widen(module: Transformer) -> Transformer:
    """The same function as `module`, in the shapes of `expressible(module.config)`.

    Tensors that need no padding are shared with `module`, not copied.
    """
    old, new = module.config, expressible(module.config)
    return _padded(module, new, lambda key, value: _spread_heads(key, value, old, new))


def unify(module: Transformer) -> Transformer:
    """The same function as `module`, in the equal layers of `uniform(module.config)`."""
    old, new = module.config, uniform(module.config)
    return _padded(module, new, lambda key, value: _repeat_heads(key, value, old, new))


def _padded(
    module: Transformer, config: ModelConfig, moved: Callable[[str, Tensor], Tensor]
) -> Transformer:
    """A frozen model of `config` with the moved tensors, padded with zeros at their ends."""
    state, like = module.state_dict(), module.head

    def tensor(key: str, shape: torch.Size) -> Tensor:
        if key not in state:  # a bias, or of an absent subblock, whose norm may be anything
            filled = torch.ones if ".norm." in key else torch.zeros
            return filled(shape, dtype=like.dtype, device=like.device)
        value = moved(key, state[key])
        if value.shape == shape:
            return value
        missing = [new - old for new, old in zip(shape, value.shape, strict=True)]
        return F.pad(value, [n for size in reversed(missing) for n in (0, size)])

    return holding(config, tensor).requires_grad_(False)


def _spread_heads(key: str, value: Tensor, old: ModelConfig, new: ModelConfig) -> Tensor:
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


def _repeat_heads(key: str, value: Tensor, old: ModelConfig, new: ModelConfig) -> Tensor:
    """KV head j of K' is head j·K/K' of K: query head h reads the same numbers as before."""
    if ".k_proj." not in key and ".v_proj." not in key:
        return value
    layer = int(key.split(".")[1])
    before, after = (c.blocks[layer].attention.num_key_value_heads for c in (old, new))  # type: ignore[union-attr]
    heads = value.unflatten(0, (before, old.head_dim))
    return heads.repeat_interleave(after // before, 0).flatten(0, 1).contiguous()
