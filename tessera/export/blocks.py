"""Layers that differ in the words of others: sizes as they are, beside a stock base model.

    puzzletron   Model-Optimizer's AnyModel: the base model's config.json with `block_configs`
    megatron     the same weights, and Megatron-LM's heterogeneous-layers JSON beside them
    per_layer    transformers 5: the base model's config.json with `per_layer_config`

All name KV heads and widths outright, so nothing is padded. Stock engines do not build such
directories: Model-Optimizer and tessera read the first, Megatron's converters the second, and
transformers (5.24) reads the third's config, but builds no Llama after it: it refuses, or builds
equal layers without a word where told to allow that.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tessera.export.engines import Format
from tessera.export.hf import uniform_shape
from tessera.model.checkpoint import write_model
from tessera.model.config import GQA, BlockConfig, Linear, ModelConfig, NoOp, SwiGLU
from tessera.model.families import SKIPPED, config_dict
from tessera.model.transformer import Transformer

MEGATRON_FILE = "heterogeneous_layers_config.json"


def write(
    module: Transformer, directory: Path, form: Format, tokenizer_from: Path | None = None
) -> None:
    """Write weights, config and, for Megatron, its JSON into `directory`, which exists."""
    write_model(module, directory, tokenizer_from=tokenizer_from)
    told = (per_layer if form == "per_layer" else puzzletron)(module.config)
    (directory / "config.json").write_text(json.dumps(told, indent=2) + "\n")
    if form == "megatron":
        told = {"block_configs": [_megatron_block(one) for one in module.config.blocks]}
        (directory / MEGATRON_FILE).write_text(json.dumps(told, indent=2) + "\n")


def puzzletron(config: ModelConfig) -> dict[str, Any]:
    """The base model's `config.json`, its sizes the greatest of any layer, with `block_configs`."""
    base, _ = _base(config)
    return {**base, "block_configs": [_puzzletron_block(one) for one in config.blocks]}


def per_layer(config: ModelConfig) -> dict[str, Any]:
    """The base model's `config.json` with `per_layer_config`: the layers that differ from it."""
    base, block = _base(config)
    digits = len(str(config.num_hidden_layers - 1))
    found = {
        f"{layer:0{digits}}": _overrides(one, block)
        for layer, one in enumerate(config.blocks)
        if one != block
    }
    return {**base, "per_layer_config": found}


def _base(config: ModelConfig) -> tuple[dict[str, Any], BlockConfig]:
    block = BlockConfig(*uniform_shape(config))
    return config_dict(replace(config, blocks=(block,) * config.num_hidden_layers)), block


def _overrides(block: BlockConfig, common: BlockConfig) -> dict[str, Any]:
    """What a layer has other than the model."""
    told: dict[str, Any] = {}
    attention, ffn = block.attention, block.ffn
    if isinstance(attention, GQA) and attention != common.attention:
        told["num_key_value_heads"] = attention.num_key_value_heads
    if isinstance(ffn, SwiGLU) and ffn != common.ffn:
        told["intermediate_size"] = ffn.intermediate_size
    skipped = [name for name, kind in SKIPPED.items() if isinstance(getattr(block, kind), NoOp)]
    return told | ({"skip": skipped} if skipped else {})


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
