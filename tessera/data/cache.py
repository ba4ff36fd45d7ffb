"""What was read and tokenised before, kept by the fingerprint of all that it follows from.

An entry is a directory under its key. It is built under a temporary name and renamed, so an entry
that exists is whole; two processes that build the same one lose nothing but time, for the second
rename finds the first one's work and drops its own. Entries are only ever read, touched and
deleted. Whoever uses the cache holds a shared flock on it, and only who is alone in it deletes:
what a killed process left half built, and the entries used least recently above the bound.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from tessera.runs.files import fingerprint, sync, writing

VERSION = 1  # raised whenever what readers or writers of entries mean changes
GIB = 1 << 30


class TokenCache:
    """A cache in `directory`, bounded to `gib` GiB when it is left; a context manager."""

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
            _move(building, path)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return path

    def _tidy(self) -> None:
        entries = []
        for path in self.directory.iterdir():
            if path.name.startswith(".building-"):
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_dir():
                entries.append((path.stat().st_mtime_ns, path, _size(path)))
        excess = sum(size for _, _, size in entries) - self.gib * GIB
        for _, path, size in sorted(entries):
            if excess <= 0:
                return
            doomed = path.with_name(f".building-{path.name}")  # no half of it under its key
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
            excess -= size


def _move(building: Path, path: Path) -> None:
    with writing(path):
        sync(*building.iterdir(), building)
        try:
            building.rename(path)
        except OSError:
            if not path.is_dir():  # else another process was faster, and built the same
                raise
        sync(path.parent)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())
