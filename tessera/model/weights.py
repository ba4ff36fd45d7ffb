"""Checkpoints in and out: sharded safetensors in Hugging Face's layout, never pickle.

Everything is checked against `config.json` from the files' headers before a weight is read: shards
present and whole, names, shapes. Loading builds the module on the meta device and assigns tensors,
so a model is in memory once. Saving writes a sibling directory and renames it into place.
Quantized checkpoints are not read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tessera.disk import sync, writing
from tessera.model.families import config_dict, config_json, read_config
from tessera.model.names import hf_name
from tessera.model.source import PICKLES, CheckpointError, load_config, pickle_error, resolve
from tessera.model.transformer import Transformer

__all__ = [
    "CheckpointError",
    "copy_tokenizer",
    "find_tensors",
    "load_config",
    "load_model",
    "replacing",
    "resolve",
    "save_model",
    "write_tensors",
]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
)
MAX_SHARD_BYTES = 5_000_000_000
_MODEL_SUFFIXES = (".json", ".safetensors", ".model", ".jinja", ".txt", ".py", ".md")
_MAX_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies and what shape its file says it has."""

    file: Path
    shape: tuple[int, ...]


def load_model(
    source: str | Path,
    *,
    frozen: bool = False,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
) -> Transformer:
    """A model of its own from a finished run, a Hugging Face directory or a hub id.

    frozen: no gradients, evaluation mode (teachers and references); dtype: None keeps what is
    stored. Nothing is shared with any other load. Raises CheckpointError (files, tensors) or
    ConfigError (`config.json`).
    """
    directory = resolve(source)
    config = read_config(directory)
    stored = find_tensors(directory)
    with torch.device("meta"):
        module = Transformer(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    names = {hf_name(key): key for key in shapes}
    _check({name: shapes[key] for name, key in names.items()}, stored, directory)
    if config.tie_word_embeddings:
        _check_tied(stored)
    tensors = {
        names[name]: tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)
        for name, tensor in _read({name: stored[name] for name in names})
    }
    module.load_state_dict(tensors, assign=True)
    return module.requires_grad_(False).eval() if frozen else module


