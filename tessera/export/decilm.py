"""The dialect of the released Llama-Nemotron models: `DeciLMForCausalLM` with `block_configs`.

    n_heads_in_group = query heads / KV heads        ffn_mult = 3 * width / (2 * hidden_size)

Every reader takes the width back as `int(2 * ffn_mult * hidden_size / 3)`, rounded up to a
multiple of 256, so only such widths exist; others, and biases that come all or none, are padded
with zeros (`padding.py`). Tensor names are Hugging Face's; absent subblocks have neither tensors
nor norm. The checkpoint carries two Python files: engines need the one to read the config,
transformers the other to build the model.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from tessera.export.padding import widen
from tessera.model.checkpoint import write_model
from tessera.model.config import GQA, BlockConfig, Linear, ModelConfig, NoOp, SwiGLU
from tessera.model.families import ffn_mult_width
from tessera.model.transformer import Transformer

REMOTE_CODE = ("configuration_decilm.py", "modeling_decilm.py")


def ffn_mult(width: int, hidden_size: int) -> float:
    """The multiplier of a width, six decimals as released; the reader's rule gives it back."""
    multiplier = round(3 * width / (2 * hidden_size), 6)
    assert ffn_mult_width(multiplier, hidden_size) == width, f"{width} does not survive"
    return multiplier


def config_dict(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """`config.json` of an expressible config, key for key as in the released models."""
    eos = list(config.eos_token_id)
    written = {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
        },
        "attention_bias": config.qkv_bias,
        "attention_dropout": 0.0,
        "block_configs": [block_dict(block, config) for block in config.blocks],
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos if len(eos) > 1 else next(iter(eos), None),
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": None,
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_bias": config.mlp_bias,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": None,
        "pretraining_tp": 1,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": rope_scaling(config),
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "transformers_version": "4.48.3",  # whose spelling of the rope keys this is
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if config.pad_token_id is not None:
        written["pad_token_id"] = config.pad_token_id
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        written["head_dim"] = config.head_dim  # absent in the released files; vLLM reads it
    return written


def rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
    """The `rope_scaling` entry, with the keys its type has."""
    scaling = config.rope_scaling
    if scaling is None:
        return None
    if scaling.rope_type == "llama3":
        return asdict(scaling)
    return {"rope_type": scaling.rope_type, "factor": scaling.factor}


def block_dict(block: BlockConfig, config: ModelConfig) -> dict[str, Any]:
    """One `block_configs` entry: all 8 + 4 keys, null where a size does not apply."""
    attention, ffn = block.attention, block.ffn
    group = (
        config.num_attention_heads // attention.num_key_value_heads
        if isinstance(attention, GQA)
        else None
    )
    multiplier = (
        ffn_mult(ffn.intermediate_size, config.hidden_size) if isinstance(ffn, SwiGLU) else None
    )
    return {
        "attention": {
            "n_heads_in_group": group,
            "no_op": isinstance(attention, NoOp),
            "num_sink_tokens": None,
            "replace_with_linear": isinstance(attention, Linear),
            "sparsify": None,
            "unshifted_sink": False,
            "use_prefill_window_in_sink_attention": False,
            "window_length": None,
        },
        "ffn": {
            "ffn_mult": multiplier,
            "no_op": isinstance(ffn, NoOp),
            "replace_with_linear": isinstance(ffn, Linear),
            "sparsify": None,
        },
    }


def write(
    module: Transformer,
    directory: Path,
    tokenizer_from: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write weights, config, remote code and tokenizer into `directory`, which exists."""
    wide = widen(module)
    write_model(wide, directory, tokenizer_from=tokenizer_from, dtype=dtype)
    write_config(wide.config, directory, str(dtype).removeprefix("torch."))


def write_config(config: ModelConfig, directory: Path, dtype: str = "float32") -> None:
    """Write what is not weights, `config.json` and the remote code, of an expressible config."""
    text = json.dumps(config_dict(config, dtype), indent=2) + "\n"
    (directory / "config.json").write_text(text)
    for file in REMOTE_CODE:
        (directory / file).write_text(_template(file))


def is_own_code(directory: Path) -> bool:
    """Whether the Python files of a directory are those that `write_config` puts there."""
    found = {path.name: path.read_text(errors="replace") for path in directory.glob("*.py")}
    return found == {file: _template(file) for file in REMOTE_CODE}


def _template(file: str) -> str:
    return (resources.files("tessera.export") / "remote" / file).read_text()
