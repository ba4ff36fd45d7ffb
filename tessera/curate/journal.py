"""Replies on disk, one line each as they come: a request that was answered is never asked again.

A line is appended by one write, so a process that is killed loses the line under way at most, and
half a line is cut off when the journal is opened again. In memory is where each reply stands, not
the reply: a shard of long thoughts is larger than the memory of one process.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from tessera.curate.teacher import Reply
from tessera.disk import writing


class Journal:
    """The replies of one shard, by key; a context manager. Failed requests are not kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at: dict[str, int] = {}
        self._failed: dict[str, Reply] = {}

    def __enter__(self) -> Self:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            self._reader = self.path.open("rb")
        whole = 0
        for line in self._reader:
            if not line.endswith(b"\n"):
                break
            self._at[json.loads(line)["key"]] = whole
            whole += len(line)
        os.ftruncate(self._file, whole)
        self._end = whole
        return self

    def __exit__(self, *_: Any) -> None:
        os.fsync(self._file)
        self._reader.close()
        os.close(self._file)

    def __contains__(self, key: str) -> bool:
        return key in self._at

    def __len__(self) -> int:
        return len(self._at)

    def add(self, key: str, reply: Reply) -> None:
        """Keeps a reply; raises WriteError where the disk is full."""
        if reply.error is not None:
            self._failed[key] = reply
            return
        line = json.dumps({"key": key, **asdict(reply)}, ensure_ascii=True).encode() + b"\n"
        with writing(self.path):
            written = 0
            while written < len(line):
                written += os.pwrite(self._file, line[written:], self._end + written)
        self._at[key] = self._end
        self._end += len(line)

    def get(self, key: str) -> Reply:
        """The reply to a request that was asked."""
        if key in self._failed:
            return self._failed[key]
        self._reader.seek(self._at[key])
        row = json.loads(self._reader.readline())
        del row["key"]
        return Reply(**row)
