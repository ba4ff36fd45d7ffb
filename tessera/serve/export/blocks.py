"""`block_configs` in the words of NVIDIA's tools: sizes as they are, beside a stock base model.

    puzzletron   Model-Optimizer's AnyModel: the base model's config.json with `block_configs`
    megatron     the same weights, and Megatron-LM's heterogeneous-layers JSON beside them

Both name KV heads and widths outright, so nothing is padded. Stock engines do not build such
directories; Model-Optimizer and tessera read the first, Megatron's converters the second.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tessera.model.config import GQA, BlockConfig, Linear, ModelConfig, NoOp, SwiGLU
from tessera.model.families import config_dict
from tessera.model.transformer import Transformer
from tessera.model.weights import save_model
from tessera.serve.export.padded import uniform_shape

MEGATRON_FILE = "heterogeneous_layers_config.json"


def write(
    module: Transformer, directory: Path, tokenizer_from: Path | None = None, *, megatron: bool
) -> None:
    """Write weights, config and, for Megatron, its JSON into `directory`, which must not exist."""
    save_model(module, directory, tokenizer_from=tokenizer_from)
    text = json.dumps(puzzletron(module.config), indent=2) + "\n"
    (directory / "config.json").write_text(text)
    if megatron:
        told = {"block_configs": [_megatron_block(one) for one in module.config.blocks]}
        (directory / MEGATRON_FILE).write_text(json.dumps(told, indent=2) + "\n")


def puzzletron(config: ModelConfig) -> dict[str, Any]:
    """The base model's `config.json`, its sizes the greatest of any layer, with `block_configs`."""
    block = BlockConfig(*uniform_shape(config))
    base = config_dict(replace(config, blocks=(block,) * config.num_hidden_layers))
    return {**base, "block_configs": [_puzzletron_block(one) for one in config.blocks]}


def _puzzletron_block(block: BlockConfig) -> dict[str, Any]:
    attention, ffn = block.attention, block.ffn
    heads = attention.num_key_value_heads if isinstance(attention, GQA) else None
    width = ffn.intermediate_size if isinstance(ffn, SwiGLU) else None
    common = {"sparsify": None, "weights_precision": "bf16"}
    return {
        "attention": {
            **_kind(attention),
            **common,
            "num_key_value_heads": heads,
            "llama4": None,
            "mamba": None,
        },
        "ffn": {**_kind(ffn), **common, "intermediate_size": width, "moe": None},
        "parallel_blocks": None,
    }


def _megatron_block(block: BlockConfig) -> dict[str, Any]:
    attention, ffn = block.attention, block.ffn
    groups = attention.num_key_value_heads if isinstance(attention, GQA) else None
    width = ffn.intermediate_size if isinstance(ffn, SwiGLU) else None
    return {
        "attention": {**_kind(attention), "num_query_groups": groups},
        "mlp": {**_kind(ffn), "ffn_hidden_size": width},
    }


def _kind(variant: object) -> dict[str, bool]:
    return {
        "no_op": isinstance(variant, NoOp),
        "replace_with_linear": isinstance(variant, Linear),
    }
