"""Values of a `config.json`, checked: one function a kind of number. Torch-free.

How others write an architecture whose layers differ. Torch-free.

block_configs      the released Puzzle models (DeciLM), Model-Optimizer and Megatron: an entry a
                   layer says `no_op`, `replace_with_linear`, or a size: of attention the query
                   heads that share a KV head (`n_heads_in_group`) or the KV heads, of the FFN
                   a multiplier that stands for a width (`ffn_mult`) or the width
per_layer_config   transformers 5: what a layer has other than the model, by its number

Hugging Face's `config.json`, read and written. Torch-free.

Four dialects are read: the stock families (`llama`, `mistral`, `qwen2`, `qwen3`), the released
Puzzle models' `nemotron-nas` (`nas.py`; arXiv 2505.00949), and our own `tessera`, which spells
every field out and the architecture in words. Two are written: the stock one where it says
everything there is to say, so that stock software loads the directory, and `tessera` otherwise.
Reading back what was written gives the same `ModelConfig`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tessera.model.config import (
    FFN,
    GQA,
    Attention,
    BlockConfig,
    ConfigError,
    Linear,
    ModelConfig,
    NoOp,
    RopeScaling,
    SwiGLU,
)

Values = Mapping[str, Any]


def whole(values: Values, key: str, default: int | None = None) -> int:
    """A whole number above 0; ConfigError, naming the key, for anything else."""
    value = default if values.get(key) is None else values[key]
    if value is None:
        raise ConfigError(f"{key!r} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key} is {value!r}; it must be a whole number above 0")
    return value


def number(values: Values, key: str, default: float | None = None) -> float:
    """A number above 0; ConfigError, naming the key, for anything else."""
    value = default if values.get(key) is None else values[key]
    if value is None:
        raise ConfigError(f"{key!r} is missing")
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"{key} is {value!r}; it must be a number above 0")
    return float(value)


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


def ffn_mult_width(ffn_mult: float, hidden_size: int) -> int:
    """The FFN width a DeciLM `ffn_mult` stands for: `2/3 * mult * C`, up to a multiple of 256."""
    return math.ceil(int(2 * ffn_mult * hidden_size / 3) / 256) * 256


def nas_blocks(values: Values) -> tuple[BlockConfig, ...]:
    """The blocks that `block_configs` lists. Raises ConfigError, naming the layer."""
    entries = values.get("block_configs")
    if not isinstance(entries, list) or not entries:
        raise ConfigError("'block_configs' is missing; a nemotron-nas config holds one a layer")
    blocks = []
    for layer, entry in enumerate(entries):
        try:
            blocks.append(_block(entry, values))
        except (ConfigError, KeyError) as error:
            raise ConfigError(f"block_configs[{layer}]: {error}") from None
    return tuple(blocks)


def _block(entry: Values, values: Values) -> BlockConfig:
    attention, ffn = entry["attention"], entry["ffn"]
    for part, key in [
        *((attention, key) for key in ("window_length", "num_sink_tokens", "sparsify", "mamba")),
        *((ffn, key) for key in ("sparsify", "moe")),
        (entry, "parallel_blocks"),
    ]:
        if part.get(key):
            raise ConfigError(f"{key} is not supported")
    return BlockConfig(_attention(attention, values), _ffn(ffn, values))


def _attention(entry: Values, values: Values) -> Attention:
    if entry.get("no_op"):
        return NoOp()
    if entry.get("replace_with_linear"):
        return Linear()
    if entry.get("num_key_value_heads"):
        return GQA(whole(entry, "num_key_value_heads"))
    group, heads = whole(entry, "n_heads_in_group"), whole(values, "num_attention_heads")
    if heads % group:
        raise ConfigError(f"n_heads_in_group {group} does not divide the {heads} query heads")
    return GQA(heads // group)


def _ffn(entry: Values, values: Values) -> FFN:
    if entry.get("no_op"):
        return NoOp()
    if entry.get("replace_with_linear"):
        return Linear()
    if entry.get("intermediate_size"):
        return SwiGLU(whole(entry, "intermediate_size"))
    return SwiGLU(ffn_mult_width(number(entry, "ffn_mult"), whole(values, "hidden_size")))


# transformers' names of what a layer may skip.
SKIPPED = {"attention": "attention", "mlp": "ffn"}
_OVERRIDES = ("intermediate_size", "num_key_value_heads", "skip")


def per_layer_blocks(common: BlockConfig, values: Values) -> tuple[BlockConfig, ...]:
    """The blocks of a stock config, each `common` but for what `per_layer_config` says of it.

    Raises ConfigError, naming the layer, for what no word says.
    """
    blocks = [common] * whole(values, "num_hidden_layers")
    for key, told in (values.get("per_layer_config") or {}).items():
        if not str(key).isdigit() or int(key) >= len(blocks):
            raise ConfigError(f"per_layer_config names layer {key!r}; there are {len(blocks)}")
        unknown = [name for name in told if name not in _OVERRIDES]
        skipped = told.get("skip") or []
        if unknown or not {*skipped} <= SKIPPED.keys():
            raise ConfigError(
                f"per_layer_config[{key!r}] sets {', '.join(unknown or skipped)}; supported are "
                f"{', '.join(_OVERRIDES)} (of {', '.join(SKIPPED)})"
            )
        blocks[int(key)] = _overridden(common, told, [SKIPPED[name] for name in skipped])
    return tuple(blocks)


def _overridden(block: BlockConfig, told: Values, skipped: list[str]) -> BlockConfig:
    if "num_key_value_heads" in told:
        block = block.with_("attention", GQA(whole(told, "num_key_value_heads")))
    if "intermediate_size" in told:
        block = block.with_("ffn", SwiGLU(whole(told, "intermediate_size")))
    for kind in skipped:
        block = block.with_(kind, NoOp())
    return block


@dataclass(frozen=True, slots=True)
class Family:
    """A stock architecture and what its config class takes for keys a file leaves out."""

    architecture: str
    defaults: Values = field(default_factory=dict)


_LLAMA_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
_QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "max_window_layers": 28}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", {"max_position_embeddings": 2048, **_LLAMA_TOKENS}),
    "mistral": Family(
        "MistralForCausalLM",
        {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            **_LLAMA_TOKENS,
        },
    ),
    "qwen2": Family("Qwen2ForCausalLM", {**_QWEN, "sliding_window": 4096}),
    "qwen3": Family("Qwen3ForCausalLM", {**_QWEN, "sliding_window": 4096, "head_dim": 128}),
}
SUPPORTED = f"{', '.join(FAMILIES)}, nemotron-nas and tessera"

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")


def read_config(path: Path) -> ModelConfig:
    """The config of a Hugging Face directory or of a `config.json`.

    Raises ConfigError, naming the file: absent, not JSON, or describing what is not supported.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist; a model directory holds one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds a {type(values).__name__}, not a JSON object")
    try:
        return parse_config(values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def parse_config(values: Values) -> ModelConfig:
    """The ModelConfig a `config.json`'s object describes; `config_dict` is the inverse.

    Raises ConfigError for what we cannot run, naming it and what is supported.
    """
    if values.get("model_type") is None and "block_configs" in values:
        values = {**BARE_DEFAULTS, **values, "model_type": "nemotron-nas"}
    model_type = values.get("model_type")
    _refuse_unsupported(values)
    if model_type == "tessera":
        return _parse_tessera(values)
    if model_type == "nemotron-nas":
        return _parse_nemotron_nas(values)
    return _parse_stock(values)


def _refuse_unsupported(values: Values) -> None:
    model_type, known = values.get("model_type"), {*FAMILIES, "nemotron-nas", "tessera"}
    architecture = (values.get("architectures") or ["?"])[0]
    if any(values.get(key) for key in _EXPERTS) or "moe" in str(model_type).lower():
        raise ConfigError(
            f"{architecture} (model_type {model_type!r}) is a mixture of experts, which is not "
            f"supported; dense models of {SUPPORTED} are"
        )
    if model_type is None:
        raise ConfigError("names no model_type, so it is not the config.json of a model")
    if model_type not in known:
        raise ConfigError(
            f"unsupported architecture {architecture} (model_type {model_type!r}); "
            f"supported are {SUPPORTED}"
        )
    if not architecture.endswith("ForCausalLM") and architecture != "?":
        raise ConfigError(
            f"unsupported architecture {architecture}: only language models (…ForCausalLM) of "
            f"{SUPPORTED} are supported"
        )
    if (act := values.get("hidden_act") or "silu") not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {act!r} is not supported; only 'silu' is")
    _refuse_quantized(values.get("quantization_config") or {})


def _refuse_quantized(told: Values) -> None:
    """All but weights in FP8 with a scale a tensor or an output channel (`fp8.py`)."""
    if not told:
        return
    groups = (told.get("config_groups") or {}).values()
    strategies = {(group.get("weights") or {}).get("strategy") for group in groups}
    if told.get("format") != "float-quantized" or not strategies <= {"channel", "tensor"}:
        raise ConfigError(
            f"quantization_config of {told.get('quant_method', 'an unknown method')!r} is not "
            "supported, but for compressed-tensors' FP8 with a scale a tensor or a channel; give "
            "the plain, unquantized checkpoint"
        )


def _parse_stock(values: Values) -> ModelConfig:
    family = values["model_type"]
    values = {**FAMILIES[family].defaults, **values}
    heads = whole(values, "num_attention_heads")
    key_value = whole(values, "num_key_value_heads", heads)
    if values.get("block_configs"):  # Model-Optimizer's AnyModel
        blocks = nas_blocks(values)
    else:
        block = BlockConfig(GQA(key_value), SwiGLU(whole(values, "intermediate_size")))
        blocks = per_layer_blocks(block, values)
    return ModelConfig(
        **_common(values),
        **_family_fields(family, values),
        family=family,
        blocks=blocks,
        sliding_window=_sliding_window(family, values),
    )


def _common(values: Values) -> dict[str, Any]:
    """The fields that stock files and `nemotron-nas` share."""
    hidden, heads = whole(values, "hidden_size"), whole(values, "num_attention_heads")
    if values.get("head_dim") is None and hidden % heads:
        raise ConfigError(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}; give head_dim"
        )
    theta, scaling = _rope(values)
    return {
        "vocab_size": whole(values, "vocab_size"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "head_dim": whole(values, "head_dim", hidden // heads),
        "rms_norm_eps": number(values, "rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": whole(values, "max_position_embeddings", 2048),
        "tie_word_embeddings": bool(values.get("tie_word_embeddings", False)),
        **_token_ids(values),
    }


def _token_ids(values: Values) -> dict[str, Any]:
    eos = values.get("eos_token_id")
    return {
        "bos_token_id": values.get("bos_token_id"),
        "eos_token_id": () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        "pad_token_id": values.get("pad_token_id"),
    }


def _family_fields(family: str, values: Values) -> dict[str, Any]:
    """What the families do not say in one way: biases and QK norm, as properties."""
    bias = bool(values.get("attention_bias"))
    match family:
        case "mistral":
            return {}
        case "qwen2":
            return {"qkv_bias": True}
        case "qwen3":
            return {"qkv_bias": bias, "o_bias": bias, "qk_norm": True}
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(values.get("mlp_bias"))}


def _sliding_window(family: str, values: Values) -> int | None:
    """The window of every layer, or None. Windows on some layers only are refused."""
    window = values.get("sliding_window")
    if window is None or family == "llama":
        return None
    layers = values["num_hidden_layers"]
    if family == "mistral":
        kinds = values.get("layer_types") or ["sliding_attention"] * layers
    elif not values.get("use_sliding_window"):
        return None
    else:
        full = min(values["max_window_layers"], layers)
        split = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
        kinds = values.get("layer_types") or split
    if len(set(kinds)) > 1:
        raise ConfigError(
            "layers with and without a sliding window in one model are not supported "
            f"(sliding_window {window} on {kinds.count('sliding_attention')} of {layers} layers)"
        )
    return whole(values, "sliding_window") if "sliding_attention" in kinds else None


def _rope(values: Values) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or the older two keys."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError("rope_parameters that differ between kinds of layers are not supported")
    theta = number(rope, "rope_theta", number(values, "rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ConfigError(f"partial_rotary_factor {partial} is not supported; only 1.0 is")
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise ConfigError(f"rope type {kind!r} is not supported; default, linear and llama3 are")
    scaling = RopeScaling(rope_type=kind, factor=number(rope, "factor"))
    if kind == "linear":
        return theta, scaling
    limit = whole(values, "max_position_embeddings", 2048)
    return theta, dataclasses.replace(
        scaling,
        low_freq_factor=number(rope, "low_freq_factor", 1.0),
        high_freq_factor=number(rope, "high_freq_factor", 4.0),
        original_max_position_embeddings=whole(rope, "original_max_position_embeddings", limit),
    )


# The released Puzzle models: `nemotron-nas`.


def _parse_nemotron_nas(values: Values) -> ModelConfig:
    blocks = nas_blocks(values)
    values = {**FAMILIES["llama"].defaults, **values}
    fields = _family_fields("llama", values)
    return ModelConfig(**_common(values), **fields, family="llama", blocks=blocks)


# Our own dialect, and writing.


def _parse_tessera(values: Values) -> ModelConfig:
    known = {f.name for f in dataclasses.fields(ModelConfig)} - {"blocks"}
    given = {key: value for key, value in values.items() if key in known}
    given["rope_theta"], given["rope_scaling"] = _rope(values)
    given["eos_token_id"] = tuple(given.get("eos_token_id") or ())
    for key in ("vocab_size", "hidden_size", "num_attention_heads", "head_dim"):
        whole(values, key)
    return ModelConfig(**given, blocks=()).with_words(_word_pairs(values.get("blocks")))


def _word_pairs(blocks: Any) -> list[list[str]]:
    if not isinstance(blocks, list):
        raise ConfigError("'blocks' is missing: a list of [attention, ffn] words, one a layer")
    for layer, words in enumerate(blocks):
        pair = isinstance(words, list) and len(words) == 2
        if not pair or not all(isinstance(word, str) for word in words):
            raise ConfigError(f"blocks[{layer}] is {words!r}; it must be [attention, ffn] words")
    return blocks


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
    block, eos = config.blocks[0], list(config.eos_token_id)
    values = {
        "architectures": [FAMILIES[config.family].architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": block.ffn.intermediate_size,  # type: ignore[union-attr]
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": block.attention.num_key_value_heads,  # type: ignore[union-attr]
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_dict(config.rope_scaling),
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else eos,
        "pad_token_id": config.pad_token_id,
    }
    if config.family in ("llama", "qwen3"):
        values["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        values["mlp_bias"] = config.mlp_bias
    if config.family != "llama":
        values["sliding_window"] = config.sliding_window
    if config.family.startswith("qwen"):
        values["use_sliding_window"] = config.sliding_window is not None
        values["max_window_layers"] = 0 if config.sliding_window else config.num_hidden_layers
    return values


def _rope_dict(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.rope_type == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return dataclasses.asdict(scaling)


def config_json(values: Values) -> str:
    """`config.json`'s text: indented, with one block of words a line."""
    text = json.dumps(values, indent=2)
    if "blocks" not in values:
        return text + "\n"
    text = json.dumps({**values, "blocks": []}, indent=2)
    lines = ",\n".join(f"    {json.dumps(words)}" for words in values["blocks"])
    return text.replace('"blocks": []', f'"blocks": [\n{lines}\n  ]') + "\n"
