"""The words of others: their keys, and the same tensors read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tessera.export.decilm import MEGATRON_FILE, ffn_mult
from tessera.export.engines import ExportError
from tessera.export.padding import expressible
from tessera.export.write import export_model
from tessera.model.checkpoint import load_model, save_model
from tessera.model.config import ConfigError
from tessera.model.families import ffn_mult_width, read_config
from tessera.model.source import load_config
from tests import tiny
from tests.export.interop import HETEROGENEOUS, random_model

LINEAR = (("gqa-4", "swiglu-48"), ("linear", "swiglu-10"), ("gqa-2", "noop"), ("noop", "linear"))


def test_the_dialect_has_all_its_keys(child, tmp_path):
    export_model(child, tmp_path / "out", "decilm")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["architectures"] == ["DeciLMForCausalLM"]
    assert values["model_type"] == "nemotron-nas"
    assert values["num_key_value_heads"] is values["intermediate_size"] is None
    assert "head_dim" not in values
    blocks = values["block_configs"]
    assert all(len(b["attention"]) == 8 and len(b["ffn"]) == 4 for b in blocks)
    assert [b["attention"]["n_heads_in_group"] for b in blocks] == [4, None, 1, None, 8, 2]
    assert [b["ffn"]["ffn_mult"] for b in blocks] == [3.0, 1.5, 4.5, None, 1.5, 3.0]
    assert all(isinstance(b["ffn"]["ffn_mult"], float | None) for b in blocks)
    assert [b["attention"]["no_op"] for b in blocks] == [False, True, False, True, False, False]


@pytest.mark.parametrize("hidden_size", [64, 128, 256, 2048, 4096, 5120, 8192, 16384])
def test_the_readers_rule_gives_every_width_back(hidden_size):
    for width in range(256, 8 * hidden_size + 1, 256):
        assert ffn_mult_width(ffn_mult(width, hidden_size), hidden_size) == width


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"head_dim": 64}, {"qkv_bias": True}, {"head_dim": 8}],
)
def test_our_reader_reads_the_dialect_as_it_was_meant(changes, tmp_path):
    module = random_model(**changes)
    save_model(module, tmp_path / "child")
    report = export_model(tmp_path / "child", tmp_path / "out", "decilm")
    assert read_config(tmp_path / "out") == expressible(module.config)
    assert any("no tokenizer" in note for note in report.notes)


def test_a_padded_export_exported_again_is_the_same(child, tmp_path):
    export_model(child, tmp_path / "once", "decilm")
    export_model(tmp_path / "once", tmp_path / "twice", "decilm")
    once, twice = load_model(tmp_path / "once"), load_model(tmp_path / "twice")
    assert once.config == twice.config
    for key, value in once.state_dict().items():
        assert torch.equal(value, twice.state_dict()[key])


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
    with pytest.raises(ExportError, match="linear"):
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
