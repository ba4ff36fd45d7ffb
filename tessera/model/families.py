"""Hugging Face's `config.json`, read and written. Torch-free.

Read are the stock families, also with layers that differ (Model-Optimizer's `block_configs`,
transformers 5's `per_layer_config`), the released Puzzle models' `nemotron-nas`, and our own
`tessera`, which spells out every field and the words. Written is the stock one where it says
everything, `tessera` otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tessera.model.config import (
    GQA,
    KINDS,
    BlockConfig,
    ConfigError,
    Linear,
    ModelConfig,
    NoOp,
    RopeScaling,
    SwiGLU,
    Variant,
)
from tessera.runs.files import parse
from tessera.runs.run import require_intact

JSON = Mapping[str, Any]  # an object of a config.json
LARGEST_FILE = 16 << 20  # bytes of a config.json

# What the config class of each stock family takes for keys that a file leaves out.
_LLAMA = {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}
_MISTRAL = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}
_QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096}
_QWEN |= {"max_window_layers": 28}
FAMILIES: dict[str, JSON] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | _MISTRAL,
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}
SUPPORTED = f"{', '.join(FAMILIES)}, nemotron-nas and tessera"

# What a bare list of blocks leaves out (a file with `block_configs` and no `model_type`): Llama
# 3.1's, whose children all the published lists are. Sizes and words never come from here.
BARE_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}


def read_config(path: Path) -> ModelConfig:
    """The config of a Hugging Face directory or of a `config.json`. Raises ConfigError."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; a model directory holds one")
    require_intact(file)
    if (size := file.stat().st_size) > LARGEST_FILE:
        raise ConfigError(f"{file} has {size:,} bytes; a config.json has {LARGEST_FILE:,} at most")
    try:
        return parse_config(parse(file.read_bytes(), "it"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: {error}") from None
    except (TypeError, AttributeError, KeyError, IndexError, OverflowError) as error:
        raise ConfigError(
            f"{file}: a key of it holds another kind of value than models have ({error!r})"
        ) from None


def parse_config(values: JSON) -> ModelConfig:
    """The ModelConfig a `config.json`'s object describes; `config_dict` is the inverse.

    Raises ConfigError for what we cannot run, naming what is supported.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"is a {type(values).__name__}, not a JSON object")
    if values.get("model_type") is None and "block_configs" in values:
        values = {**BARE_DEFAULTS, **values, "model_type": "nemotron-nas"}
    _refuse_unsupported(values)
    if values["model_type"] == "tessera":
        return _parse_tessera(values)
    family = "llama" if values["model_type"] == "nemotron-nas" else values["model_type"]
    values = {**FAMILIES[family], **values}
    hidden, heads = integer(values, "hidden_size"), integer(values, "num_attention_heads")
    if values.get("head_dim") is None and hidden % heads:
        raise ConfigError(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}; give head_dim"
        )
    theta, scaling = _rope(values)
    bias = bool(values.get("attention_bias"))
    return ModelConfig(
        vocab_size=integer(values, "vocab_size"),
        hidden_size=hidden,
        num_attention_heads=heads,
        head_dim=integer(values, "head_dim", hidden // heads),
        blocks=_blocks(values),
        family=family,
        rms_norm_eps=_number(values, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=integer(values, "max_position_embeddings", 2048),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or (family != "mistral" and bias),
        o_bias=family in ("llama", "qwen3") and bias,
        mlp_bias=family == "llama" and bool(values.get("mlp_bias")),
        qk_norm=family == "qwen3",
        sliding_window=_sliding_window(family, values),
        **_token_ids(values),
    )


def _token_ids(values: JSON) -> dict[str, Any]:
    found = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = values.get(key)
        ids = [] if given is None else given if isinstance(given, list) else [given]
        if not all(type(one) is int and abs(one) < LARGEST["vocab_size"] for one in ids):
            raise ConfigError(f"{key} is {given!r:.40}; it must be the number of a token")
        found[key] = tuple(ids) if key == "eos_token_id" else ids[0] if ids else None
    return found


def _refuse_unsupported(values: JSON) -> None:
    model_type = values.get("model_type")
    architecture = (values.get("architectures") or ["?"])[0]
    named = f"{architecture} (model_type {model_type!r})"
    experts = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")
    if any(values.get(key) for key in experts) or "moe" in str(model_type).lower():
        raise ConfigError(f"{named} is a mixture of experts; supported are dense {SUPPORTED}")
    if model_type is None:
        raise ConfigError("names no model_type, so it is not the config.json of a model")
    if model_type not in {*FAMILIES, "nemotron-nas", "tessera"}:
        raise ConfigError(f"unsupported architecture {named}; supported are {SUPPORTED}")
    if not architecture.endswith(("ForCausalLM", "Model")) and architecture != "?":
        raise ConfigError(f"{architecture} is no language model (…ForCausalLM) of {SUPPORTED}")
    if (act := values.get("hidden_act") or "silu") not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {act!r} is not supported; only 'silu' is")
    if rounding := values.get("quantization_config"):
        groups = (rounding.get("config_groups") or {}).values()
        weights = [group.get("weights") or {} for group in groups]
        known = rounding.get("format") in ("float-quantized", "naive-quantized") and all(
            one.get("type") == "float"
            and one.get("num_bits") == 8
            and one.get("strategy") in ("channel", "tensor")
            for one in weights
        )
        if not known:
            raise ConfigError(
                f"quantization_config of {rounding.get('quant_method', 'an unknown method')!r} is "
                "not supported, only compressed-tensors' FP8 with a scale a tensor or a channel; "
                "give the unquantized checkpoint"
            )


# Beyond any model; a file that asks for more is damaged, or made to take all memory.
LARGEST_NUMBER = 1 << 40
LARGEST = {
    "num_hidden_layers": 4096,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
}
LARGEST |= {"head_dim": 1 << 16, "hidden_size": 1 << 20, "intermediate_size": 1 << 24}
LARGEST |= {"vocab_size": 1 << 26}


def integer(values: JSON, key: str, default: float | None = None, kind: Any = int) -> Any:
    """A whole number above 0. Raises ConfigError: missing without a default, or another value."""
    value = default if values.get(key) is None else values[key]
    if value is None:
        raise ConfigError(f"{key!r} is missing")
    most = LARGEST.get(key, LARGEST_NUMBER)
    if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value <= most:
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{key} is {value!r:.40}; it must be {what} above 0, {most:,} at most")
    return value


def _number(values: JSON, key: str, default: float | None = None) -> float:
    return float(integer(values, key, default, int | float))


def _sliding_window(family: str, values: JSON) -> int | None:
    """The window of every layer, or None. Windows on some layers only are refused."""
    window = values.get("sliding_window")
    if window is None or family == "llama":
        return None
    layers = values["num_hidden_layers"]
    full = 0
    if family != "mistral":
        if not values.get("use_sliding_window"):
            return None
        full = min(values["max_window_layers"], layers)
    split = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    kinds = values.get("layer_types") or split
    if len(set(kinds)) > 1:
        raise ConfigError(
            "layers with and without a sliding window in one model are not supported "
            f"(sliding_window {window} on {kinds.count('sliding_attention')} of {layers} layers)"
        )
    return integer(values, "sliding_window") if "sliding_attention" in kinds else None


def _rope(values: JSON) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or the older two keys."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError("rope_parameters that differ between kinds of layers are not supported")
    theta = _number(rope, "rope_theta", _number(values, "rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ConfigError(f"partial_rotary_factor {partial} is not supported; only 1.0 is")
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise ConfigError(f"rope type {kind!r} is not supported; default, linear and llama3 are")
    factor = _number(rope, "factor")
    if kind == "linear":
        return theta, RopeScaling(rope_type=kind, factor=factor)
    limit = integer(values, "max_position_embeddings", 2048)
    return theta, RopeScaling(
        rope_type=kind,
        factor=factor,
        low_freq_factor=_number(rope, "low_freq_factor", 1.0),
        high_freq_factor=_number(rope, "high_freq_factor", 4.0),
        original_max_position_embeddings=integer(rope, "original_max_position_embeddings", limit),
    )


# Layers that differ.


def _blocks(values: JSON) -> tuple[BlockConfig, ...]:
    if not (values.get("block_configs") or values["model_type"] == "nemotron-nas"):
        heads = integer(values, "num_key_value_heads", integer(values, "num_attention_heads"))
        block = BlockConfig(GQA(heads), SwiGLU(integer(values, "intermediate_size")))
        return _overridden_blocks(block, values)
    entries = values.get("block_configs")
    if not isinstance(entries, list) or not entries:
        raise ConfigError("'block_configs' is missing; a nemotron-nas config holds one a layer")
    integer({"num_hidden_layers": len(entries)}, "num_hidden_layers")
    blocks = []
    for layer, entry in enumerate(entries):
        try:
            blocks.append(BlockConfig(*(_listed(kind, entry, values) for kind in KINDS)))  # type: ignore[arg-type]
        except (ConfigError, KeyError) as error:
            raise ConfigError(f"block_configs[{layer}]: {error}") from None
    return tuple(blocks)


_UNSUPPORTED = ("window_length", "num_sink_tokens", "sparsify", "mamba", "moe", "parallel_blocks")


def _listed(kind: str, block: JSON, values: JSON) -> Variant:
    """A subblock of `block_configs`: `no_op`, `replace_with_linear`, or a size.

    Of attention the query heads that share a KV head (`n_heads_in_group`) or the KV heads, of the
    FFN a multiplier that stands for a width (`ffn_mult`) or the width.
    """
    entry = block[kind]
    for key in _UNSUPPORTED:
        if entry.get(key) or block.get(key):
            raise ConfigError(f"{key} is not supported")
    if entry.get("no_op"):
        return NoOp()
    if entry.get("replace_with_linear"):
        return Linear()
    if kind == "ffn":
        if entry.get("intermediate_size"):
            return SwiGLU(integer(entry, "intermediate_size"))
        return SwiGLU(ffn_mult_width(_number(entry, "ffn_mult"), integer(values, "hidden_size")))
    if entry.get("num_key_value_heads"):
        return GQA(integer(entry, "num_key_value_heads"))
    group, heads = integer(entry, "n_heads_in_group"), integer(values, "num_attention_heads")
    if heads % group:
        raise ConfigError(f"n_heads_in_group {group} does not divide the {heads} query heads")
    return GQA(heads // group)


def ffn_mult_width(ffn_mult: float, hidden_size: int) -> int:
    """The FFN width a DeciLM `ffn_mult` stands for: `2/3 * mult * C`, up to a multiple of 256."""
    return math.ceil(int(2 * ffn_mult * hidden_size / 3) / 256) * 256


SKIPPED = {"attention": "attention", "mlp": "ffn"}  # transformers' names of what a layer may skip
_OVERRIDES = ("intermediate_size", "num_key_value_heads", "skip")


def _overridden_blocks(common: BlockConfig, values: JSON) -> tuple[BlockConfig, ...]:
    """Each block `common` but for what `per_layer_config` says of it."""
    blocks = [common] * integer(values, "num_hidden_layers")
    for key, overrides in (values.get("per_layer_config") or {}).items():
        if not str(key).isdigit() or int(key) >= len(blocks):
            raise ConfigError(f"per_layer_config names layer {key!r}; there are {len(blocks)}")
        unknown = [name for name in overrides if name not in _OVERRIDES]
        skipped = overrides.get("skip") or []
        if unknown or not {*skipped} <= SKIPPED.keys():
            raise ConfigError(
                f"per_layer_config[{key!r}] sets {', '.join(unknown or skipped)}; supported are "
                f"{', '.join(_OVERRIDES)} (of {', '.join(SKIPPED)})"
            )
        block = common
        if "num_key_value_heads" in overrides:
            block = block.with_("attention", GQA(integer(overrides, "num_key_value_heads")))
        if "intermediate_size" in overrides:
            block = block.with_("ffn", SwiGLU(integer(overrides, "intermediate_size")))
        for name in skipped:
            block = block.with_(SKIPPED[name], NoOp())
        blocks[int(key)] = block
    return tuple(blocks)


# Our own dialect, and writing.


def _parse_tessera(values: JSON) -> ModelConfig:
    known = {f.name for f in dataclasses.fields(ModelConfig)} - {"blocks"}
    given = {key: value for key, value in values.items() if key in known}
    given["rope_theta"], given["rope_scaling"] = _rope(values)
    given |= _token_ids(values)
    for key in ("vocab_size", "hidden_size", "num_attention_heads", "head_dim"):
        integer(values, key)
    for key in ("max_position_embeddings", "sliding_window"):
        integer(values, key, 1)
    _number(values, "rms_norm_eps", 1.0)
    if not isinstance(values.get("family", ""), str):
        raise ConfigError(f"family is {values['family']!r}; it must be a name")
    blocks = values.get("blocks")
    if not isinstance(blocks, list):
        raise ConfigError("'blocks' is missing: a list of [attention, ffn] words, one a layer")
    integer({"num_hidden_layers": len(blocks) or 1}, "num_hidden_layers")  # none may be left
    for layer, words in enumerate(blocks):
        if not isinstance(words, list) or [type(word) for word in words] != [str, str]:
            raise ConfigError(f"blocks[{layer}] is {words!r}; it must be [attention, ffn] words")
    return ModelConfig(**given, blocks=()).with_words(blocks)


def config_dict(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` object of a config: stock where its family can say it all, else ours."""
    if config.homogeneous and config.family in FAMILIES:
        stock = _stock_dict(config)
        if parse_config(stock) == config:
            return stock
    fields = dataclasses.asdict(config)
    del fields["blocks"]
    return {
        "architectures": ["TesseraForCausalLM"],
        "model_type": "tessera",
        **fields,
        "hidden_act": "silu",
        "num_hidden_layers": config.num_hidden_layers,
        "blocks": [list(words) for words in config.words],
    }


def _stock_dict(config: ModelConfig) -> dict[str, Any]:
    block, family = config.blocks[0], config.family
    values = {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        **common_dict(config),
        "head_dim": config.head_dim,
        "intermediate_size": block.ffn.intermediate_size,  # type: ignore[union-attr]
        "num_key_value_heads": block.attention.num_key_value_heads,  # type: ignore[union-attr]
        "pad_token_id": config.pad_token_id,
    }
    if family in ("llama", "qwen3"):
        values["attention_bias"] = config.qkv_bias
    if family == "llama":
        values["mlp_bias"] = config.mlp_bias
    else:
        values["sliding_window"] = config.sliding_window
    if family.startswith("qwen"):
        values["use_sliding_window"] = config.sliding_window is not None
        values["max_window_layers"] = 0 if config.sliding_window else config.num_hidden_layers
    return values


def common_dict(config: ModelConfig) -> dict[str, Any]:
    """The keys that the stock families' `config.json` and DeciLM's share."""
    scaling, eos = config.rope_scaling, list(config.eos_token_id)
    rope = None if scaling is None else dataclasses.asdict(scaling)
    if scaling is not None and scaling.rope_type == "linear":
        rope = {"rope_type": "linear", "factor": scaling.factor}
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else eos,
    }


def config_json(values: JSON) -> str:
    """`config.json`'s text: indented, with one block of words a line."""
    if "blocks" not in values:
        return json.dumps(values, indent=2) + "\n"
    text = json.dumps({**values, "blocks": []}, indent=2)
    lines = ",\n".join(f"    {json.dumps(words)}" for words in values["blocks"])
    return text.replace('"blocks": []', f'"blocks": [\n{lines}\n  ]') + "\n"
