"""The same function in shapes that engines have words and kernels for, by adding zeros.

Head size: the rotary frequencies of `D` are every m-th of those of `m*D`, so dimension `i` of a
head moves to `m*i` in its half; q grows by `sqrt(m)` because engines divide scores by the root of
the padded size. KV heads: each stands once for every head that it served. An absent subblock: a
zero output projection. All leave the outputs as they were, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.export.engines import padded_head_dim
from tessera.model.checkpoint import Checkpoint
from tessera.model.config import GQA, BlockConfig, ModelConfig, SwiGLU
from tessera.model.tensors import LazyTensor
from tessera.model.transformer import Transformer
from tessera.table import spans

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
    notes = []
    if wide.head_dim != config.head_dim:
        notes.append(
            f"head_dim {config.head_dim} padded with zeros to {wide.head_dim}, a size that vLLM's "
            "CPU kernels know; the KV cache grows with it"
        )
    padded: dict[str, list[int]] = {}
    for layer, (old, new) in enumerate(zip(config.words, wide.words, strict=True)):
        if old != new:
            padded.setdefault(f"{old[1]} padded with zeros to {new[1]}", []).append(layer)
    notes += [f"{what} in {spans(layers)}" for what, layers in padded.items()]
    if (wide.qkv_bias, wide.o_bias) != (config.qkv_bias, config.o_bias):
        notes.append("attention biases completed with zeros: the dialect has one key for all four")
    return notes


def widen(model: Checkpoint) -> Checkpoint:
    """The same function as `model`, in the shapes of `expressible(model.config)`."""
    return _padded(model, expressible(model.config), _spread_heads)


def unify(model: Checkpoint) -> Checkpoint:
    """The same function as `model`, in the equal layers of `uniform(model.config)`."""
    return _padded(model, uniform(model.config), _repeat_heads)


def _padded(
    model: Checkpoint,
    config: ModelConfig,
    moved: Callable[[str, Tensor, ModelConfig, ModelConfig], Tensor],
) -> Checkpoint:
    """A model of `config` with the moved tensors, padded with zeros at their ends."""

    def lazy(key: str, shape: tuple[int, ...]) -> LazyTensor:
        if key not in model.tensors:  # a bias, or of an absent subblock, whose norm may be anything
            filled = torch.ones if ".norm." in key else torch.zeros
            return LazyTensor(shape, model.dtype, lambda: filled(shape, dtype=model.dtype))
        old = model.tensors[key]

        def read() -> Tensor:
            value = moved(key, old.read(), model.config, config)
            missing = [new - size for new, size in zip(shape, value.shape, strict=True)]
            return F.pad(value, [n for size in reversed(missing) for n in (0, size)])

        return old._replace(shape=shape, read=read)

    with torch.device("meta"):
        like = Transformer(config).state_dict()
    return Checkpoint(config, {key: lazy(key, tuple(one.shape)) for key, one in like.items()})


def _spread_heads(key: str, value: Tensor, old: ModelConfig, new: ModelConfig) -> Tensor:
    """Heads of an attention tensor moved to their places in the padded size."""
    times = new.head_dim // old.head_dim
    part = key.rpartition(".op.")[2].removesuffix(".weight").removesuffix(".bias")
    if times == 1 or part not in ("q_proj", "k_proj", "v_proj", "o_proj"):
        return value
    if part == "o_proj" and key.endswith("bias"):
        return value
    rows = value.T if part == "o_proj" else value  # its input are the heads
    halves = rows.unflatten(0, (-1, old.head_dim // 2))
    spread = halves.new_zeros(halves.shape[0], new.head_dim // 2, *halves.shape[2:])
    spread[:, ::times] = halves  # dimension i of a half at m*i, zeros between
    found = spread.flatten(0, 1)
    if part == "o_proj":
        return found.T.contiguous()
    return (found.float() * times**0.5).to(found.dtype) if part == "q_proj" else found


def _repeat_heads(key: str, value: Tensor, old: ModelConfig, new: ModelConfig) -> Tensor:
    """KV head j of K' is head j·K/K' of K: query head h reads the same numbers as before."""
    if ".k_proj." not in key and ".v_proj." not in key:
        return value
    layer = int(key.split(".")[1])
    before, after = (c.blocks[layer].attention.num_key_value_heads for c in (old, new))  # type: ignore[union-attr]
    heads = value.unflatten(0, (before, old.head_dim))
    return heads.repeat_interleave(after // before, 0).flatten(0, 1).contiguous()
