"""Exports: whole or absent, checked from their own files, read back as what they were."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from tessera.export import write
from tessera.export.engines import ExportError
from tessera.export.padding import expressible
from tessera.export.write import ExportConfig, export_model, stage
from tessera.model.checkpoint import load_model, save_model, write_model
from tessera.model.config import ConfigError
from tessera.model.families import read_config
from tessera.runs.files import WriteError
from tessera.runs.run import Run
from tests.export.interop import EQUAL, HETEROGENEOUS, random_model, write_byte_tokenizer


@pytest.fixture
def child(tmp_path: Path) -> Path:
    """A model directory with a tokenizer, as a run writes it."""
    source = tmp_path / "child"
    save_model(random_model(), source)
    write_byte_tokenizer(source)
    return source


@pytest.mark.parametrize(("form", "words"), [("decilm", HETEROGENEOUS), ("gguf", HETEROGENEOUS)])
def test_export_is_checked_and_complete(form, words, child, tmp_path):
    report = export_model(child, tmp_path / "out", form)
    assert report.parity is not None
    assert report.parity.tokens_equal == report.parity.tokens == 64
    assert report.words == words
    assert (tmp_path / "out" / "README.md").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["child", "out"]


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
    ("family", "changes"),
    [
        ("llama", {}),
        ("mistral", {"rope_scaling": None}),
        ("qwen2", {"qkv_bias": True}),
        ("qwen3", {"qk_norm": True}),
    ],
)
def test_equal_layers_become_a_stock_directory(family, changes, tmp_path):
    save_model(random_model(EQUAL, family=family, **changes), tmp_path / "child")
    report = export_model(tmp_path / "child", tmp_path / "out", "hf")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == family
    assert report.parity is not None and report.parity.max_logit_difference == 0.0


def test_what_no_stock_family_has_is_refused(tmp_path):
    save_model(random_model(EQUAL, qk_norm=True, family="llama"), tmp_path / "child")
    with pytest.raises(ExportError, match="no stock family has all the properties"):
        export_model(tmp_path / "child", tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


def test_what_the_engine_cannot_load_is_refused_unless_told_otherwise(tmp_path):
    words = (("noop", "swiglu-256"), ("gqa-4", "swiglu-256"), ("linear", "linear"))
    save_model(random_model(words), tmp_path / "child")
    with pytest.raises(
        ExportError, match="layer 0 has an FFN and no attention.*--engine vllm-plugin"
    ):
        export_model(tmp_path / "child", tmp_path / "out", "decilm")
    report = export_model(tmp_path / "child", tmp_path / "out", "decilm", engines=())
    assert len(report.refusals["vllm"]) == 3 and report.refusals["transformers"] == []
    page = (tmp_path / "out" / "README.md").read_text()
    assert "**no**\n  - layer 0 has an FFN" in page


def test_engines_asked_for_are_heeded(child, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'vllm-cpu'"):
        export_model(child, tmp_path / "out", "decilm", engines=["vllmcpu"])
    save_model(random_model(head_dim=144), tmp_path / "odd")
    with pytest.raises(ExportError, match="head_dim is 144"):
        export_model(tmp_path / "odd", tmp_path / "out", "decilm", engines=["vllm-cpu"])


def test_the_place_must_be_absent_or_empty(child, tmp_path):
    (tmp_path / "out").mkdir()
    export_model(child, tmp_path / "out", "decilm", check=False)
    with pytest.raises(ExportError, match="exists and is not empty"):
        export_model(child, tmp_path / "out", "decilm")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match="exists and is not empty"):
        export_model(child, tmp_path / "file", "decilm")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ExportError, match="give a directory"):
        export_model(child, tmp_path / "model.gguf", "gguf")


def test_files_that_compute_something_else_are_not_kept(child, tmp_path, monkeypatch):
    def corrupt(module, directory, **keys):
        write_model(module, directory, **keys)
        with (directory / "model.safetensors").open("r+b") as file:
            file.seek(-40_000, 2)
            file.write(b"\x3f" * 4_000)

    monkeypatch.setattr(write, "write_model", corrupt)
    with pytest.raises(ExportError, match="do not compute what the source does"):
        export_model(child, tmp_path / "out", "decilm")
    assert [p.name for p in tmp_path.iterdir()] == ["child"]


def test_a_full_disk_leaves_nothing_behind(child, tmp_path, monkeypatch):
    def full(module, directory, **keys):
        (directory / "config.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write, "write_model", full)
    with pytest.raises(WriteError, match="No space left on device"):
        export_model(child, tmp_path / "out", "decilm")
    assert [p.name for p in tmp_path.iterdir()] == ["child"]


def test_what_a_killed_export_left_is_removed(child, tmp_path):
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp/model.safetensors").write_text("half")
    export_model(child, tmp_path / "out", "decilm", check=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["child", "out"]


def test_unknown_format_is_answered_with_the_nearest(child, tmp_path):
    with pytest.raises(ConfigError, match="unknown format 'ggfu'; did you mean 'gguf'"):
        export_model(child, tmp_path / "out", "ggfu")


def test_stage_exports_a_run_and_the_card_says_where_it_came_from(tmp_path):
    with Run.open(tmp_path / "kd", stage="kd", config={}, inputs={}, seed=5, quiet=True) as trained:
        save_model(random_model(), trained.model_path)
        write_byte_tokenizer(trained.model_path)
        trained.finish()
    config = ExportConfig(format="decilm")
    for _ in range(2):  # interrupted after the export: done again
        with Run.open(
            tmp_path / "export",
            stage="export",
            config=config.model_dump(),
            inputs={"model": tmp_path / "kd"},
            seed=5,
            quiet=True,
        ) as run:
            stage(config, run, {"model": tmp_path / "kd"})
    assert load_model(tmp_path / "export" / "export").config.num_hidden_layers == 6
    page = (tmp_path / "export" / "export" / "README.md").read_text()
    assert "kd (kd, seed 5)" in page
    assert "vllm serve . --trust-remote-code" in page
    assert "       2   gqa-8    swiglu-768" in page
