"""Counted parameters and bytes = those of the built model (DESIGN §7, identity 12)."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.export import decilm
from tessera.generate.cache import Slots
from tessera.generate.packed import Packed
from tessera.model.checkpoint import hf_name
from tessera.model.config import GQA, KINDS, Linear, NoOp, SwiGLU, name, parse
from tessera.model.families import parse_config, read_config
from tessera.model.layers import Subblock
from tessera.model.transformer import Transformer
from tests import tiny

ATTENTION = ["gqa-1", "gqa-2", "gqa-4", "linear", "noop"]
FFN = ["swiglu-1", "swiglu-17", "linear", "noop"]
words = st.lists(st.tuples(st.sampled_from(ATTENTION), st.sampled_from(FFN)), max_size=4)
flags = st.fixed_dictionaries(
    {
        key: st.booleans()
        for key in ("qkv_bias", "o_bias", "mlp_bias", "qk_norm", "tie_word_embeddings")
    }
)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(words, flags)
def test_counted_is_built(words, flags):
    config = tiny.config(words, **flags)
    with torch.device("meta"):
        module = Transformer(config)
    assert config.num_params() == sum(p.numel() for p in module.parameters())
    slots = Slots(Packed(tiny.model(config)))
    slots.reserve(rows=3, columns=7)
    held = sum(cache.nbytes for pair in slots.caches.values() for cache in pair)
    assert held == 3 * 7 * config.kv_bytes_per_token()


@pytest.mark.parametrize("variant", [GQA(2), SwiGLU(12), Linear(), NoOp()], ids=name)
def test_a_subblock_has_the_parameters_its_word_counts(variant):
    config = tiny.config(qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True)
    counts = [config.subblock_params(kind, variant) for kind in KINDS]
    built = sum(p.numel() for p in Subblock(config, variant).parameters())
    assert counts == [built, built]


def test_absent_attention_costs_no_memory():
    assert tiny.config([("noop", "swiglu-8"), ("linear", "noop")]).kv_bytes_per_token() == 0


@pytest.mark.parametrize(
    ("file", "billions", "attention_layers", "fp8"),
    [
        ("3-Nemotron-Super-49B-v1", 49.867, 49, 100_352),
        ("1-Nemotron-Ultra-253B-v1", 253.401, 64, 131_072),
    ],
)
def test_released_puzzle_models_have_their_published_size(
    shared, file, billions, attention_layers, fp8
):
    config = read_config(shared / "data/nas_configs" / f"Llama-3_{file}.config.json")
    assert round(config.num_params() / 1e9, 3) == billions
    heads = [parse(attention) for attention, _ in config.words if attention != "noop"]
    assert heads == [GQA(8)] * attention_layers
    assert config.kv_bytes_per_token(1) == fp8


QKVO = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
GATED = [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]


@pytest.mark.parametrize("file", ["3-Nemotron-Super-49B-v1", "1-Nemotron-Ultra-253B-v1"])
def test_released_puzzle_models_have_the_tensors_their_blocks_say(shared, file):
    path = shared / "data/nas_configs" / f"Llama-3_{file}.config.json"
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer, block in enumerate(json.loads(path.read_text())["block_configs"]):
        for part, norm, matrices, linear in (
            ("attention", "input_layernorm.weight", QKVO, "self_attn.linear_attn.weight"),
            ("ffn", "post_attention_layernorm.weight", GATED, "mlp.linear_mlp.weight"),
        ):
            if not block[part]["no_op"]:
                names = [linear] if block[part]["replace_with_linear"] else matrices
                expected |= {f"model.layers.{layer}.{name}" for name in (norm, *names)}
    with torch.device("meta"):
        module = Transformer(read_config(path))
    assert {hf_name(key) for key in module.state_dict()} == expected
    again = parse_config(decilm.config_dict(module.config))
    assert again.words == module.config.words and again.num_params() == module.config.num_params()


def test_nemotron_51b_with_its_linear_layers_has_its_published_size(shared):
    file = shared / "data/nas_configs/Llama-3_1-Nemotron-51B-Instruct.blocks.json"
    config = read_config(file)
    assert round(config.num_params() / 1e9, 3) == 51.501
    assert sum(attention == "linear" for attention, _ in config.words) == 18
    cached = [a for a, _ in config.words if a.startswith("gqa-")]
    heads = sum(int(word.removeprefix("gqa-")) for word in cached)
    assert config.kv_bytes_per_token(1) == 2 * 128 * heads  # linear attention caches nothing
