"""A parent that cannot be read stops a recipe before its first stage; a good one stays as it is."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tessera.model import tensors
from tessera.model.checkpoint import save_model
from tessera.puzzle.parent import ParentConfig, stage
from tessera.runs.recipe import RecipeError, validate
from tessera.runs.run import Run
from tests import tiny


def test_a_parent_is_looked_at_before_anything_runs(tmp_path):
    with pytest.raises(RecipeError, match=r"parent\.path: .*absent does not exist"):
        validate(ParentConfig, {"path": str(tmp_path / "absent")}, "parent")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(RecipeError, match=r"parent\.path: .*unsupported architecture"):
        validate(ParentConfig, {"path": str(tmp_path)}, "parent")


def test_a_hub_id_is_not_fetched_to_check_it():
    assert validate(ParentConfig, {"path": "owner/name"}, "parent").path == "owner/name"


def imported(source: Path, place: Path, **keys: str) -> dict[str, torch.Tensor]:
    config = validate(ParentConfig, {"path": str(source), **keys}, "parent")
    with Run.open(place, stage="parent", config={}, inputs={}, seed=0, quiet=True) as run:
        stage(config, run, {"data": None})
    return load_file(place / "model/model.safetensors")


def test_an_import_keeps_each_tensors_dtype_unless_told(tmp_path: Path):
    module = tiny.model().to(torch.bfloat16)
    module.norm.float()
    save_model(module, tmp_path / "in")
    before = load_file(tmp_path / "in/model.safetensors")
    found = imported(tmp_path / "in", tmp_path / "kept")
    assert {k: (v.dtype, v.float().tolist()) for k, v in found.items()} == {
        k: (v.dtype, v.float().tolist()) for k, v in before.items()
    }
    config = tmp_path / "kept/model/config.json"
    assert json.loads(config.read_text())["torch_dtype"] == "bfloat16"
    half = imported(tmp_path / "in", tmp_path / "half", dtype="float16")
    assert {one.dtype for one in half.values()} == {torch.float16}


def test_an_import_holds_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_model(tiny.model(), tmp_path / "in")
    held: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most, read = [], tensors._read_tensor

    def counted(file: Path, name: str) -> torch.Tensor:
        held.add(found := read(file, name))
        most.append(len(held))
        return found

    monkeypatch.setattr(tensors, "_read_tensor", counted)
    imported(tmp_path / "in", tmp_path / "out")
    assert len(most) > 20 and max(most) <= 2  # the next is read before the last is let go
