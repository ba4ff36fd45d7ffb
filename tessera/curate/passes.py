"""Passes over the shards: steps that need no barrier between them go over a shard together.

    pass 0   read, row steps …                 | digest of a set step
             decide: all digests, no text
    pass 1   its verdicts, row steps …         | digest of the next one

so a row is read and written once a set step, not once a step. A step that asks a model begins a
pass of its own, behind its journal. A shard is done when its counts are there, written last, by
rename; whatever a killed process left of it is written anew. Files of a pass:

    part-00007.jsonl   rows, and .npy: their digests     counts-00007.json    in, out, reasons
    removed-00007.jsonl  what was left out and why       verdicts.npy         of the whole set
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
from numpy.typing import NDArray

from tessera.curate.steps import BatchStep, Result, RowStep, SetStep, rows
from tessera.curate.steps.arrange import Order
from tessera.curate.steps.rows import Drop
from tessera.data.conversation import Chat, SchemaError
from tessera.data.readers import Bad
from tessera.data.schema import Dialect, write_row
from tessera.runs.files import atomic_write, sync, writing

BATCH = 1024  # rows that go through the steps together
WRITE = "write"
REASONS = 50  # kept apart a step and shard; the rest are counted together


@dataclass
class Count:
    """What came into a step, what went out, and why the rest did not."""

    rows_in: int = 0
    rows_out: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, other: dict[str, Any]) -> None:
        self.rows_in += other["in"]
        self.rows_out += other["out"]
        self.reasons.update(other["reasons"])

    def as_json(self) -> dict[str, Any]:
        most = dict(self.reasons.most_common(REASONS))
        rest = self.reasons.total() - sum(most.values())
        return {
            "in": self.rows_in,
            "out": self.rows_out,
            "reasons": {**most, **({"other": rest} if rest else {})},
        }


class ShardWriter:
    """The files of one shard of one pass, whole or not there."""

    def __init__(
        self,
        home: Path,
        number: int,
        closing: SetStep | Order | None = None,
        dialect: Dialect | None = None,
    ) -> None:
        """closing: the set step behind the pass. dialect: of the rows, where it is the last."""
        self.home, self.number, self.closing = home, number, closing
        self.dialect: Dialect | None = dialect
        self.counts: dict[str, Count] = {}
        self.groups: Counter[tuple[str, str, str]] = Counter()
        self.rows = 0
        self._digests: list[NDArray[Any]] = []

    @property
    def done(self) -> bool:
        """True where an earlier process, or this one, has finished the shard."""
        return self.path("counts", "json").is_file()

    def path(self, what: str, suffix: str) -> Path:
        """The name of one of the shard's files."""
        return self.home / f"{what}-{self.number:05}.{suffix}"

    def write(self, batches: Iterable[list[Chat]], steps: Sequence[tuple[str, Any]]) -> None:
        """Sends the batches through row steps and writes what comes out.

        `steps` are (name for the counts, step). Whoever makes the batches counts through `note`.
        """
        with writing(self.home):
            self.home.mkdir(parents=True, exist_ok=True)
            part, removed = self._temporary("part"), self._temporary("removed")
            with part.open("w", encoding="utf-8") as out, removed.open("w", encoding="utf-8") as no:
                self._removed = no
                for batch in batches:
                    for name, step in steps:
                        batch = self._apply(name, step, batch)
                    self._keep(batch, out)
            if self.closing is not None:
                self._save_digests()
            sync(part, removed)
            os.replace(part, self.path("part", "jsonl"))
            os.replace(removed, self.path("removed", "jsonl"))
        counts = {name: count.as_json() for name, count in self.counts.items()}
        groups = [[*group, count] for group, count in sorted(self.groups.items())]
        told = {"rows": self.rows, "steps": counts, "groups": groups}
        atomic_write(self.path("counts", "json"), json.dumps(told, ensure_ascii=False))

    def note(self, name: str, chat: Chat, result: Result) -> Iterator[Chat]:
        """Counts what a step made of a row, and yields what goes on."""
        count = self.counts.setdefault(name, Count())
        count.rows_in += 1
        for one in [result] if isinstance(result, Chat | Drop) else result:
            if isinstance(one, Chat):
                count.rows_out += 1
                yield one
            else:
                count.reasons[one.reason] += 1
                self._removed.write(rows.removed_line(chat, name, one.reason))

    def note_bad(self, name: str, bad: Bad) -> None:
        """Counts a record that is no row."""
        count = self.counts.setdefault(name, Count())
        count.rows_in += 1
        count.reasons[bad.reason] += 1
        told = {"row": f"{bad.file}:{bad.line}", "step": name, "reason": bad.reason}
        self._removed.write(json.dumps({**told, "excerpt": bad.excerpt}) + "\n")

    def _apply(self, name: str, step: RowStep | BatchStep, batch: list[Chat]) -> list[Chat]:
        self.counts.setdefault(name, Count())
        results = step.apply_all(batch) if isinstance(step, BatchStep) else map(step.apply, batch)
        noted = zip(batch, results, strict=True)
        return [one for chat, result in noted for one in self.note(name, chat, result)]

    def _keep(self, batch: list[Chat], out: TextIO) -> None:
        if self.dialect is not None:
            out.writelines(line for chat in batch for line in self._final(chat, self.dialect))
            return
        out.writelines(chat.to_json() + "\n" for chat in batch)
        self.rows += len(batch)
        if self.closing is not None and batch:
            self._digests.append(self.closing.digest(batch))

    def _final(self, chat: Chat, dialect: Dialect) -> Iterator[str]:
        """The line of a row in the dialect of the result; what it has no words for is left out."""
        try:
            line = json.dumps(write_row(chat, dialect), ensure_ascii=False) + "\n"
        except SchemaError as error:
            list(self.note(WRITE, chat, Drop(str(error))))
            return
        count = self.counts.setdefault(WRITE, Count())
        count.rows_in += 1
        count.rows_out += 1
        self.rows += 1
        names = (str(chat.extra.get("source")), str(chat.extra.get("license")), chat.mode)
        self.groups[names] += 1
        yield line

    def _save_digests(self) -> None:
        assert self.closing is not None
        found = self._digests or [self.closing.digest([])]
        temporary = self._temporary("digest").with_suffix(".npy")
        np.save(temporary, np.concatenate(found))
        sync(temporary)
        os.replace(temporary, self.path("digest", "npy"))

    def _temporary(self, what: str) -> Path:
        return self.home / f".{what}-{self.number:05}.tmp"


