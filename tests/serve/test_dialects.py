"""The other dialects: the same tensors and outputs, read by us and by software we did not write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tessera.cli import app
from tessera.model.config import ConfigError
from tessera.model.servable import ENGINES, refusals
from tessera.model.weights import load_config, load_model, save_model
from tessera.serve.export import ExportError, export_model
from tessera.serve.export.blocks import MEGATRON_FILE
from tests import tiny
from tests.serve.interop import HETEROGENEOUS, random_model, write_byte_tokenizer

LINEAR = (("gqa-4", "swiglu-48"), ("linear", "swiglu-10"), ("gqa-2", "noop"), ("noop", "linear"))


@pytest.fixture
def child(tmp_path: Path) -> Path:
    source = tmp_path / "child"
    save_model(random_model(), source)
    write_byte_tokenizer(source)
    return source


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
    with pytest.raises(ExportError, match="plain Llama layer cannot compute it"):
        export_model(tmp_path / "linear", tmp_path / "out", "padded")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["puzzletron", "megatron"])
@pytest.mark.parametrize("words", [HETEROGENEOUS, LINEAR], ids=["served", "linear"])
def test_block_configs_are_read_back_as_the_same_tensors(tmp_path: Path, form: str, words):
    source = tmp_path / "source"
    module = random_model() if words is HETEROGENEOUS else tiny.model(tiny.config(words))
    save_model(module, source)
    report = export_model(source, tmp_path / "out", form)
    assert report.parity is not None and report.parity.max_logit_difference == 0
    again = load_model(tmp_path / "out", frozen=True)
    assert again.config.words == module.config.words == tuple(words)
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


def test_megatrons_file_names_sizes_outright(child: Path, tmp_path: Path):
    export_model(child, tmp_path / "out", "megatron")
    told = json.loads((tmp_path / "out" / MEGATRON_FILE).read_text())["block_configs"]
    config = load_config(child)
    for block, entry in zip(config.blocks, told, strict=True):
        assert entry["attention"]["no_op"] == (block.words[0] == "noop")
        assert entry["mlp"]["ffn_hidden_size"] == getattr(block.ffn, "intermediate_size", None)
    groups = [entry["attention"]["num_query_groups"] for entry in told]
    assert groups == [getattr(b.attention, "num_key_value_heads", None) for b in config.blocks]


def test_without_a_place_every_engine_is_told_of(child: Path, tmp_path: Path):
    told = CliRunner().invoke(app, ["export", str(child), "--json"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    config = load_config(child)
    assert found["engines"] == {engine: refusals(config, engine) for engine in ENGINES}
    assert found["formats"]["hf"] and not found["formats"]["padded"]
    text = CliRunner().invoke(app, ["export", str(child)]).stdout
    assert all(name in text for name in ENGINES.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["child"]


def test_an_unknown_format_is_answered_with_the_nearest(child: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="did you mean 'puzzletron'"):
        export_model(child, tmp_path / "out", "puzzeltron")
