"""A `MODEL` argument: a finished run, a Hugging Face directory or a hub id, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tessera.model.source import CheckpointError, load_config, resolve
from tessera.runs.run import Run
from tests import tiny


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tiny.saved(tmp_path / "hf")


def open_run(path: Path, stage: str = "kd") -> Run:
    return Run.open(path, stage=stage, config={}, inputs={}, seed=0, quiet=True)


def test_a_directory_is_itself(directory):
    assert resolve(directory) == resolve(str(directory)) == directory
    assert resolve(directory / "config.json") == directory
    assert load_config(directory) == load_config(directory / "config.json")


def test_a_finished_run_is_its_model(tmp_path):
    with open_run(tmp_path / "kd") as run:
        tiny.saved(run.model_path)
        run.finish()
    assert resolve(tmp_path / "kd") == tmp_path / "kd/model"
    assert load_config(tmp_path / "kd") == tiny.config(tiny.PARENT)


def test_a_run_that_is_not_done_is_refused(tmp_path):
    with open_run(tmp_path / "kd") as run:
        tiny.saved(run.model_path)
        with pytest.raises(CheckpointError, match="running"):
            resolve(tmp_path / "kd")


def test_a_run_without_a_model_is_refused(tmp_path):
    with open_run(tmp_path / "score", "score") as run:
        run.finish()
    with pytest.raises(CheckpointError, match="score"):
        resolve(tmp_path / "score")


def test_a_path_that_is_nothing_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="absent"):
        resolve(tmp_path / "absent")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        resolve(tmp_path / "pytorch_model.bin")
    (tmp_path / "notes.md").touch()
    with pytest.raises(CheckpointError, match="notes.md"):
        resolve(tmp_path / "notes.md")


def test_a_directory_of_runs_names_them(tmp_path):
    (tmp_path / "kd").mkdir()
    (tmp_path / "kd" / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json.*kd"):
        resolve(tmp_path)


def test_a_hub_that_cannot_be_reached_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="nobody/no-such-model"):
        resolve("nobody/no-such-model")


def test_a_hub_id_fetches_safetensors_and_never_pickle(monkeypatch, directory):
    asked = {}

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve("owner/name") == directory
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["owner/name"])


def test_a_config_is_read_without_torch(directory):
    code = (
        "import sys; from tessera.model.source import load_config; "
        f"load_config({str(directory)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
