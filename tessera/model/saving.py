"""Models out of memory: a directory in Hugging Face's layout, whole or not at all.

A sibling directory is written and renamed into place. A model that is spread over processes is
written by all of them, each some of the files (`sharded.py`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tessera import dist
from tessera.model.families import config_dict, config_json
from tessera.model.names import hf_name
from tessera.model.sharded import collect, files_of, is_sharded
from tessera.model.source import CheckpointError, some
from tessera.model.transformer import Transformer
from tessera.runs.files import sync, writing

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


def save_model(
    module: Transformer,
    directory: str | Path,
    *,
    tokenizer_from: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model directory, whole or not at all, replacing the model that was there.

    tokenizer_from: a directory whose tokenizer files are copied beside the weights. dtype: of the
    files, the module's own if None. Stock software loads the directory of a homogeneous model.
    Every process of a job calls this; a model that is whole in each of them is written by the main
    one. Raises WriteError (disk full) with the old directory intact, CheckpointError where the
    directory is not a model's.
    """
    together = is_sharded(module)
    if not (together or dist.is_main()):
        return
    with (replacing_together if together else replacing)(Path(directory)) as temporary:
        write_model(module, temporary, max_shard_bytes, together=together, dtype=dtype)
        if dist.is_main() and tokenizer_from is not None:
            copy_tokenizer(Path(tokenizer_from), temporary)


def write_model(
    module: Transformer,
    directory: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    together: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Write weights and config into a directory that is there, by this process alone.

    together: by every process of a job, each some of the shards.
    """
    tensors = {hf_name(key): tensor for key, tensor in module.state_dict().items()}
    write_tensors(tensors, directory, max_shard_bytes, together=together, dtype=dtype)
    if dist.is_main() or not together:
        values = config_dict(module.config)
        values["torch_dtype"] = str(dtype or module.head.dtype).removeprefix("torch.")
        (directory / "config.json").write_text(config_json(values), encoding="utf-8")


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


@contextmanager
def replacing_together(directory: Path) -> Iterator[Path]:
    """`replacing` for all processes of a job at once, on a file system that they share.

    The main one makes the directory and renames it when everybody has written.
    """
    if dist.is_main():
        with replacing(directory) as temporary:
            dist.broadcast(temporary)
            yield temporary
            dist.barrier()
    else:
        yield dist.broadcast(None)
        dist.barrier()
    dist.barrier()


def _refuse_foreign(directory: Path) -> None:
    entries = sorted(directory.iterdir()) if directory.exists() else []
    foreign = [e.name for e in entries if e.is_dir() or e.suffix not in _MODEL_SUFFIXES]
    if entries and (foreign or not (directory / "config.json").is_file()):
        raise CheckpointError(
            f"{directory} holds what is no model's ({some(foreign or [e.name for e in entries])}) "
            "and would be replaced; choose another directory"
        )


def write_tensors(
    tensors: Mapping[str, Tensor],
    directory: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    together: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Write tensors as `model.safetensors`, or as shards and their index when they are larger.

    together: every process of the job calls this, and each writes some of the shards. Raises
    OSError when the system refuses, which `replacing` turns into a WriteError.
    """
    files = files_of(tensors, max_shard_bytes, dist.world() if together else 1)
    count = len(files)
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    names = names if count > 1 else [SINGLE]
    if together:
        for number, shard in collect(tensors, files).items():
            _write_shard(shard, directory / names[number], dtype)
    else:
        for file, keys in zip(names, files, strict=True):
            _write_shard({key: tensors[key] for key in keys}, directory / file, dtype)
    if count > 1 and (dist.is_main() or not together):
        places = {key: file for file, keys in zip(names, files, strict=True) for key in keys}
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(tensors: Mapping[str, Tensor], file: Path, dtype: torch.dtype | None) -> None:
    plain = {name: one.detach().to("cpu", dtype).contiguous() for name, one in tensors.items()}
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
