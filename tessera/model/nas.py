"""How others write an architecture whose layers differ. Torch-free.

block_configs      the released Puzzle models (DeciLM), Model-Optimizer and Megatron: an entry a
                   layer says `no_op`, `replace_with_linear`, or a size: of attention the query
                   heads that share a KV head (`n_heads_in_group`) or the KV heads, of the FFN
                   a multiplier that stands for a width (`ffn_mult`) or the width
per_layer_config   transformers 5: what a layer has other than the model, by its number
"""

from __future__ import annotations

import math
from typing import Any

from tessera.model.config import FFN, GQA, Attention, BlockConfig, ConfigError, Linear, NoOp, SwiGLU
from tessera.model.values import Values, number, whole

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
