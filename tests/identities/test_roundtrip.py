"""Import then export = the same tensors, bit for bit; a config read back = the config written."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tessera.model import tensors
from tessera.model.checkpoint import hf_name, load_model, save_model
from tessera.model.config import RopeScaling
from tessera.model.families import FAMILIES, config_dict, config_json, parse_config
from tessera.model.source import load_config
from tessera.model.transformer import Transformer
from tests import tiny

FULL: dict[str, Any] = {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "qk_norm": True}
scalings = st.one_of(
    st.none(),
    st.builds(RopeScaling, rope_type=st.just("linear"), factor=st.floats(1, 64)),
    st.builds(
        RopeScaling,
        rope_type=st.just("llama3"),
        factor=st.floats(1, 64),
        low_freq_factor=st.floats(0.5, 2),
        original_max_position_embeddings=st.integers(1, 10**5),
    ),
)
configs = st.builds(
    tiny.config,
    st.sampled_from([tiny.MOSAIC, tiny.PARENT, ()]),
    family=st.sampled_from(list(FAMILIES)),
    head_dim=st.sampled_from([4, 6]),
    rms_norm_eps=st.floats(1e-8, 1e-3),
    rope_theta=st.floats(10, 1e7),
    rope_scaling=scalings,
    tie_word_embeddings=st.booleans(),
    qkv_bias=st.booleans(),
    o_bias=st.booleans(),
    mlp_bias=st.booleans(),
    qk_norm=st.booleans(),
    sliding_window=st.one_of(st.none(), st.integers(1, 99)),
    bos_token_id=st.one_of(st.none(), st.just(0)),
    eos_token_id=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    pad_token_id=st.one_of(st.none(), st.just(3)),
)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(configs)
def test_a_config_written_is_the_config_read(config):
    assert parse_config(json.loads(config_json(config_dict(config)))) == config


def test_names_are_a_bijection():
    keys = Transformer(tiny.config(**FULL)).state_dict()
    names = [hf_name(key) for key in keys]
    assert len(set(names)) == len(keys)


@pytest.mark.parametrize("name", ["layers.0.attention.what", "model.norm.weight", "lm_tail.weight"])
def test_a_name_that_is_not_ours_is_refused(name):
    with pytest.raises(KeyError):
        hf_name(name)


def test_a_mosaic_has_the_names_of_the_released_models():
    names = {hf_name(key) for key in Transformer(tiny.config()).state_dict()}
    assert {n for n in names if ".3." in n} == {
        "model.layers.3.input_layernorm.weight",
        "model.layers.3.self_attn.linear_attn.weight",
        "model.layers.3.post_attention_layernorm.weight",
        "model.layers.3.mlp.linear_mlp.weight",
    }
    assert not any(".1." in n and ("mlp" in n or "post" in n) for n in names)
    assert not any(".2." in n and ("attn" in n or "input" in n) for n in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shard_bytes", [10**9, 1000])
def test_import_then_export_is_the_same_tensors(dtype, shard_bytes, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    save_model(tiny.model(**FULL).to(dtype), first)
    monkeypatch.setattr(tensors, "MAX_SHARD_BYTES", shard_bytes)
    save_model(load_model(first, dtype=None), second)
    files = sorted(second.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes == 1000)
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    wanted = load_file(first / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert (first / "config.json").read_bytes() == (second / "config.json").read_bytes()


@pytest.mark.parametrize("words", [tiny.MOSAIC, tiny.PARENT, ()], ids=["mosaic", "parent", "empty"])
def test_a_model_read_back_is_the_model(words, tmp_path):
    module = tiny.model(words, tie_word_embeddings=True)
    save_model(module, tmp_path / "model")
    back = load_model(tmp_path / "model")
    assert back.config == module.config == load_config(tmp_path / "model/config.json")
    tokens = tiny.tokens(29, 2, 10)
    assert torch.equal(back.logits(back(tokens)), module.logits(module(tokens)))


def test_the_config_of_a_mosaic_shows_one_layer_a_line(tmp_path):
    text = (tiny.saved(tmp_path / "model", tiny.MOSAIC) / "config.json").read_text()
    assert '\n    ["noop", "swiglu-8"],\n    ["linear", "linear"],\n' in text
    assert json.loads(text)["model_type"] == "tessera"


def test_tied_weights_stored_twice_are_one(tmp_path):
    module = tiny.model(tiny.PARENT, tie_word_embeddings=True)
    save_model(module, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert not hasattr(load_model(tmp_path), "lm_head")
