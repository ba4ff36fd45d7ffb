"""A GGUF file for llama.cpp: `llama` for equal layers, `deci` where they differ. Float32.

`deci` has per-layer arrays of query heads, KV heads and FFN widths; 0 heads mean no attention,
0 KV heads beside query heads one matrix in its place, width 0 no FFN. llama.cpp rotates
neighbouring pairs where Hugging Face rotates halves, so the rows of q and k are reordered:

    (heads, 2, D/2, C) -> (heads, D/2, 2, C)

Llama 3.x's long-context stretch is the tensor `rope_freqs.weight`, a divisor a frequency.
`read` is the inverse of `write` for the tensors: the parity check runs on the file's numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tessera.export.errors import ExportError
from tessera.export.gguf_vocab import Vocabulary
from tessera.model.config import GQA, Linear, ModelConfig, SwiGLU
from tessera.model.layers import Subblock, rope_frequencies
from tessera.model.transformer import Transformer

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter

FILE_NAME = "model.gguf"


def write(module: Transformer, path: Path, vocabulary: Vocabulary, name: str) -> None:
    """Write the whole model and its tokenizer as one GGUF file."""
    config = module.config
    writer = _library().GGUFWriter(path, "llama" if config.homogeneous else "deci")
    add_metadata(writer, config, name)
    vocabulary.add_to(writer, config.vocab_size)
    for key, tensor in tensors(module):
        writer.add_tensor(key, tensor.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_metadata(writer: GGUFWriter, config: ModelConfig, name: str) -> None:
    """The keys that describe the architecture."""
    writer.add_name(name)
    writer.add_file_type(0)  # every tensor in float32
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "linear":
        writer.add_rope_scaling_type(_library().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    heads, kv_heads, widths = layer_sizes(config)
    equal = config.homogeneous
    writer.add_head_count(heads[0] if equal else heads)
    writer.add_head_count_kv(kv_heads[0] if equal else kv_heads)
    writer.add_feed_forward_length(widths[0] if equal else widths)


def layer_sizes(config: ModelConfig) -> tuple[list[int], list[int], list[int]]:
    """Query heads, KV heads and FFN width of every layer, in `deci`'s convention of zeros."""
    heads, kv_heads, widths = [], [], []
    for block in config.blocks:
        heads.append(config.num_attention_heads if isinstance(block.attention, GQA | Linear) else 0)
        kv_heads.append(getattr(block.attention, "num_key_value_heads", 0))
        widths.append(block.ffn.intermediate_size if isinstance(block.ffn, SwiGLU) else 0)
    return heads, kv_heads, widths


def tensors(module: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file, by llama.cpp's names."""
    config = module.config
    yield "token_embd.weight", module.embed_tokens.weight
    factors = rope_factors(config)
    if factors is not None:
        yield "rope_freqs.weight", factors
    for layer, block in enumerate(module.layers):
        for kind in ("attention", "ffn"):
            for key, ours, heads in names(config, layer, kind):
                value = getattr(block, kind).get_parameter(ours)
                yield key, interleave(value, heads) if heads else value
    yield "output_norm.weight", module.norm.weight
    if not config.tie_word_embeddings:
        yield "output.weight", module.head


def names(config: ModelConfig, layer: int, kind: str) -> Iterator[tuple[str, str, int]]:
    """(llama.cpp's name, the subblock's parameter, heads to reorder or 0) of one subblock."""
    variant = getattr(config.blocks[layer], kind)
    prefix = f"blk.{layer}."
    match variant:
        case GQA(kv_heads):
            yield prefix + "attn_norm.weight", "norm.weight", 0
            heads = {"q": config.num_attention_heads, "k": kv_heads, "v": 0}
            for letter, count in heads.items():
                yield f"{prefix}attn_{letter}.weight", f"op.{letter}_proj.weight", count
                if config.qkv_bias:
                    yield f"{prefix}attn_{letter}.bias", f"op.{letter}_proj.bias", count
            yield prefix + "attn_output.weight", "op.o_proj.weight", 0
            if config.o_bias:
                yield prefix + "attn_output.bias", "op.o_proj.bias", 0
        case Linear():
            yield prefix + "attn_norm.weight", "norm.weight", 0
            yield prefix + "attn_output.weight", "op.weight", 0
        case SwiGLU():
            yield prefix + "ffn_norm.weight", "norm.weight", 0
            for part in ("gate", "up", "down"):
                yield f"{prefix}ffn_{part}.weight", f"op.{part}_proj.weight", 0
                if config.mlp_bias:
                    yield f"{prefix}ffn_{part}.bias", f"op.{part}_proj.bias", 0


def interleave(value: Tensor, heads: int) -> Tensor:
    """Rows of q or k `(heads*D, …)` from rotate-half order to neighbouring pairs."""
    return value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def deinterleave(value: Tensor, heads: int) -> Tensor:
    """The inverse of `interleave`."""
    return value.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def rope_factors(config: ModelConfig) -> Tensor | None:
    """`(D/2,)` divisors of the plain frequencies, for Llama 3.x's scaling; None without it."""
    if config.rope_scaling is None or config.rope_scaling.rope_type != "llama3":
        return None
    return rope_frequencies(replace(config, rope_scaling=None)) / rope_frequencies(config)


def read(path: Path, config: ModelConfig) -> Transformer:
    """The module a written file describes, its tensors put back in Hugging Face's order."""
    reader: GGUFReader = _library().GGUFReader(path)
    stored = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    module = Transformer(config)
    with torch.no_grad():
        module.embed_tokens.weight.copy_(stored["token_embd.weight"])
        module.norm.weight.copy_(stored["output_norm.weight"])
        if not config.tie_word_embeddings:
            module.lm_head.weight.copy_(stored["output.weight"])
        for layer, block in enumerate(module.layers):
            for kind in ("attention", "ffn"):
                _fill(getattr(block, kind), stored, config, layer, kind)
    return module.requires_grad_(False)


def _fill(
    subblock: Subblock, stored: dict[str, Tensor], config: ModelConfig, layer: int, kind: str
) -> None:
    for key, ours, heads in names(config, layer, kind):
        value = stored[key]
        subblock.get_parameter(ours).copy_(deinterleave(value, heads) if heads else value)


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ExportError(
            "writing GGUF needs the gguf package: pip install 'tessera[gguf]'"
        ) from error
    return gguf
