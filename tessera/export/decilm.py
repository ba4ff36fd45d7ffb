"""`config.json` of models whose layers differ, in the words of others.

    decilm       the released Llama-Nemotron models: `DeciLMForCausalLM` with `block_configs`
    puzzletron   Model-Optimizer's AnyModel: the base model's config.json with `block_configs`
    megatron     Megatron-LM's heterogeneous-layers JSON, beside puzzletron's config.json
    per_layer    transformers 5: the base model's config.json with `per_layer_config`

Stock engines build the first alone; transformers (5.24) reads the last and builds no Llama of it.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from tessera.export.padding import uniform
from tessera.model import families
from tessera.model.checkpoint import FP8_CONFIG
from tessera.model.config import GQA, BlockConfig, Linear, ModelConfig, NoOp, SwiGLU, Variant
from tessera.model.families import SKIPPED, ffn_mult_width

# Engines need the one to read the config, transformers the other to build the model.
REMOTE_CODE = ("configuration_decilm.py", "modeling_decilm.py")
MEGATRON_FILE = "heterogeneous_layers_config.json"


def write_config(
    config: ModelConfig, directory: Path, dtype: str = "float32", *, fp8: bool = False
) -> None:
    """Write a DeciLM directory but for its weights: config.json and code, of `expressible`."""
    values = config_dict(config, dtype) | ({"quantization_config": FP8_CONFIG} if fp8 else {})
    write_json(values, directory / "config.json")
    for file in REMOTE_CODE:
        (directory / file).write_text(_template(file))


def is_own_code(directory: Path) -> bool:
    """Whether the Python files of a directory are those that `write_config` puts there."""
    found = {path.name: path.read_text(errors="replace") for path in directory.glob("*.py")}
    return found == {file: _template(file) for file in REMOTE_CODE}


def _template(file: str) -> str:
    return (resources.files("tessera.export") / "remote" / file).read_text()


def write_json(values: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")


def config_dict(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """DeciLM's `config.json` of an expressible config, with the keys of the released models."""
    values: dict[str, Any] = {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
        },
        **families.common_dict(config),
        "attention_bias": config.qkv_bias,
        "attention_dropout": 0.0,
        "block_configs": [_decilm_block(block, config) for block in config.blocks],
        "initializer_range": 0.02,
        "intermediate_size": None,
        "mlp_bias": config.mlp_bias,
        "num_key_value_heads": None,
        "pretraining_tp": 1,
        "torch_dtype": dtype,
        "transformers_version": "4.48.3",  # whose spelling of the rope keys this is
        "use_cache": True,
    }
    if config.pad_token_id is not None:
        values["pad_token_id"] = config.pad_token_id
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        values["head_dim"] = config.head_dim  # absent in the released files; vLLM reads it
    return values


def ffn_mult(width: int, hidden_size: int) -> float:
    """The multiplier of a width, a multiple of 256; six decimals as released."""
    multiplier = round(3 * width / (2 * hidden_size), 6)
    assert ffn_mult_width(multiplier, hidden_size) == width, f"{width} does not survive"
    return multiplier


def _decilm_block(block: BlockConfig, config: ModelConfig) -> dict[str, Any]:
    """One `block_configs` entry: all 8 + 4 keys, null where a size does not apply."""
    heads, width = _kv_heads(block), _width(block)
    return {
        "attention": {
            "n_heads_in_group": heads and config.num_attention_heads // heads,
            **_kind(block.attention),
            "num_sink_tokens": None,
            "sparsify": None,
            "unshifted_sink": False,
            "use_prefill_window_in_sink_attention": False,
            "window_length": None,
        },
        "ffn": {
            "ffn_mult": width and ffn_mult(width, config.hidden_size),
            **_kind(block.ffn),
            "sparsify": None,
        },
    }


def puzzletron(config: ModelConfig) -> dict[str, Any]:
    """The base model's `config.json`, its sizes the greatest of any layer, with `block_configs`."""
    common = {"sparsify": None, "weights_precision": "bf16"}
    blocks = []
    for block in config.blocks:
        heads = {"num_key_value_heads": _kv_heads(block), "llama4": None, "mamba": None}
        width = {"intermediate_size": _width(block), "moe": None}
        attention = {**_kind(block.attention), **common, **heads}
        ffn = {**_kind(block.ffn), **common, **width}
        blocks.append({"attention": attention, "ffn": ffn, "parallel_blocks": None})
    return {**families.config_dict(uniform(config)), "block_configs": blocks}


def megatron(config: ModelConfig) -> dict[str, Any]:
    """Megatron-LM's JSON of heterogeneous layers."""
    blocks = [
        {
            "attention": {**_kind(block.attention), "num_query_groups": _kv_heads(block)},
            "mlp": {**_kind(block.ffn), "ffn_hidden_size": _width(block)},
        }
        for block in config.blocks
    ]
    return {"block_configs": blocks}


def per_layer(config: ModelConfig) -> dict[str, Any]:
    """The base model's `config.json` with `per_layer_config`: the layers that differ from it."""
    base = uniform(config)
    digits = len(str(config.num_hidden_layers - 1))
    layers: dict[str, Any] = {}
    for layer, (block, common) in enumerate(zip(config.blocks, base.blocks, strict=True)):
        overrides: dict[str, Any] = {}
        if (heads := _kv_heads(block)) and block.attention != common.attention:
            overrides["num_key_value_heads"] = heads
        if (width := _width(block)) and block.ffn != common.ffn:
            overrides["intermediate_size"] = width
        skipped = [name for name, kind in SKIPPED.items() if getattr(block, kind) == NoOp()]
        overrides |= {"skip": skipped} if skipped else {}
        if block != common:
            layers[f"{layer:0{digits}}"] = overrides
    return {**families.config_dict(base), "per_layer_config": layers}


def _kv_heads(block: BlockConfig) -> int | None:
    return block.attention.num_key_value_heads if isinstance(block.attention, GQA) else None


def _width(block: BlockConfig) -> int | None:
    return block.ffn.intermediate_size if isinstance(block.ffn, SwiGLU) else None


def _kind(variant: Variant) -> dict[str, bool]:
    linear = isinstance(variant, Linear)
    return {"no_op": isinstance(variant, NoOp), "replace_with_linear": linear}
