"""Tensors in files: found by their headers, read when they are asked for, written one at a time.

safetensors in and out, GGUF in, never pickle. However large the files, a process holds one tensor.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tessera import dist
from tessera.model import gguf
from tessera.model.source import CheckpointError, no_weights
from tessera.progress import Progress
from tessera.runs.files import summed
from tessera.runs.run import require_intact

log = logging.getLogger(__name__)

FileDtype = Literal["float32", "bfloat16", "float16"]  # what models are written in
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class LazyTensor(NamedTuple):
    """A tensor that is read when it is asked for, often as a view of its file.

    file: which that is, for messages.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    file: Path | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def map(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> LazyTensor:
        """What `change` makes of it, of the same shape, when it is read."""
        return self._replace(dtype=dtype, read=lambda: change(self.read()))

    def to(self, dtype: torch.dtype | None) -> LazyTensor:
        """The same in another dtype; None keeps its own."""
        return self if dtype in (None, self.dtype) else self.map(lambda one: one.to(dtype), dtype)


# Reading.

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def find_tensors(directory: Path) -> dict[str, LazyTensor]:
    """Every tensor of a directory by its name there, from the headers; no weights are read.

    Raises CheckpointError: a shard missing, truncated, corrupt, or without a tensor the index
    puts there; no safetensors at all; pickle.
    """
    if (directory / gguf.INDEX).is_file():
        return in_gguf(directory, gguf.tensors(directory))
    if (directory / "adapter_config.json").is_file():
        log.warning("%s also holds an adapter (LoRA), which is not applied", directory)
    index, single = (directory / name for name in (INDEX, SINGLE))
    if single.is_file():  # which transformers looks for first
        if index.is_file() and (others := set(_read_index(index).values()) - {SINGLE}):
            log.warning(
                "%s holds %s and an index of %d other files; %s is read, as transformers does. "
                "Delete what is out of date",
                directory, SINGLE, len(others), SINGLE,
            )  # fmt: skip
        return _prefixed(in_safetensors(single))
    if index.is_file():
        return _prefixed(_find_sharded(directory))
    raise no_weights(directory)


def in_safetensors(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, which safetensors has checked to be whole."""
    with file.open("rb") as handle:
        if handle.read(8) == b"version ":
            raise CheckpointError(f"{file} is a Git LFS pointer, not the weights: git lfs pull")
    found = {}
    with _opened(file) as shard:
        for name in shard.keys():
            part = shard.get_slice(name)
            dtype = _DTYPES.get(part.get_dtype(), torch.uint8)
            read = partial(_read_tensor, file, name)
            found[name] = LazyTensor(tuple(part.get_shape()), dtype, read, file)
    return found


def in_gguf(directory: Path, tensors: Mapping[str, gguf.Tensor]) -> dict[str, LazyTensor]:
    """Tensors of GGUF files in a directory, in float32 where they are quantized."""
    halves = {"F16": torch.float16, "BF16": torch.bfloat16}

    def lazy(one: gguf.Tensor) -> LazyTensor:
        dtype = halves.get(one.type, torch.float32)

        def read() -> Tensor:
            require_intact((directory / one.file).resolve())
            return torch.from_numpy(gguf.read_tensor(directory, one)).view(dtype)

        return LazyTensor(one.shape, dtype, read, directory / one.file)

    return {name: lazy(one) for name, one in tensors.items()}


def _read_tensor(file: Path, name: str) -> Tensor:
    """A view of the file, which is mapped as long as the view is held."""
    require_intact(file)
    with _opened(file) as shard:
        return shard.get_tensor(name)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is truncated or corrupt, {file.stat().st_size} bytes ({error}); copy or "
            "download it again"
        ) from None


def _prefixed(stored: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """A language model's names of the weights, also where the bare model was saved."""
    if "embed_tokens.weight" not in stored or any(name.startswith("model.") for name in stored):
        return stored
    return {n if n == "lm_head.weight" else f"model.{n}": one for n, one in stored.items()}


def _read_index(index: Path) -> dict[str, str]:
    """The file of every tensor."""
    try:
        places: dict[str, str] = json.loads(index.read_text())["weight_map"]
        if all(re.fullmatch(r"[^/\0]{1,200}", shard) for shard in places.values()):
            return places
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise CheckpointError(
        f"{index} is not an index of shards: its weight_map names a file for every tensor"
    )


def _find_sharded(directory: Path) -> dict[str, LazyTensor]:
    index = directory / INDEX
    places = _read_index(index)
    shards = sorted(set(places.values()))
    if missing := [shard for shard in shards if not (directory / shard).is_file()]:
        raise CheckpointError(
            f"{directory} lacks {listed(missing)}, {len(missing)} of the {len(shards)} shards "
            f"that {INDEX} lists; copy or download again"
        )
    headers = {shard: in_safetensors(directory / shard) for shard in shards}
    if lost := [name for name, shard in places.items() if name not in headers[shard]]:
        raise CheckpointError(
            f"{index} puts {lost[0]} in {places[lost[0]]}, which does not hold it; the index and "
            "the shards are not of one checkpoint"
        )
    return {name: headers[shard][name] for name, shard in places.items()}


def listed(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# Writing. A safetensors file is a header in JSON behind its length, and the tensors' bytes: those
# of the widest numbers first, so that each begins at a multiple of its size.

MAX_SHARD_BYTES = 5_000_000_000


def raw(tensor: Tensor) -> np.ndarray:
    """A tensor's bytes, in order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def write_tensors(
    tensors: Mapping[str, LazyTensor], directory: Path | None, together: bool = False
) -> None:
    """Write `model.safetensors`, or shards and their index where that would be too large.

    together: every process of a job calls this, reads every tensor, and writes some of the files;
    of a pipeline, every tensor that it has. directory: None for a process that only takes part in
    reading.
    """
    sizes = {name: one.nbytes for name, one in tensors.items()}
    everyone = dist.gather(sizes) if together else [sizes]
    holders: dict[tuple[str, ...], list[int]] = {}
    for process, held in enumerate(everyone):
        holders.setdefault(tuple(held), []).append(process)
    total = sum({name: size for held in everyone for name, size in held.items()}.values())
    files: list[tuple[list[str], list[int], int]] = []  # names, who has them, who writes
    for processes in holders.values():
        parts = _split(everyone[processes[0]], min(MAX_SHARD_BYTES, -(-total // len(everyone))))
        files += [(p, processes, processes[i % len(processes)]) for i, p in enumerate(parts)]
    count, rank = len(files), dist.rank() if together else 0
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    names = names if count > 1 else [SINGLE]
    for name, (keys, processes, writer) in zip(names, files, strict=True):
        if rank in processes:
            file = directory / name if directory and writer == rank else None
            _write_file({key: tensors[key] for key in keys}, file)
    if directory and count > 1 and rank == 0:
        places = {key: name for name, (keys, *_) in zip(names, files, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(tensors: Mapping[str, LazyTensor], file: Path | None) -> None:
    """file: None for a process that only takes part in reading."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        kind, shape = _NAMES[tensors[name].dtype], tensors[name].shape
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with ExitStack() as stack:
        write = stack.enter_context(summed(file)) if file else None
        if write:
            write(len(text).to_bytes(8, "little") + text)
        label = f"writing {file.name}" if file else ""
        bar = stack.enter_context(Progress(label, len(order), "MB", quiet=file is None))
        for name in order:
            tensor = tensors[name].read()
            if write:
                write(raw(tensor).data)
            bar.advance(1, tensors[name].nbytes / 1e6)


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names by file, in order: no file larger than the limit unless one tensor is."""
    files: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and files[-1]:
            files.append([])
            room = limit
        files[-1].append(name)
        room -= size
    return files
