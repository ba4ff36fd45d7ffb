"""A GGUF file for llama.cpp: `llama` for equal layers, `deci` where they differ.

Matrices are in the model's own float32, bfloat16 or float16, and vectors in float32, which
llama.cpp asks of them.

`deci` has per-layer arrays of query heads, KV heads and FFN widths; 0 heads mean no attention,
0 KV heads beside query heads one matrix in its place, width 0 no FFN. llama.cpp rotates
neighbouring pairs where Hugging Face rotates halves, so the rows of q and k are reordered:

    (heads, 2, D/2, C) -> (heads, D/2, 2, C)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType
from torch import Tensor

from tessera.export.gguf_vocabulary import Vocabulary
from tessera.model.checkpoint import Checkpoint
from tessera.model.config import GQA, Linear, ModelConfig
from tessera.model.layers import rope_frequencies
from tessera.model.tensors import LazyTensor, raw
from tessera.progress import Progress

_TYPES = {
    torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}


def write(model: Checkpoint, path: Path, vocabulary: Vocabulary, name: str) -> None:
    """Write the whole model and its tokenizer as one GGUF file."""
    config, blocks = model.config, model.config.blocks
    equal, query = config.homogeneous, config.num_attention_heads
    writer = GGUFWriter(path, "llama" if equal else "deci")
    writer.add_name(name)
    writer.add_file_type(_TYPES[model.dtype][1])
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
    tensors = dict(_tensors(model))
    for key, one in tensors.items():
        kind, _ = _TYPES[one.dtype]
        writer.add_tensor_info(key, one.shape, np.dtype("f4"), one.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with Progress(f"writing {path.name}", len(tensors), "MB") as bar:
        for one in tensors.values():
            writer.write_tensor_data(raw(one.read()))
            bar.advance(1, one.nbytes / 1e6)
    writer.close()


def _tensors(model: Checkpoint) -> Iterator[tuple[str, LazyTensor]]:
    """Every tensor of the file, by llama.cpp's names."""
    config = model.config
    yield "token_embd.weight", model.tensors["embed_tokens.weight"]
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "llama3":
        # Llama 3.x's long-context stretch: a divisor of each plain frequency, (D/2,).
        plain = rope_frequencies(replace(config, rope_scaling=None))
        divisors = plain / rope_frequencies(config)
        yield "rope_freqs.weight", LazyTensor(tuple(plain.shape), plain.dtype, lambda: divisors)
    for key, one in model.tensors.items():
        if key.startswith("layers."):
            key, heads = _layer_tensor(key, config)
            one = one.map(partial(interleave, heads=heads), one.dtype) if heads else one
            yield key, one if len(one.shape) > 1 else one.to(torch.float32)
    yield "output_norm.weight", model.tensors["norm.weight"].to(torch.float32)
    if not config.tie_word_embeddings:
        yield "output.weight", model.tensors["lm_head.weight"]


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


def _layer_tensor(key: str, config: ModelConfig) -> tuple[str, int]:
    """llama.cpp's name of a layer's tensor, and the heads whose rows are reordered, or 0."""
    _, layer, rest = key.split(".", 2)
    place, _, end = rest.rpartition(".")
    kv_heads = getattr(config.blocks[int(layer)].attention, "num_key_value_heads", 0)
    heads = {"attn_q": config.num_attention_heads, "attn_k": kv_heads}
    return f"blk.{layer}.{_NAMES[place]}.{end}", heads.get(_NAMES[place], 0)


def interleave(value: Tensor, heads: int) -> Tensor:
    """Rows of q or k `(heads*D, …)` from rotate-half order to neighbouring pairs."""
    return value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
