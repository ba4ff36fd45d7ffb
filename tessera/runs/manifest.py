"""The manifest of a run directory, and reading what a finished run holds.

A run is known by its fingerprint: a hash of stage, resolved config, seed and the fingerprints of
its inputs. It follows from words alone, so a whole recipe's fingerprints are known before any of
it is run. Writing is `run.py`'s.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from tessera.runs.files import RunError, file_identity, fingerprint

Status = Literal["running", "done", "failed", "interrupted"]
EXECUTION = {  # of a `train` table
    "parallel",
    "save_seconds",
    "save_total_limit",
    "report_to",
    "quiet_seconds",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The contents of `run.json`."""

    name: str
    stage: str
    status: Status
    fingerprint: str
    seed: int
    config: dict[str, Any]
    inputs: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    started: str = ""
    finished: str | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of the main process and the children it has waited for
    error: str | None = None


def fingerprint_path(path: Path) -> str:
    """What stands for the contents of a path: a finished run's own fingerprint, otherwise names,
    sizes and the first and last MiB of every file, so that hundreds of GB cost milliseconds.

    Raises RunError for a run that is not done and for a path that does not exist.
    """
    if (path / "run.json").is_file():
        manifest = read_manifest(path)
        if manifest.status != "done":
            raise RunError(
                f"{path} is not finished (its status is {manifest.status}), so nothing may read "
                "it; run its recipe again to finish it"
            )
        return manifest.fingerprint
    if path.is_file():
        return fingerprint([path.name, *file_identity(path)])
    if not path.is_dir():
        raise RunError(f"{path} does not exist; give a run, a model directory or a file")
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    return fingerprint([[str(p.relative_to(path)), *file_identity(p)] for p in files])


def run_fingerprint(
    stage: str, config: Mapping[str, Any], seed: int, inputs: Mapping[str, Any]
) -> str:
    """The identity of a run; `inputs` holds fingerprints, by need, None for an absent one.

    How a training is carried out (`EXECUTION`) is no part of it: it may go on on other machines.
    """
    return fingerprint([stage, what_is_made(config), seed, dict(inputs)])


def what_is_made(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the keys of its `train` table that change how, and not what."""
    train = config.get("train")
    if not isinstance(train, Mapping):
        return dict(config)
    return {**config, "train": {k: v for k, v in train.items() if k not in EXECUTION}}


def read_manifest(path: Path) -> Manifest:
    """The manifest of a run directory. Raises RunError when there is none or it is not one."""
    file = path / "run.json"
    try:
        value = json.loads(file.read_text())
        manifest = Manifest(**value)
    except FileNotFoundError:
        raise RunError(f"{path} is no run directory: it holds no run.json") from None
    except (json.JSONDecodeError, TypeError) as error:
        raise RunError(f"{file} is not a manifest of tessera's: {error}") from None
    if manifest.status not in get_args(Status):
        allowed = ", ".join(get_args(Status))
        raise RunError(f"{file}: status {manifest.status!r} is none of {allowed}")
    return manifest


def runs_in(folder: Path, depth: str = "*") -> list[Path]:
    """The run directories below a folder, without those that another is being made for."""
    found = folder.glob(f"{depth}/run.json") if folder.is_dir() else []
    return sorted(file.parent for file in found if not file.parent.name.startswith("."))


def is_done(path: Path) -> bool:
    """True for a finished run; everything else may not be read."""
    return (path / "run.json").is_file() and read_manifest(path).status == "done"


def read_table(path: Path, name: str) -> list[dict[str, Any]]:
    """The rows of `tables/NAME.jsonl`. Raises RunError naming the tables there are."""
    file = path / "tables" / f"{name}.jsonl"
    if not file.is_file():
        raise RunError(f"{path} has no table {name!r}; it has: {_tables_of(path)}")
    return [json.loads(line) for line in file.read_text().split("\n") if line]


def read_json(path: Path, name: str) -> Any:
    """The value of `tables/NAME.json`. Raises RunError naming the tables there are."""
    file = path / "tables" / f"{name}.json"
    if not file.is_file():
        raise RunError(f"{path} has no {name!r}; it has: {_tables_of(path)}")
    return json.loads(file.read_text())


def _tables_of(path: Path) -> str:
    names = sorted(p.name for p in (path / "tables").glob("*.json*"))
    return ", ".join(names) or "none"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged steps of a run; a line that a crash tore in half is no step."""
    return _read_lines(path / "metrics.jsonl")


def read_timings(path: Path) -> list[dict[str, Any]]:
    """How fast the logged steps of a run were: seconds, tokens a second, MFU."""
    return _read_lines(path / "timings.jsonl")


def _read_lines(file: Path) -> list[dict[str, Any]]:
    return whole_lines(file)[0] if file.is_file() else []


def whole_lines(file: Path) -> tuple[list[dict[str, Any]], bool]:
    """The complete records of a JSON-lines file, and whether the file ends in half of one."""
    *lines, tail = file.read_bytes().split(b"\n")
    try:
        return [json.loads(line) for line in lines], tail != b""
    except json.JSONDecodeError as error:
        raise RunError(f"{file} holds a line that is not JSON ({error}); delete the run") from None


def versions() -> dict[str, str]:
    """Which software made a run."""
    found = {"python": platform.python_version()}
    for package in ("tessera", "torch", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def now() -> dt.datetime:
    """The time in UTC."""
    return dt.datetime.now(dt.UTC)
