"""Exports: whole or absent, checked from their own files, refused with the reason."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tessera.cli.main import app
from tessera.export import write
from tessera.export.engines import ENGINES, ExportError, refusals
from tessera.export.write import ExportConfig, export_model, stage
from tessera.model.checkpoint import load_model, save_model, write_model
from tessera.model.config import ConfigError
from tessera.model.source import load_config
from tessera.runs.files import WriteError
from tessera.runs.run import Run
from tests.export.interop import EQUAL, HETEROGENEOUS, random_model, write_byte_tokenizer


@pytest.mark.parametrize(("form", "words"), [("decilm", HETEROGENEOUS), ("gguf", HETEROGENEOUS)])
def test_export_is_checked_and_complete(form, words, child, tmp_path):
    report = export_model(child, tmp_path / "out", form)
    assert report.parity is not None
    assert report.parity.tokens_equal == report.parity.tokens == 64
    assert report.words == words
    assert (tmp_path / "out" / "README.md").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["child", "out"]


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
    with pytest.raises(ExportError, match="llama"):
        export_model(tmp_path / "child", tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


def test_what_the_engine_cannot_load_is_refused_unless_told_otherwise(tmp_path):
    words = (("noop", "swiglu-256"), ("gqa-4", "swiglu-256"), ("linear", "linear"))
    save_model(random_model(words), tmp_path / "child")
    with pytest.raises(ExportError, match="layer 0 .*vllm-plugin"):
        export_model(tmp_path / "child", tmp_path / "out", "decilm")
    report = export_model(tmp_path / "child", tmp_path / "out", "decilm", engines=())
    assert len(report.refusals["vllm"]) == 3 and report.refusals["transformers"] == []
    page = (tmp_path / "out" / "README.md").read_text()
    assert "**no**\n  - layer 0 has an FFN" in page


def test_engines_asked_for_are_heeded(child, tmp_path):
    with pytest.raises(ConfigError, match="vllm-cpu"):
        export_model(child, tmp_path / "out", "decilm", engines=["vllmcpu"])
    save_model(random_model(head_dim=144), tmp_path / "odd")
    with pytest.raises(ExportError, match="144"):
        export_model(tmp_path / "odd", tmp_path / "out", "decilm", engines=["vllm-cpu"])


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


def test_the_place_must_be_absent_or_empty(child, tmp_path):
    (tmp_path / "out").mkdir()
    export_model(child, tmp_path / "out", "decilm", check=False)
    with pytest.raises(ExportError, match=str(tmp_path)):
        export_model(child, tmp_path / "out", "decilm")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match=str(tmp_path)):
        export_model(child, tmp_path / "file", "decilm")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ExportError, match="model.gguf"):
        export_model(child, tmp_path / "model.gguf", "gguf")


def test_files_that_compute_something_else_are_not_kept(child, tmp_path, monkeypatch):
    def corrupt(module, directory, **keys):
        write_model(module, directory, **keys)
        with (directory / "model.safetensors").open("r+b") as file:
            file.seek(-40_000, 2)
            file.write(b"\x3f" * 4_000)

    monkeypatch.setattr(write, "write_model", corrupt)
    with pytest.raises(ExportError, match="greedy tokens"):
        export_model(child, tmp_path / "out", "decilm")
    assert [p.name for p in tmp_path.iterdir()] == ["child"]


def test_a_full_disk_leaves_nothing_behind(child, tmp_path, monkeypatch):
    def full(module, directory, **keys):
        (directory / "config.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write, "write_model", full)
    with pytest.raises(WriteError, match="No space left"):
        export_model(child, tmp_path / "out", "decilm")
    assert [p.name for p in tmp_path.iterdir()] == ["child"]


def test_what_a_killed_export_left_is_removed(child, tmp_path):
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp/model.safetensors").write_text("half")
    export_model(child, tmp_path / "out", "decilm", check=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["child", "out"]


def test_unknown_format_is_answered_with_the_nearest(child, tmp_path):
    with pytest.raises(ConfigError, match="ggfu.*gguf"):
        export_model(child, tmp_path / "out", "ggfu")


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


@pytest.mark.parametrize("form", ["hf", "decilm", "gguf", "padded", "puzzletron", "per_layer"])
def test_the_files_have_the_sources_dtype(form: str, tmp_path: Path):
    module = random_model(EQUAL, rope_scaling=None).to(torch.bfloat16)
    save_model(module, tmp_path / "child")
    write_byte_tokenizer(tmp_path / "child")
    report = export_model(tmp_path / "child", tmp_path / "out", form)
    assert report.dtype == "bfloat16" and report.parity is not None
    assert report.parity.max_logit_difference == 0.0
    assert not any("rounded" in note for note in report.notes)
    again = load_model(tmp_path / "out", dtype=None).state_dict()
    for key, value in module.state_dict().items():
        assert again[key].dtype == (
            torch.float32 if form == "gguf" and value.ndim < 2 else value.dtype
        )
        assert again[key].float().equal(value.float())
    if form != "gguf":
        assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    page = (tmp_path / "out/README.md").read_text()
    assert "float32" not in page and (form not in ("hf", "decilm") or "--dtype bfloat16" in page)


@pytest.mark.parametrize(("form", "dtype"), [("hf", "float32"), ("gguf", "float16")])
def test_another_dtype_is_written_and_what_it_moves_is_said(form: str, dtype: str, tmp_path: Path):
    save_model(random_model(EQUAL, rope_scaling=None).to(torch.bfloat16), tmp_path / "child")
    write_byte_tokenizer(tmp_path / "child")
    arguments = ["export", str(tmp_path / "child"), str(tmp_path / "out"), "--format", form]
    told = CliRunner().invoke(app, [*arguments, "--dtype", dtype, "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["dtype"] == dtype
    assert str(load_model(tmp_path / "out", dtype=None).head.dtype) == f"torch.{dtype}"
    rounds = dtype == "float16"
    assert ("rounded to float16; on fixed prompts 64 of 64" in told.stdout) == rounds
    refused = CliRunner().invoke(app, [*arguments, "--dtype", "int8"])
    assert refused.exit_code == 2 and "float32 or bfloat16 or float16" in refused.output


def test_what_fp8_cannot_be_is_refused(child: Path, tmp_path: Path):
    with pytest.raises(ExportError, match="decilm, hf, padded"):
        export_model(child, tmp_path / "out", "gguf", quantize="fp8")
    export_model(child, tmp_path / "out", "decilm", quantize="fp8")
    path = tmp_path / "out/config.json"
    told = json.loads(path.read_text())
    told["quantization_config"]["format"] = "pack-quantized"
    path.write_text(json.dumps(told))
    with pytest.raises(ConfigError, match="quantization_config"):
        load_config(tmp_path / "out")


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
