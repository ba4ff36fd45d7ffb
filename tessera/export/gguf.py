"""A GGUF file for llama.cpp in float32: `llama` for equal layers, `deci` where they differ.

`deci` has per-layer arrays of query heads, KV heads and FFN widths; 0 heads mean no attention,
0 KV heads beside query heads one matrix in its place, width 0 no FFN. llama.cpp rotates
neighbouring pairs where Hugging Face rotates halves, so the rows of q and k are reordered:

    (heads, 2, D/2, C) -> (heads, D/2, 2, C)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from gguf import GGUFReader, GGUFWriter, RopeScalingType
from torch import Tensor

from tessera.export.gguf_vocabulary import Vocabulary
from tessera.model.config import GQA, Linear, ModelConfig
from tessera.model.layers import rope_frequencies
from tessera.model.transformer import Transformer


def write(module: Transformer, path: Path, vocabulary: Vocabulary, name: str) -> None:
    """Write the whole model and its tokenizer as one GGUF file."""
    config, blocks = module.config, module.config.blocks
    equal, query = config.homogeneous, module.config.num_attention_heads
    writer = GGUFWriter(path, "llama" if equal else "deci")
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
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    heads = [query if isinstance(b.attention, GQA | Linear) else 0 for b in blocks]
    kv_heads = [getattr(b.attention, "num_key_value_heads", 0) for b in blocks]
    widths = [getattr(b.ffn, "intermediate_size", 0) for b in blocks]
    writer.add_head_count(heads[0] if equal else heads)
    writer.add_head_count_kv(kv_heads[0] if equal else kv_heads)
    writer.add_feed_forward_length(widths[0] if equal else widths)
    vocabulary.add_to(writer, config.vocab_size)
    for key, tensor in _tensors(module):
        writer.add_tensor(key, tensor.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(module: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file, by llama.cpp's names."""
    config = module.config
    yield "token_embd.weight", module.embed_tokens.weight
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "llama3":
        # Llama 3.x's long-context stretch: a divisor of each plain frequency, (D/2,).
        plain = rope_frequencies(replace(config, rope_scaling=None))
        yield "rope_freqs.weight", plain / rope_frequencies(config)
    for key, parameter, heads in _layer_tensors(module):
        yield key, interleave(parameter, heads) if heads else parameter
    yield "output_norm.weight", module.norm.weight
    if not config.tie_word_embeddings:
        yield "output.weight", module.head


# llama.cpp's names of a layer's tensors, without their `.weight` or `.bias`.
_NAMES = {
    "attention.norm": "attn_norm",
    "attention.op.q_proj": "attn_q",
    "attention.op.k_proj": "attn_k",
    "attention.op.v_proj": "attn_v",
    "attention.op.o_proj": "attn_output",
    "attention.op": "attn_output",  # linear
    "ffn.norm": "ffn_norm",
    "ffn.op.gate_proj": "ffn_gate",
    "ffn.op.up_proj": "ffn_up",
    "ffn.op.down_proj": "ffn_down",
}


def _layer_tensors(module: Transformer) -> Iterator[tuple[str, Tensor, int]]:
    """(llama.cpp's name, the parameter, heads to reorder or 0) of all layers."""
    for layer, block in enumerate(module.blocks):
        kv_heads = getattr(block.attention.variant, "num_key_value_heads", 0)
        heads = {"attn_q": module.config.num_attention_heads, "attn_k": kv_heads}
        for key, parameter in block.named_parameters():
            place, _, end = key.rpartition(".")
            name = _NAMES[place]
            yield f"blk.{layer}.{name}.{end}", parameter, heads.get(name, 0)


def interleave(value: Tensor, heads: int) -> Tensor:
    """Rows of q or k `(heads*D, …)` from rotate-half order to neighbouring pairs."""
    return value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


@torch.no_grad()
def read(path: Path, config: ModelConfig) -> Transformer:
    """The module a written file describes, its tensors in Hugging Face's order: for the check."""
    reader = GGUFReader(path)
    stored = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    module = Transformer(config)
    module.embed_tokens.weight.copy_(stored["token_embd.weight"])
    module.norm.weight.copy_(stored["output_norm.weight"])
    if not config.tie_word_embeddings:
        module.lm_head.weight.copy_(stored["output.weight"])
    for key, parameter, heads in _layer_tensors(module):
        value = stored[key]
        if heads:  # back from neighbouring pairs
            value = value.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        parameter.copy_(value)
    return module.requires_grad_(False)
