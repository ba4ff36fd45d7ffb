"""Token files: one flat array of ids and the offsets of its documents, memory-mapped to read.

    tokens/train.npy          uint16 (uint32 above 65,536 ids): all documents, end to end
    tokens/train.offsets.npy  int64 (documents + 1,): document i is ids[offsets[i]:offsets[i + 1]]
    tokens/train.trained.npy  of chats: uint8, the mode of each id that is trained, 0 of others

A writer streams into a temporary name and renames at the end, offsets last, so a pair that exists
is whole. `TokenCache` keeps what files became for the next recipe.
"""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tessera.data.readers import DataError
from tessera.runs.files import atomic_write, fingerprint, sync, writing

HEADER_BYTES = 128
BUFFER_IDS = 1 << 20
BLOCK_DOCUMENTS = 1 << 16
VERSION = 3  # raised whenever what readers or writers of entries mean changes
GIB = 1 << 30


def header(dtype: np.dtype[Any], length: int) -> bytes:
    """A version 1.0 .npy header of fixed size, so that the length can be filled in at the end."""
    fields = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({length},), }}"
    room = HEADER_BYTES - 10
    return (
        b"\x93NUMPY\x01\x00" + room.to_bytes(2, "little") + fields.ljust(room - 1).encode() + b"\n"
    )


class TokenWriter:
    """Streams the documents of one split to disk; without `finish` it leaves nothing behind.

    masked: beside the ids stands what is trained of them.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        vocab_size: int,
        masked: bool = False,
        dtype: type[np.integer] | None = None,
    ) -> None:
        self.dtype = np.dtype(dtype or (np.uint16 if vocab_size <= 1 << 16 else np.uint32))
        self.path = directory / f"{split}.npy"
        self.offsets_path = directory / f"{split}.offsets.npy"
        self.lengths = array("q")  # 8 bytes a document, where a list of ints takes 36
        self._pending: list[NDArray[Any]] = []
        self._num_pending = 0
        self._part = directory / f".{split}.npy.tmp"
        with writing(self.path):
            directory.mkdir(parents=True, exist_ok=True)
            self.offsets_path.unlink(missing_ok=True)
            self._file = self._part.open("wb", buffering=0)  # so that closing cannot fail
            self._file.seek(HEADER_BYTES)
        self.mask = None
        if masked:
            self.mask = TokenWriter(directory, f"{split}.trained", vocab_size, dtype=np.uint8)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()
        self._part.unlink(missing_ok=True)
        if self.mask is not None:
            self.mask.__exit__(*error)

    def add(
        self, ids: NDArray[Any], lengths: NDArray[np.int64], trained: NDArray[Any] | None = None
    ) -> None:
        """Appends documents: their ids end to end, how many each has, and what is trained."""
        if self.mask is not None and trained is not None:
            self.mask.add(trained, lengths)
        self.lengths.frombytes(lengths.astype(np.int64, copy=False).tobytes())
        self._pending.append(ids.astype(self.dtype, copy=False))
        self._num_pending += len(ids)
        if self._num_pending >= BUFFER_IDS:
            self._flush()

    def finish(self) -> NDArray[np.int64]:
        """Makes the split visible and returns its offsets."""
        if self.mask is not None:
            self.mask.finish()
        self._flush()
        lengths = np.frombuffer(self.lengths, np.int64)
        offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)))
        with writing(self.path):
            self._file.seek(0)
            self._write(header(self.dtype, int(offsets[-1])))
            os.fsync(self._file.fileno())
            os.replace(self._part, self.path)
        buffer = io.BytesIO()
        np.save(buffer, offsets)
        atomic_write(self.offsets_path, buffer.getvalue())
        return offsets

    def _flush(self) -> None:
        for ids in self._pending:
            self._write(np.ascontiguousarray(ids).data.cast("B"))
        self._pending.clear()
        self._num_pending = 0

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        with writing(self.path):
            while view:
                view = view[self._file.write(view) :]


def open_tokens(directory: Path, split: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The memory-mapped ids and the offsets of one split."""
    paths = directory / f"{split}.npy", directory / f"{split}.offsets.npy"
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{' and '.join(missing)} not there; run the data stage again")
    try:
        ids, offsets = np.load(paths[0], mmap_mode="r"), np.load(paths[1])
    except ValueError as error:
        raise DataError(f"{paths[0]} is damaged ({error}); delete the run and redo it") from error
    if len(ids) != offsets[-1]:
        raise DataError(
            f"{paths[0]} holds {len(ids)} ids and its offsets say {offsets[-1]}; "
            "delete the run and redo it"
        )
    return ids, offsets


def open_trained(directory: Path, split: str) -> NDArray[np.uint8] | None:
    """The memory-mapped mode of each id that is trained, else 0; None where all are."""
    there = (directory / f"{split}.trained.npy").is_file()
    return open_tokens(directory, f"{split}.trained")[0] if there else None


def blocks(offsets: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges [start, stop) of documents that hold about `BUFFER_IDS` ids, together all of them."""
    start, last = 0, len(offsets) - 1
    while start < last:
        within = int(np.searchsorted(offsets, offsets[start] + BUFFER_IDS, "right")) - 1
        stop = min(max(start + 1, within), start + BLOCK_DOCUMENTS, last)
        yield start, stop
        start = stop


class TokenCache:
    """Directories by the fingerprint of all that they follow from; a context manager.

    An entry is built under a temporary name and renamed, so one that exists is whole; of two
    processes that build the same, the second drops its own. Users hold a shared flock. Whoever is
    alone when leaving deletes what a killed process left, and above `gib` GiB the entries used
    least recently.
    """

    def __init__(self, directory: Path, gib: float) -> None:
        self.directory, self.gib = directory, gib
        self.hits = self.misses = 0

    def __enter__(self) -> Self:
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            # Not atomic: the shared lock is let go first, and another may come in between. Then
            # this one is refused, or that one waits; both are fine.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # others read here; the last one to leave tidies up
        else:
            self._tidy()
        finally:
            os.close(self._lock)

    def entry(self, identity: Any, build: Callable[[Path], None]) -> Path:
        """The directory that `build` filled for this identity, now or at some earlier time.

        identity: JSON values that `build`'s result follows from, and nothing else does.
        """
        path = self.directory / fingerprint([VERSION, identity])[:32]
        if path.is_dir():
            self.hits += 1
            with writing(path):
                os.utime(path)
            return path
        self.misses += 1
        with writing(path):
            building = Path(tempfile.mkdtemp(prefix=".building-", dir=self.directory))
        try:
            with writing(building):
                build(building)
            with writing(path):
                sync(*building.iterdir(), building)
                try:
                    building.rename(path)
                except OSError:
                    if not path.is_dir():  # else another process was faster, and built the same
                        raise
                sync(path.parent)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return path

    def _tidy(self) -> None:
        entries = []
        for path in self.directory.iterdir():
            if path.name.startswith(".building-"):
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_dir():
                size = sum(file.stat().st_size for file in path.iterdir())
                entries.append((path.stat().st_mtime_ns, path, size))
        excess = sum(size for _, _, size in entries) - self.gib * GIB
        for _, path, size in sorted(entries):
            if excess <= 0:
                return
            doomed = path.with_name(f".building-{path.name}")  # no half of it under its key
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
            excess -= size
