"""Replies on disk, as they come: a request that was answered is never asked again."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from tessera.ask.ask import Reply
from tessera.runs.journal import Journal


class Replies:
    """The replies of one shard, by key; a context manager. Failed requests are not kept."""

    def __init__(self, path: Path) -> None:
        self._kept = Journal(path)
        self._failed: dict[str, Reply] = {}

    def __enter__(self) -> Self:
        self._kept.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._kept.__exit__(*error)

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, key: str, reply: Reply) -> None:
        """Keeps a reply; raises WriteError where the disk is full."""
        if reply.error is None:
            self._kept.add(key, asdict(reply))
        else:
            self._failed[key] = reply

    def get(self, key: str) -> Reply:
        """The reply to a request that was asked."""
        if key in self._failed:
            return self._failed[key]
        row = self._kept.get(key)
        del row["key"]
        return Reply(**row)