@dataclass(frozen=True)
class Parts:
    """The rows that a finished pass left, and what was decided about them."""

    home: Path
    rows: tuple[int, ...]
    verdicts: NDArray[Any] | None = None

    @classmethod
    def of(cls, home: Path, shards: int, decided: bool) -> Parts:
        """Those of a pass whose shards are all done."""
        told = [json.loads((home / f"counts-{n:05}.json").read_text()) for n in range(shards)]
        verdicts = np.load(home / "verdicts.npy", mmap_mode="r") if decided else None
        return cls(home, tuple(one["rows"] for one in told), verdicts)

    def read(self, number: int) -> Iterator[tuple[Chat, Any]]:
        """The rows of a shard with their verdicts."""
        begin = sum(self.rows[:number])
        with (self.home / f"part-{number:05}.jsonl").open(encoding="utf-8") as lines:
            for index, line in enumerate(lines, begin):
                verdict = None if self.verdicts is None else self.verdicts[index]
                yield Chat.from_json(line), verdict

    def read_in_order(self, number: int) -> Iterator[Chat]:
        """The rows of a shard where the verdicts are a new order of all rows.

        Memory is 8 bytes a row of the whole set, for where each line begins.
        """
        assert self.verdicts is not None
        starts, stops = self._places()
        bounds = np.linspace(0, len(self.verdicts), len(self.rows) + 1).astype(np.int64)
        wanted = self.verdicts[bounds[number] : bounds[number + 1]]
        shard = np.searchsorted(stops, wanted, "right")
        files: dict[int, BinaryIO] = {}
        try:
            for row, of in zip(wanted.tolist(), shard.tolist(), strict=True):
                if of not in files:
                    if len(files) >= 256:  # below the usual limit of open files
                        files.pop(next(iter(files))).close()
                    files[of] = (self.home / f"part-{of:05}.jsonl").open("rb")
                files[of].seek(int(starts[row]))
                yield Chat.from_json(files[of].readline().decode())
        finally:
            for file in files.values():
                file.close()

    def _places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where each line begins within its part, and (shards,) the last row of each plus one."""
        starts = [_line_starts(self.home / f"part-{n:05}.jsonl") for n in range(len(self.rows))]
        return np.concatenate(starts), np.cumsum(self.rows)


def _line_starts(path: Path) -> NDArray[np.int64]:
    found, at = [np.zeros(1, np.int64)], 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
            found.append(ends + at + 1)
            at += len(block)
    return np.concatenate(found)[:-1]


def decide(home: Path, shards: int, closing: SetStep | Order, seed: int) -> None:
    """Writes verdicts.npy from all digests of a pass, unless it is there."""
    if (home / "verdicts.npy").is_file():
        return
    found = np.concatenate([np.load(home / f"digest-{n:05}.npy") for n in range(shards)])
    if isinstance(closing, Order):
        verdicts = closing.permutation(found, seed)
    else:
        verdicts = closing.decide(found, seed) if len(found) else np.zeros(0, np.int8)
    temporary = home / ".verdicts.tmp.npy"
    with writing(home):
        np.save(temporary, verdicts)
        sync(temporary)
        os.replace(temporary, home / "verdicts.npy")


def in_batches(chats: Iterable[Chat], size: int = BATCH) -> Iterator[list[Chat]]:
    """The rows, so many at a time."""
    batch: list[Chat] = []
    for chat in chats:
        batch.append(chat)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
