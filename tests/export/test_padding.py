"""Zeros change shapes and nothing else."""

from __future__ import annotations

import pytest
import torch

from tessera.export.decilm import ffn_mult
from tessera.export.padding import expressible, expressible_notes, widen
from tessera.model.families import ffn_mult_width
from tests.export.interop import HETEROGENEOUS, random_model

CASES = {
    "widths": {},
    "head size 8, a multiple of which is 32": {"head_dim": 8},
    "head size 16 and a stretch of frequencies": {"head_dim": 16},
    "head size 40": {"head_dim": 40, "rope_scaling": None},
    "Qwen's biases": {"qkv_bias": True, "head_dim": 16},
    "an output bias alone": {"o_bias": True, "head_dim": 16},
    "biases in the FFN": {"mlp_bias": True, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_padded_model_computes_the_same(changes):
    module = random_model(**changes)
    wide = widen(module)
    tokens = torch.arange(48).view(2, 24) * 7 % 320
    ours, padded = (m.logits(m(tokens)) for m in (module, wide))
    assert (ours - padded).abs().max() < 2e-5 * ours.abs().max()
    assert ours.argmax(-1).equal(padded.argmax(-1))


def test_what_needs_no_padding_is_shared():
    module = random_model((("gqa-2", "swiglu-256"), ("noop", "swiglu-512"), ("linear", "linear")))
    wide = widen(module)
    assert wide.config == module.config
    for key, value in module.state_dict().items():
        assert wide.state_dict()[key].data_ptr() == value.data_ptr()
    assert expressible_notes(module.config) == []


def test_padding_twice_is_padding_once():
    config = random_model(HETEROGENEOUS, head_dim=8, qkv_bias=True).config
    assert expressible(expressible(config)) == expressible(config)


@pytest.mark.parametrize("hidden_size", [64, 128, 256, 2048, 4096, 5120, 8192, 16384])
def test_the_readers_rule_gives_every_width_back(hidden_size):
    for width in range(256, 8 * hidden_size + 1, 256):
        assert ffn_mult_width(ffn_mult(width, hidden_size), hidden_size) == width
