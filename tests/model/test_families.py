"""`config.json` dialects: what each key means, what is left out, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tessera.model.config import ConfigError, RopeScaling
from tessera.model.families import config_dict, ffn_mult_width, parse_config, read_config
from tests import tiny

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ATTENTION = {"n_heads_in_group": 4, "no_op": False, "replace_with_linear": False}
FFN = {"ffn_mult": 3.0, "no_op": False, "replace_with_linear": False}


def stock(family: str, **changes: Any) -> dict[str, Any]:
    architecture = f"{family.capitalize()}ForCausalLM"
    return LLAMA | {"model_type": family, "architectures": [architecture]} | changes


def nas(*blocks: Any, **changes: Any) -> dict[str, Any]:
    left = {key: None for key in ("intermediate_size", "num_key_value_heads")}
    return LLAMA | left | {"model_type": "nemotron-nas", "block_configs": list(blocks)} | changes


def test_llama():
    config = parse_config(LLAMA)
    assert config.words == (("gqa-2", "swiglu-96"),) * 3
    assert (config.head_dim, config.rope_theta, config.rms_norm_eps) == (8, 10000.0, 1e-6)
    assert (config.bos_token_id, config.eos_token_id) == (1, (2,))
    assert not config.tie_word_embeddings and not config.qkv_bias and not config.mlp_bias


def test_key_value_heads_default_to_the_query_heads_of_old_llamas():
    values = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert parse_config(values).words[0][0] == "gqa-8"
    assert parse_config(stock("mistral", num_key_value_heads=None)).words[0][0] == "gqa-8"


@pytest.mark.parametrize(("given", "read"), [(None, ()), (7, (7,)), ([7, 9], (7, 9))])
def test_end_tokens(given, read):
    config = parse_config(LLAMA | {"eos_token_id": given})
    assert config.eos_token_id == read
    assert config_dict(config)["eos_token_id"] == given


@pytest.mark.parametrize(
    ("family", "given", "fields"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}, {"qkv_bias", "o_bias", "mlp_bias"}),
        ("mistral", {}, set()),
        ("qwen2", {}, {"qkv_bias"}),
        ("qwen3", {}, {"qk_norm"}),
        ("qwen3", {"attention_bias": True}, {"qkv_bias", "o_bias", "qk_norm"}),
    ],
)
def test_biases_and_norms_of_the_families(family, given, fields):
    config = parse_config(stock(family, **given))
    everything = ("qkv_bias", "o_bias", "mlp_bias", "qk_norm")
    assert {key for key in everything if getattr(config, key)} == fields


@pytest.mark.parametrize(
    ("family", "given", "window"),
    [
        ("llama", {"sliding_window": 8}, None),
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 8}, 8),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False}, None),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True}, None),  # from layer 28 on
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, 8),
    ],
)
def test_sliding_windows(family, given, window):
    assert parse_config(stock(family, **given)).sliding_window == window


def test_qwen3_has_its_own_head_size():
    assert parse_config(stock("qwen3")).head_dim == 128
    assert parse_config(stock("qwen3", head_dim=16)).head_dim == 16


@pytest.mark.parametrize(
    "given",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 512}},
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 512, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3, "max_position_embeddings": 512},
    ],
    ids=["rope_scaling", "rope_parameters", "original length left out"],
)
def test_rope_scaling_old_and_new(given):
    config = parse_config(LLAMA | given)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling(
        rope_type="llama3", factor=8.0, original_max_position_embeddings=512
    )


def test_older_linear_scaling():
    config = parse_config(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}})
    assert config.rope_scaling == RopeScaling(rope_type="linear", factor=2.0)
    assert config_dict(config)["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("width", [256, 512, 2816, 5632, 14336, 28672])
def test_the_width_rule_of_the_released_models(width):
    assert ffn_mult_width(round(width * 3 / (2 * 8192), 6), 8192) == width


def test_nemotron_nas_words():
    config = parse_config(
        nas(
            {"attention": ATTENTION, "ffn": FFN},
            {"attention": {"no_op": True}, "ffn": {"replace_with_linear": True}},
            {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
            {"attention": {"num_key_value_heads": 4}, "ffn": {"intermediate_size": 100}},
        )
    )
    assert config.words == (
        ("gqa-2", "swiglu-256"),
        ("noop", "linear"),
        ("linear", "noop"),
        ("gqa-4", "swiglu-100"),
    )


def test_a_bare_list_of_blocks_is_a_child_of_llama_3():
    """No `model_type`: the words are the file's, and the rest is Llama 3.1's."""
    values = nas({"attention": ATTENTION, "ffn": FFN}, {"attention": {"no_op": True}, "ffn": FFN})
    bare = {key: values[key] for key in ("vocab_size", "hidden_size", "num_attention_heads")}
    config = parse_config(bare | {"block_configs": values["block_configs"]})
    assert config.words == parse_config(values).words
    assert config.num_params() == parse_config(values).num_params()
    assert (config.rope_theta, config.max_position_embeddings) == (500000.0, 131072)
    assert config.rope_scaling is not None and config.rope_scaling.rope_type == "llama3"


def test_a_homogeneous_model_is_written_as_its_family():
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        config = parse_config(stock(family))
        assert config_dict(config)["model_type"] == family
        words = [("noop", "swiglu-96"), *config.words[1:]]
        assert config_dict(config.with_words(words))["model_type"] == "tessera"


def test_what_a_family_cannot_say_is_written_in_our_words():
    values = config_dict(tiny.config(tiny.PARENT, qk_norm=True, family="llama"))
    assert (values["model_type"], values["qk_norm"]) == ("tessera", True)


REFUSED = {  # what the file says, and what the error must name
    "architecture": ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "gpt2.*qwen3"),
    "no model_type": ({"model_type": None}, "model_type"),
    "classifier": (
        {"architectures": ["LlamaForSequenceClassification"]},
        "LlamaForSequenceClassification",
    ),
    "moe by name": (stock("qwen3_moe"), "'qwen3_moe'"),
    "moe by key": (stock("mixtral", num_local_experts=8), "mixtral"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "per layer": ({"per_layer_config": {"1": {"mamba": 1}}}, "mamba"),
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn'"),
    "dynamic": ({"rope_parameters": {"rope_type": "dynamic"}}, "'dynamic'"),
    "longrope": ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
    "no factor": ({"rope_scaling": {"rope_type": "linear"}}, "'factor'"),
    "partial rope": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "rope by layer": ({"rope_parameters": {"full_attention": {}}}, "rope_parameters"),
    "some windows": (
        stock("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
        "sliding_window 8 on 2 of 3",
    ),
    "missing": ({"hidden_size": None}, "'hidden_size'"),
    "text": ({"hidden_size": "64"}, "hidden_size is '64'"),
    "zero": ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "epsilon": ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
    "heads": ({"num_attention_heads": 7}, "64 .*num_attention_heads 7"),
    "kv heads": ({"num_key_value_heads": 3}, "gqa-3 .*8"),
    "odd heads": ({"head_dim": 7}, "head_dim is 7"),
    "no blocks": (nas(), "'block_configs'"),
    "window": (
        nas({"attention": ATTENTION | {"window_length": 8}, "ffn": FFN}),
        r"block_configs\[0\]: window_length",
    ),
    "parallel": (nas({"attention": ATTENTION, "ffn": FFN, "parallel_blocks": [1]}), "parallel_b"),
    "group": (
        nas({"attention": ATTENTION | {"n_heads_in_group": 3}, "ffn": FFN}),
        r"block_configs\[0\]: n_heads_in_group 3",
    ),
    "no multiplier": (
        nas({"attention": ATTENTION, "ffn": {"no_op": False}}),
        r"block_configs\[0\]: 'ffn_mult'",
    ),
    "no words": ({"model_type": "tessera", "head_dim": 8}, "'blocks'"),
    "wrong word": (
        {"model_type": "tessera", "head_dim": 8, "blocks": [["gqa-8", "gqa-8"]]},
        "'gqa-8' .*ffn",
    ),
    "half a block": (
        {"model_type": "tessera", "head_dim": 8, "blocks": [["gqa-8"]]},
        r"blocks\[0\] is \['gqa-8'\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_run_is_refused_by_name(case, tmp_path):
    changes, text = REFUSED[case]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA | changes))
    with pytest.raises(ConfigError, match=text) as error:
        read_config(tmp_path)
    assert str(error.value).startswith(str(file))


@pytest.mark.parametrize("content", ["{", "[1]", None])
def test_a_file_that_is_no_config(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="config.json"):
        read_config(tmp_path)
