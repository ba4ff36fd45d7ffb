"""Zeros change shapes and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tessera.export.engines import ExportError, refusals
from tessera.export.padding import expressible, expressible_notes, widen
from tessera.export.write import export_model
from tessera.model.checkpoint import Checkpoint, load_model, save_model
from tessera.model.source import load_config
from tests import tiny
from tests.export.interop import HETEROGENEOUS, random_model

LINEAR = (("gqa-4", "swiglu-48"), ("linear", "swiglu-10"), ("gqa-2", "noop"), ("noop", "linear"))
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
    wide = load_model(widen(Checkpoint.of(module)))
    tokens = torch.arange(48).view(2, 24) * 7 % 320
    ours, padded = (m.logits(m(tokens)) for m in (module, wide))
    assert (ours - padded).abs().max() < 2e-5 * ours.abs().max()
    assert ours.argmax(-1).equal(padded.argmax(-1))


def test_what_needs_no_padding_stays():
    module = random_model((("gqa-2", "swiglu-256"), ("noop", "swiglu-512"), ("linear", "linear")))
    wide = widen(Checkpoint.of(module))
    assert wide.config == module.config
    for key, value in module.state_dict().items():
        assert wide.tensors[key].read().equal(value)
    assert expressible_notes(module.config) == []


def test_padding_twice_is_padding_once():
    config = random_model(HETEROGENEOUS, head_dim=8, qkv_bias=True).config
    assert expressible(expressible(config)) == expressible(config)


def test_a_mixture_padded_is_a_plain_llama_with_the_same_outputs(child: Path, tmp_path: Path):
    report = export_model(child, tmp_path / "out", "padded")
    assert report.parity is not None and report.parity.tokens_equal == report.parity.tokens
    config = load_config(tmp_path / "out")
    assert config.homogeneous and len(set(config.words)) == 1
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "llama"
    assert all(not refusals(config, engine) for engine in ("vllm", "llama.cpp", "transformers"))
    assert "none of the speed" in (tmp_path / "out/README.md").read_text()


def test_transformers_runs_the_padded_model_without_code_of_ours(child: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    export_model(child, tmp_path / "out", "padded")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    ).eval()
    assert type(theirs).__name__ == "LlamaForCausalLM"
    module = load_model(child, frozen=True)
    tokens = tiny.tokens(module.config.vocab_size, 2, 17)
    with torch.no_grad():
        expected = module.logits(module(tokens))
        torch.testing.assert_close(theirs(tokens).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_linear_subblock_has_no_plain_form_and_is_refused(tmp_path: Path):
    save_model(tiny.model(tiny.config(LINEAR)), tmp_path / "linear")
    with pytest.raises(ExportError, match="layer"):
        export_model(tmp_path / "linear", tmp_path / "out", "padded")
    assert not (tmp_path / "out").exists()
