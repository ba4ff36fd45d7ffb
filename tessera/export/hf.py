"""A stock Hugging Face directory: Llama, Mistral, Qwen2 or Qwen3, all layers equal.

Every engine that reads such directories serves it; no code travels with the weights.

A plain Llama with the same outputs as a mixture of layers: no faster, and anything opens it.

    FFN of fewer channels   zeros: silu(0) * 0 adds nothing      FFN absent   zeros all over
    fewer KV heads          each stands once for every head that it served
    attention absent        any keys and queries, a zero output projection

So any evaluator, trainer or quantiser of homogeneous models works on a child. What has no such form
(a linear subblock) is refused. Speed and memory are the parent's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tessera.export.errors import ExportError
from tessera.model.checkpoint import write_model
from tessera.model.config import GQA, BlockConfig, ModelConfig, SwiGLU
from tessera.model.families import FAMILIES, config_dict
from tessera.model.transformer import Transformer, holding


def write_plain(module: Transformer, directory: Path, tokenizer_from: Path | None = None) -> None:
    """Write a homogeneous model and its tokenizer into `directory`, which exists.

    Raises ExportError for properties that no stock family has together.
    """
    if config_dict(module.config)["model_type"] not in FAMILIES:
        raise ExportError(
            f"no stock family has all the properties of this {module.config.family} model (biases, "
            f"QK norm, sliding window); families are {', '.join(FAMILIES)}. Use --format decilm"
        )
    write_model(module, directory, tokenizer_from=tokenizer_from)


def uniform_shape(config: ModelConfig) -> tuple[GQA, SwiGLU]:
    """The attention and the FFN that hold every layer's: most KV heads, greatest width."""
    heads = [b.attention.num_key_value_heads for b in config.blocks if isinstance(b.attention, GQA)]
    widths = [b.ffn.intermediate_size for b in config.blocks if isinstance(b.ffn, SwiGLU)]
    return GQA(max(heads, default=1)), SwiGLU(max(widths, default=1))


def unify(module: Transformer) -> Transformer:
    """The same function with equal layers; only what is padded is copied."""
    config = module.config
    attention, ffn = uniform_shape(config)
    blocks = (BlockConfig(attention, ffn),) * config.num_hidden_layers
    own = module.state_dict()
    wide = holding(
        replace(config, blocks=blocks),
        lambda key, shape: _padded(key, own, shape, config, attention),
    )
    return wide.requires_grad_(False)


def _padded(
    key: str, own: dict[str, Tensor], shape: torch.Size, config: ModelConfig, attention: GQA
) -> Tensor:
    like = own["embed_tokens.weight"]
    if key not in own:  # of an absent subblock: its norm may be anything, its output is zero
        filled = torch.ones if ".norm." in key else torch.zeros
        return filled(shape, dtype=like.dtype, device=like.device)
    value = own[key]
    if ".k_proj." in key or ".v_proj." in key:
        layer = int(key.split(".")[1])
        return _repeated(value, config.blocks[layer].attention, attention, config.head_dim)
    if value.shape == shape:
        return value
    wide = value.new_zeros(shape)
    wide[tuple(slice(size) for size in value.shape)] = value
    return wide


def _repeated(value: Tensor, old: object, new: GQA, head_dim: int) -> Tensor:
    """KV head j of K' is head j·K/K' of K: query head h reads the same numbers as before."""
    assert isinstance(old, GQA)
    times = new.num_key_value_heads // old.num_key_value_heads
    heads = value.unflatten(0, (old.num_key_value_heads, head_dim))
    return heads.repeat_interleave(times, 0).flatten(0, 1).contiguous()


def write_padded(module: Transformer, directory: Path, tokenizer_from: Path | None = None) -> None:
    """Write the uniform model into `directory`, which exists."""
    write_plain(unify(module), directory, tokenizer_from=tokenizer_from)


def notes(config: ModelConfig) -> list[str]:
    """What the reader of the model card must know."""
    block = BlockConfig(*uniform_shape(config))
    wide = replace(config, blocks=(block,) * config.num_hidden_layers)
    return [
        f"every layer padded to {' '.join(block.words)}: {wide.num_params():,} parameters instead "
        f"of {config.num_params():,}, the same outputs, none of the speed"
    ]
