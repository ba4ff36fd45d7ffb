"""What a `MODEL` argument means, and what a run was made from. Torch-free."""

from __future__ import annotations

import json
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
        if path.name == "config.json":
            return path.parent
        if path.suffix == ".safetensors" and not path.name.startswith("adapter_"):
            return path.parent
        if path.suffix == ".gguf" or gguf.is_gguf(path):
            return gguf.directory_of(path)
        raise CheckpointError(
            _what_is(path) or f"{path} is a file; give the directory that holds its config.json"
        )
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
        if (directory / "adapter_config.json").is_file() and not any(directory.glob("model*")):
            raise CheckpointError(_adapter(directory))
        return directory
    if files := sorted(directory.glob("*.gguf")):
        return _one_of(files)
    if snapshot := _snapshot(directory):
        return _model_in(snapshot)
    if told := _what_is(directory):
        raise CheckpointError(told)
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


# What people have in the place of a model, and what to give instead.


def _snapshot(directory: Path) -> Path | None:
    """The snapshot that a hub cache's directory of one model (`models--owner--name`) is at."""
    root = directory.parent if directory.name == "snapshots" else directory
    if not (root / "snapshots").is_dir():
        return None
    found = sorted(one for one in (root / "snapshots").iterdir() if one.is_dir())
    main = root / "refs" / "main"
    if main.is_file() and (at := root / "snapshots" / main.read_text().strip()).is_dir():
        return at
    if len(found) == 1:
        return found[0]
    listed = ", ".join(str(one) for one in found) or "none: download the model again"
    raise CheckpointError(
        f"{directory} is a model's directory in the Hugging Face cache; give one of its snapshots "
        f"({listed})"
    )


def _what_is(path: Path) -> str | None:
    """What a file or a directory is, where it is not a model that can be read."""
    here = sorted(path.iterdir()) if path.is_dir() else [path]
    names = {file.name for file in here}
    if names & {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"}:
        return _adapter(path if path.is_dir() else path.parent)
    if models := [name for name in sorted(names) if name.startswith("models--")]:
        listed = ", ".join(models[:3]) + (f" and {len(models) - 3} more" if models[3:] else "")
        return f"{path} is the Hugging Face cache; give one model of it ({listed})"
    if "params.json" in names:
        return (
            f"{path} is a checkpoint in Meta's or Mistral's own format (params.json); give the one "
            "in transformers' format (config.json, model*.safetensors), or convert it"
        )
    if pickles := [file for file in here if file.suffix in PICKLES]:
        return str(pickle_error(pickles[0]))
    if "model_index.json" in names:
        return f"{path} holds an image model of diffusers (model_index.json), no language model"
    if path.suffix in (".zip", ".tar", ".gz", ".tgz", ".zst", ".xz", ".bz2", ".7z"):
        return f"{path} is an archive; unpack it and give the directory that holds its config.json"
    return None


def _adapter(directory: Path) -> str:
    """What to do with a LoRA adapter."""
    try:
        told = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        base = f" of {told['base_model_name_or_path']}"
    except (OSError, ValueError, KeyError, TypeError):
        base = ""
    return (
        f"{directory} holds an adapter (LoRA){base}, which is no whole model. Merge it with peft "
        f"and give the result: AutoPeftModelForCausalLM.from_pretrained({str(directory)!r})"
        ".merge_and_unload().save_pretrained(OUT), and its tokenizer into OUT too"
    )


def no_weights(directory: Path) -> CheckpointError:
    """Why a directory with a config.json holds no weights that can be read."""
    return CheckpointError(
        _what_is(directory)
        or f"{directory} holds neither model.safetensors nor model.safetensors.index.json beside "
        "its config.json; download it again"
    )


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
    if path.is_dir() and (snapshot := _snapshot(path)):
        return model_config(snapshot)
    raise RunError(_what_is(path) or f"{path} is no run, no model directory and no config.json")


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
    try:
        manifest = find_manifest(path)
    except RunError:  # a damaged one is told of where it is shown itself
        manifest = None
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