def find_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a directory by its name there, from the headers; no weights are read.

    Raises CheckpointError: a shard missing, truncated, corrupt, or without a tensor the index
    puts there; no safetensors at all; pickle.
    """
    if (directory / INDEX).is_file():
        return _find_sharded(directory)
    if (directory / SINGLE).is_file():
        file = directory / SINGLE
        return {name: Stored(file, shape) for name, shape in read_header(file).items()}
    for file in sorted(directory.iterdir()):
        if file.suffix in PICKLES:
            raise pickle_error(file)
    raise CheckpointError(f"{directory} holds neither {SINGLE} nor {INDEX}")


def _find_sharded(directory: Path) -> dict[str, Stored]:
    places = _weight_map(directory / INDEX)
    shards = sorted(set(places.values()))
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory} lacks {_some(missing)}, {len(missing)} of the {len(shards)} shards that "
            f"{INDEX} lists; copy or download again"
        )
    headers = {shard: read_header(directory / shard) for shard in shards}
    for name, shard in places.items():
        if name not in headers[shard]:
            raise CheckpointError(
                f"{directory / INDEX} puts {name} in {shard}, which does not hold it; the index "
                "and the shards are not of one checkpoint"
            )
    return {name: Stored(directory / shard, headers[shard][name]) for name, shard in places.items()}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        places = json.loads(index.read_text())["weight_map"]
        assert all(Path(shard).name == shard for shard in places.values())
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise CheckpointError(
            f"{index} is not an index of shards (a JSON object whose weight_map names a file for "
            "every tensor)"
        ) from None
    return places


def read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, having checked that the file is whole.

    Raises CheckpointError with the bytes expected and found.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        start = handle.read(8)
        if start == b"version ":
            raise CheckpointError(f"{file} is a Git LFS pointer, not the weights: git lfs pull")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > _MAX_HEADER:
            raise CheckpointError(f"{file} is corrupt, or no safetensors file ({size} bytes)")
        if size < 8 + length:
            raise _truncated(file, 8 + length, size, "for its header alone")
        raw = handle.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        data = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file} is corrupt: its header cannot be read ({error})") from None
    if size != 8 + length + data:
        raise _truncated(file, 8 + length + data, size, "by its header")
    return shapes


def _truncated(file: Path, expected: int, found: int, why: str) -> CheckpointError:
    state = "truncated" if found < expected else "corrupt"
    return CheckpointError(
        f"{file} is {state}: expected {expected} bytes {why}, found {found}; "
        "copy or download it again"
    )


def _check(
    expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored], directory: Path
) -> None:
    """Names and shapes in the files against those the config asks for."""
    missing = [name for name in expected if name not in stored]
    if missing:
        hint = ""
        if missing == ["lm_head.weight"]:
            hint = "; if the model ties them, set tie_word_embeddings to true in config.json"
        raise CheckpointError(
            f"{directory} lacks {_some(missing)}, which config.json asks for{hint}"
        )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise CheckpointError(
                f"{name} in {stored[name].file} is {list(stored[name].shape)}; config.json asks "
                f"for {list(shape)}"
            )
    unexpected = [name for name in stored if name not in expected and not _ignored(name)]
    if unexpected and unexpected != ["lm_head.weight"]:
        raise CheckpointError(
            f"{directory} holds {_some(unexpected)}, for which config.json has no place; is it "
            "the config of another model?"
        )


def _ignored(name: str) -> bool:
    return name.endswith("rotary_emb.inv_freq")  # a buffer of old transformers, computed here


def _check_tied(stored: Mapping[str, Stored]) -> None:
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    if names[1] not in stored:
        return
    tensors = dict(_read({name: stored[name] for name in names}))
    if not torch.equal(*(tensors[name] for name in names)):
        raise CheckpointError(
            f"config.json says tie_word_embeddings, but {names[1]} in {stored[names[1]].file} "
            f"differs from {names[0]}; set tie_word_embeddings to false to use both"
        )


def _read(stored: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, shard by shard; each is a view of its file until it is copied."""
    for file in sorted({place.file for place in stored.values()}):
        try:
            with safe_open(file, framework="pt") as shard:
                for name in (name for name, place in stored.items() if place.file == file):
                    tensor = shard.get_tensor(name)
                    if not tensor.is_floating_point():
                        raise CheckpointError(
                            f"{name} in {file} is {tensor.dtype}; quantized checkpoints are not "
                            "supported, give the plain one"
                        )
                    yield name, tensor
        except SafetensorError as error:
            raise CheckpointError(f"{file} is corrupt: {error}") from None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def save_model(
    module: Transformer,
    directory: str | Path,
    *,
    tokenizer_from: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model directory, whole or not at all, replacing the model that was there.

    tokenizer_from: a directory whose tokenizer files are copied beside the weights. Stock
    software loads the directory of a homogeneous model. Raises WriteError (disk full) with the
    old directory intact, CheckpointError where the directory is not a model's.
    """
    values = config_dict(module.config)
    values["torch_dtype"] = str(module.head.dtype).removeprefix("torch.")
    with replacing(Path(directory)) as temporary:
        (temporary / "config.json").write_text(config_json(values), encoding="utf-8")
        tensors = {hf_name(key): tensor for key, tensor in module.state_dict().items()}
        write_tensors(tensors, temporary, max_shard_bytes)
        if tokenizer_from is not None:
            copy_tokenizer(Path(tokenizer_from), temporary)


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """An empty sibling directory that takes the place of `directory` when the block succeeds.

    Raises WriteError when the system refuses a write; what stood there is then intact.
    Raises CheckpointError before anything is written where `directory` holds what is no model's.
    """
    directory = directory.resolve()
    temporary, old = (directory.with_name(f".{directory.name}.{end}") for end in ("tmp", "old"))
    with writing(directory):
        if old.exists() and not directory.exists():  # killed between the two renames below
            os.replace(old, directory)
        _refuse_foreign(directory)
        for left_over in (temporary, old):
            shutil.rmtree(left_over, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            sync(*temporary.iterdir(), temporary)
            if directory.exists():
                os.replace(directory, old)
            os.replace(temporary, directory)
            sync(directory.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _refuse_foreign(directory: Path) -> None:
    entries = sorted(directory.iterdir()) if directory.exists() else []
    foreign = [e.name for e in entries if e.is_dir() or e.suffix not in _MODEL_SUFFIXES]
    if entries and (foreign or not (directory / "config.json").is_file()):
        raise CheckpointError(
            f"{directory} holds what is no model's ({_some(foreign or [e.name for e in entries])}) "
            "and would be replaced; choose another directory"
        )


def write_tensors(
    tensors: Mapping[str, Tensor], directory: Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write tensors as `model.safetensors`, or as shards and their index when they are larger.

    Raises OSError when the system refuses, which `replacing` turns into a WriteError.
    """
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        _write_shard(shards[0], directory / SINGLE)
        return
    places = {}
    for number, shard in enumerate(shards, 1):
        file = directory / f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(shard, file)
        places |= dict.fromkeys(shard, file.name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(tensors: Mapping[str, Tensor], file: Path) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, file, metadata={"format": "pt"})
    except SafetensorError as error:  # carries the system's error as text only
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy what there is of tokenizer files, chat template and generation config.

    Raises CheckpointError where `source` is no directory.
    """
    if not source.is_dir():
        raise CheckpointError(f"{source} is no directory to copy a tokenizer from")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
