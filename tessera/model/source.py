"""What a `MODEL` argument means, and what a run was made from. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tessera.model import gguf
from tessera.model.config import ModelConfig
from tessera.model.families import read_config
from tessera.runs.files import RunError
from tessera.runs.run import find_manifest, read_json, read_manifest, runs_in
from tessera.table import nearest

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit; the text says which file or tensor."""


def load_config(source: str | Path) -> ModelConfig:
    """The config of a run, a Hugging Face directory, a `config.json` or a hub id.

    Raises CheckpointError where `resolve` does, ConfigError for what is not supported.
    """
    path = Path(source)
    return read_config(path if path.is_file() and path.suffix == ".json" else resolve(source))


def resolve(source: str | Path) -> Path:
    """The directory that holds `config.json`: of a finished run, a model directory, a GGUF file or
    a hub id.

    Raises CheckpointError.
    """
    path = Path(source)
    if path.is_dir():
        return _model_in(path)
    if path.is_file():
        if path.name == "config.json" or path.suffix == ".safetensors":
            return path.parent
        if path.suffix == ".gguf" or gguf.is_gguf(path):
            return gguf.directory_of(path)
        if path.suffix in PICKLES:
            raise pickle_error(path)
        raise CheckpointError(f"{path} is a file; give the directory that holds its config.json")
    if is_hub_id(source):
        return _download(str(source))
    raise CheckpointError(
        f"{source} does not exist; give a run directory, a Hugging Face directory or a hub id "
        "(owner/name)"
    )


def is_hub_id(source: str | Path) -> bool:
    """True for `owner/name` where nothing here has that name."""
    named = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(source))
    return named is not None and not Path(source).exists()


def _model_in(directory: Path) -> Path:
    if run := find_manifest(directory):
        if run.status != "done":
            raise CheckpointError(f"{directory} is not done ({run.status}); run its recipe again")
        if not (directory / "model" / "config.json").is_file():
            raise CheckpointError(f"{directory}: stage {run.stage!r} gives no model")
        return directory / "model"
    if (directory / "config.json").is_file():
        return directory
    if files := sorted(directory.glob("*.gguf")):
        return _one_of(files)
    runs = [run.name for run in runs_in(directory)]
    hint = f"; it holds the runs {', '.join(runs)}: name one" if runs else ""
    raise CheckpointError(f"{directory} holds no config.json, so it is no model directory{hint}")


def _one_of(files: Sequence[Path]) -> Path:
    """The directory of the one model among these GGUF files. Raises CheckpointError."""
    first = [one for one in files if not re.search(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", one.name)]
    if len(first) == 1:
        return gguf.directory_of(first[0])
    names = ", ".join(one.name for one in first[:5])
    raise CheckpointError(f"{files[0].parent} holds several GGUF models: name one of {names}")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = ["model*.safetensors", "*.json", "tokenizer*", "merges.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0].removeprefix("Got: ").rstrip(".")
        raise CheckpointError(
            f"{name} is no directory here, and the Hugging Face hub did not give it: {reason}"
        ) from error


def pickle_error(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file} is a pickle, which can run any code when it is read. Where you trust it, convert "
        "it: transformers' AutoModelForCausalLM.from_pretrained(IN).save_pretrained(OUT)"
    )


def model_config(path: str | Path) -> ModelConfig:
    """The architecture of a run, finished or not, of a model directory or of a config.json.

    A run's is that of its model, or the one its search chose. Raises RunError where there is none.
    """
    path = Path(path)
    if path.is_file() and gguf.is_gguf(path):
        return read_config(gguf.directory_of(path))
    for file in (path, path / "config.json", path / "model" / "config.json"):
        if file.is_file():
            return read_config(file)
    if (path / "tables" / "architecture.json").is_file():
        parent = path.parent / read_manifest(path).inputs["parent"]["path"]
        return model_config(parent).with_words(read_json(path, "architecture")["words"])
    if not path.exists():
        siblings = sorted(p.name for p in path.parent.glob("*") if not p.name.startswith("."))
        raise RunError(f"there is no {path}; {nearest(path.name, siblings)}")
    raise RunError(f"{path} is no run, no model directory and no config.json")


def ancestors(
    path: Path, found: dict[Path, dict[str, Any]] | None = None
) -> dict[Path, dict[str, Any]]:
    """What a run was made from, ancestors first, itself last: name, stage and inputs by directory.

    found: what is known already, not read again. The directories are resolved.
    """
    found = {} if found is None else found
    key = path.resolve()
    if key in found:
        return found
    inputs: dict[str, Any] = {}
    manifest = find_manifest(path)
    for need, reference in manifest.inputs.items() if manifest else ():
        references = reference if isinstance(reference, list) else [reference]
        given = [one["path"] for one in references if one]
        inputs |= {need: ", ".join(given)} if given else {}
        for one in given:  # relative to the directory that holds the run
            ancestors(path.parent / one, found)
    name, stage = (manifest.name, manifest.stage) if manifest else (str(path), None)
    found[key] = {"name": name, "stage": stage, "inputs": inputs}
    return found


def holder(path: str | Path) -> Path:
    """The run that a path to its model or to its config.json lies in; else the path itself."""
    path = Path(path)
    for above in (path, *path.parents[:2]):
        if (above / "run.json").is_file():
            return above
    return path


def origin(path: Path) -> Path | None:
    """The parent that a run's model was cut from; None for a run that has none."""
    if (manifest := find_manifest(path)) is None:
        return None
    for need in ("teacher", "parent"):
        if manifest.inputs.get(need):
            return path.parent / manifest.inputs[need]["path"]
    model = manifest.inputs.get("model")
    return origin(path.parent / model["path"]) if model else None
