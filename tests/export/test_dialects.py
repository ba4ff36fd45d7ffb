"""The other dialects: the same tensors and outputs, read by us and by software we did not write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tessera.cli.main import app
from tessera.export.decilm import MEGATRON_FILE
from tessera.export.engines import ENGINES, ExportError, refusals
from tessera.export.write import export_model
from tessera.model.checkpoint import load_model, save_model
from tessera.model.config import ConfigError
from tessera.model.source import load_config
from tests import tiny
from tests.export.interop import HETEROGENEOUS, random_model, write_byte_tokenizer

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


@pytest.mark.parametrize(
    ("form", "words"),
    [
        *[
            (form, words)
            for form in ("puzzletron", "megatron")
            for words in (HETEROGENEOUS, LINEAR)
        ],
        ("per_layer", HETEROGENEOUS),
    ],
)
def test_the_words_of_others_are_read_back_as_the_same_tensors(tmp_path: Path, form: str, words):
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


def test_transformers_own_words_name_only_what_differs(child: Path, tmp_path: Path):
    export_model(child, tmp_path / "out", "per_layer")
    told = json.loads((tmp_path / "out/config.json").read_text())
    assert told["model_type"] == "llama" and told["num_key_value_heads"] == 8
    assert told["per_layer_config"] == {
        "0": {"num_key_value_heads": 2, "intermediate_size": 512},
        "1": {"intermediate_size": 256, "skip": ["attention"]},
        "3": {"skip": ["attention", "mlp"]},
        "4": {"num_key_value_heads": 1, "intermediate_size": 128},
        "5": {"num_key_value_heads": 4, "intermediate_size": 300},
    }
    save_model(tiny.model(tiny.config(LINEAR)), tmp_path / "linear")
    with pytest.raises(ExportError, match="per_layer_config has no word for it"):
        export_model(tmp_path / "linear", tmp_path / "other", "per_layer")


def test_no_llama_of_transformers_is_trusted_to_obey_its_own_words(child: Path, tmp_path: Path):
    """Where this fails, transformers has learnt it: `per_layer` can become a format to serve."""
    transformers = pytest.importorskip("transformers")
    export_model(child, tmp_path / "out", "per_layer")
    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    except Exception as error:
        assert "PerLayer" in type(error).__name__ or "per-layer" in str(error).lower()
        return
    assert theirs.num_parameters() != load_config(child).num_params()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"9": {"intermediate_size": 8}}, "names layer '9'; there are 6"),
        ({"1": {"sliding_window": 8}}, "sets sliding_window; supported are intermediate_size"),
        ({"1": {"skip": ["moe"]}}, r"sets moe; supported are"),
    ],
)
def test_overrides_that_no_word_says_are_refused(child: Path, tmp_path: Path, told, message: str):
    export_model(child, tmp_path / "out", "per_layer")
    path = tmp_path / "out/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"per_layer_config": told}))
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "out")


@pytest.mark.parametrize("form", ["decilm", "padded"])
def test_in_fp8_the_files_hold_the_rounded_model(child: Path, tmp_path: Path, form: str):
    report = export_model(child, tmp_path / "out", form, quantize="fp8")
    plain = export_model(child, tmp_path / "plain", form)
    assert report.parity is not None and report.parity.tokens_equal == report.parity.tokens
    assert report.num_bytes < 0.5 * plain.num_bytes  # the embeddings of a toy are much of it
    assert "rounded to FP8" in (tmp_path / "out/README.md").read_text()
    module, again = load_model(tmp_path / "plain"), load_model(tmp_path / "out")
    for key, value in module.state_dict().items():
        found = again.state_dict()[key]
        if key.endswith("_proj.weight"):  # E4M3 keeps three bits of mantissa: half a step of 1/8
            largest = value.abs().amax(1, keepdim=True)
            assert ((found - value).abs() <= value.abs() / 16 + largest / 2**13).all()
        else:
            assert torch.equal(found, value)


def test_what_fp8_cannot_be_is_refused(child: Path, tmp_path: Path):
    with pytest.raises(ExportError, match="FP8 goes with decilm, hf, padded"):
        export_model(child, tmp_path / "out", "gguf", quantize="fp8")
    export_model(child, tmp_path / "out", "decilm", quantize="fp8")
    path = tmp_path / "out/config.json"
    told = json.loads(path.read_text())
    told["quantization_config"]["format"] = "pack-quantized"
    path.write_text(json.dumps(told))
    with pytest.raises(ConfigError, match="FP8 with a scale a tensor or a channel"):
        load_config(tmp_path / "out")
