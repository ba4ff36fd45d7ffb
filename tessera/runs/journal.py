"""Rows on disk, one JSON line each as they come, found again by key: what was paid for is kept.

A line is appended by one write, so a process that is killed loses the line under way at most, and
half a line is cut off when the journal is opened again. In memory is where each row stands, not the
row: thoughts of many problems are larger than the memory of one process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from tessera.runs.files import writing


class Journal:
    """Rows by key; a context manager. The later row of a key replaces the earlier one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at: dict[str, int] = {}

    def __enter__(self) -> Self:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            self._reader = self.path.open("rb")
        self._end = 0
        for line in self._reader:
            if not line.endswith(b"\n"):
                break
            self._at[json.loads(line)["key"]] = self._end
            self._end += len(line)
        os.ftruncate(self._file, self._end)
        return self

    def __exit__(self, *_: Any) -> None:
        os.fsync(self._file)
        self._reader.close()
        os.close(self._file)

    def __contains__(self, key: str) -> bool:
        return key in self._at

    def __len__(self) -> int:
        return len(self._at)

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keeps a row; raises WriteError where the disk is full."""
        line = json.dumps({"key": key, **row}).encode() + b"\n"
        with writing(self.path):
            written = 0
            while written < len(line):
                written += os.pwrite(self._file, line[written:], self._end + written)
        self._at[key] = self._end
        self._end += len(line)

    def get(self, key: str) -> dict[str, Any]:
        """The row of a key, its key among the fields."""
        self._reader.seek(self._at[key])
        return json.loads(self._reader.readline())
