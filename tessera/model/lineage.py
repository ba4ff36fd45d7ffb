"""What a run was made from, and the architecture it holds; torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tessera.model.config import ModelConfig
from tessera.runs.files import RunError
from tessera.runs.manifest import read_json, read_manifest
from tessera.runs.recipe import nearest


def model_config(path: str | Path) -> ModelConfig:
    """The architecture of a run (its model, or the one its search chose), a model directory or a
    config.json. Raises RunError where there is none."""
    from tessera.model.families import read_config

    path = Path(path)
    for file in (path, path / "config.json", path / "model" / "config.json"):
        if file.is_file():
            return read_config(file)
    if (path / "tables" / "architecture.json").is_file():
        parent = _lineage_path(path, read_manifest(path).inputs["parent"]["path"])
        return model_config(parent).with_words(read_json(path, "architecture")["words"])
    if not path.exists():
        siblings = sorted(p.name for p in path.parent.glob("*") if not p.name.startswith("."))
        raise RunError(f"there is no {path}; {nearest(path.name, siblings)}")
    raise RunError(f"{path} is no run, no model directory and no config.json")


def lineage(path: Path) -> list[dict[str, Any]]:
    """The runs and directories a run was made from, ancestors first, itself last."""
    found: dict[Path, dict[str, Any]] = {}
    _trace(path, found)
    return list(found.values())


def _trace(path: Path, found: dict[Path, dict[str, Any]]) -> None:
    key = path.resolve()
    if key in found:
        return
    if not (path / "run.json").is_file():
        found[key] = {"name": str(path), "stage": None, "inputs": {}}
        return
    manifest = read_manifest(path)
    inputs: dict[str, Any] = {}
    for need, reference in manifest.inputs.items():
        references = reference if isinstance(reference, list) else [reference]
        given = [one["path"] for one in references if one]
        inputs |= {need: ", ".join(given)} if given else {}
        for one in given:
            _trace(_lineage_path(path, one), found)
    found[key] = {"name": manifest.name, "stage": manifest.stage, "inputs": inputs}


def _lineage_path(run: Path, recorded: str) -> Path:
    """An input as its manifest names it: relative to the directory that holds the run."""
    return run.parent / recorded


def ancestors(path: Path) -> list[Path]:
    """The directories a run was made from, ancestors first, itself last; all resolved."""
    found: dict[Path, dict[str, Any]] = {}
    _trace(path, found)
    return list(found)


def holder(path: str | Path) -> Path:
    """The run that a path to its model or to its config.json lies in; else the path itself."""
    path = Path(path)
    for above in (path, *path.parents[:2]):
        if (above / "run.json").is_file():
            return above
    return path


def origin(path: Path) -> Path | None:
    """The parent that a run's model was cut from; None for a run that has none."""
    if not (path / "run.json").is_file():
        return None
    inputs = read_manifest(path).inputs
    for need in ("teacher", "parent"):
        if inputs.get(need):
            return _lineage_path(path, inputs[need]["path"])
    model = inputs.get("model")
    return origin(_lineage_path(path, model["path"])) if model else None
