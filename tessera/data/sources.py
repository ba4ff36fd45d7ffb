"""What was read and tokenised before, kept by the fingerprint of all that it follows from.

An entry is a directory under its key. It is built under a temporary name and renamed, so an entry
that exists is whole; two processes that build the same one lose nothing but time, for the second
rename finds the first one's work and drops its own. Entries are only ever read, touched and
deleted. Whoever uses the cache holds a shared flock on it, and only who is alone in it deletes:
what a killed process left half built, and the entries used least recently above the bound.

One source of documents: what it reads, which documents are held out, and their ids.

A source is a list of *units*: files, a split of a dataset, problems of a task. A unit's text is
gone through twice. `scan` finds what is broken and hashes every document; the documents of a
source with the lowest hashes are held out, so that the split depends on no seed and no order,
and equal documents never stand on both sides. The second pass tokenises. What either pass found
in a file or dataset is cached by its content (cache.py), so that another recipe, another mix or
one more file costs what is new. Memory is 12 bytes a document of the unit at hand, and 8 a
document of the source.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from tessera.data import completions
from tessera.data.chat_records import CHAT_FORMAT, chat_records, dataset_records, spoken
from tessera.data.config import Reading, as_list
from tessera.data.dataset import DatasetPart, dataset_identity, dataset_stamp, read_dataset
from tessera.data.problems import completion, document, problem_chat
from tessera.data.readers import Bad, DataError, Text, content_hash, expand, format_of, read
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


Split = Literal["train", "heldout"]
SPLITS: tuple[Split, Split] = ("train", "heldout")


@dataclass(frozen=True)
class Unit:
    """One thing that a source reads.

    records: its documents and broken records, in order. identity: JSON values that those follow
    from; called, because it hashes the content. stamp: changes whenever the content may have.
    """

    label: str
    records: Callable[[], Iterator[Text | Bad]]
    identity: Callable[[], Any]
    stamp: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Scan:
    """What the first pass found in a unit.

    keys: (documents,) 64-bit hashes. sizes: (documents,) bytes of UTF-8. bad: lines of JSON.
    lines: (documents,) where they stood, if that was told.
    """

    unit: Unit
    limit: int | None
    identity: Any
    stamp: Any
    keys: NDArray[np.uint64]
    sizes: NDArray[np.uint32]
    num_bad: int
    bad: Path
    lines: NDArray[np.uint64] | None = None

    def texts(self) -> Iterator[str]:
        """The documents again. Raises DataError where they are no longer those that were hashed."""
        count = 0
        for text in itertools.islice(_good(self.unit.records()), self.limit):
            count += 1
            yield text
        if count != len(self.keys) or self.unit.stamp() != self.stamp:
            raise DataError(f"{self.unit.label} changed while it was read; run the recipe again")

    def broken(self) -> Iterator[Bad]:
        """The records that are no documents, under the name that the unit goes by now."""
        with self.bad.open(encoding="utf-8") as lines:
            for line in lines:
                yield Bad(self.unit.label, **json.loads(line))


def key_of(text: bytes) -> int:
    """The 64-bit hash that decides a document's split."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _good(records: Iterable[Text | Bad]) -> Iterator[str]:
    return (record.text for record in records if isinstance(record, Text) and record.text)


def scan(unit: Unit, limit: int | None, cache: TokenCache) -> Scan:
    """The first pass over at most `limit` documents of a unit, from the cache where it was made."""
    stamp = unit.stamp()
    identity = ["scan", unit.identity(), limit]
    home = cache.entry(identity, functools.partial(_write_scan, unit, limit))
    keys, sizes = (np.load(home / f"{name}.npy", mmap_mode="r") for name in ("keys", "sizes"))
    lines = np.load(home / "lines.npy") if (home / "lines.npy").is_file() else None
    found = Scan(unit, limit, identity, stamp, keys, sizes, 0, home / "bad.jsonl", lines)
    if unit.stamp() != stamp:
        raise DataError(f"{unit.label} changed while it was read; run the recipe again")
    return replace(found, num_bad=sum(1 for _ in found.broken()))


def _write_scan(unit: Unit, limit: int | None, directory: Path) -> None:
    keys, sizes, numbers = array("Q"), array("I"), array("Q")
    with (directory / "bad.jsonl").open("w", encoding="utf-8") as bad:
        records = unit.records()
        while limit is None or len(keys) < limit:
            record = next(records, None)
            if record is None:
                break
            if isinstance(record, Bad):
                row = {"line": record.line, "reason": record.reason, "excerpt": record.excerpt}
                bad.write(json.dumps(row, ensure_ascii=False) + "\n")
            elif record.text:
                data = record.text.encode()
                keys.append(key_of(data if record.key is None else record.key.encode()))
                sizes.append(len(data))
                numbers.append(record.line)
    np.save(directory / "keys.npy", np.array(keys, np.uint64))
    np.save(directory / "sizes.npy", np.array(sizes, np.uint32))
    if any(numbers):
        np.save(directory / "lines.npy", np.array(numbers, np.uint64))


def file_units(reading: Reading, patterns: str | list[str]) -> list[Unit]:
    """A unit for every file of some paths and globs."""

    def unit(path: Path) -> Unit:
        return Unit(
            str(path),
            lambda: _records(path, reading),
            lambda: ["file", _kind(path, reading), path.suffix == ".gz", content_hash(path)],
            lambda: (path.stat().st_size, path.stat().st_mtime_ns),
        )

    return [unit(path) for path in expand(as_list(patterns))]


def _records(path: Path, reading: Reading) -> Iterator[Text | Bad]:
    if reading.chats:
        return chat_records(path, reading.reasoning)
    if reading.pairs:
        return completions.file_records(path)
    return read(path, format=reading.format, field=reading.field, separator=reading.separator)


def _kind(path: Path, reading: Reading) -> list[str]:
    """The format of a file and the one setting that matters to it."""
    if reading.pairs:
        return [completions.COMPLETION_FORMAT]
    if reading.chats:
        return [CHAT_FORMAT, str(reading.reasoning)]
    kind = format_of(path) if reading.format == "auto" else reading.format
    return [kind, reading.separator if kind == "text" else reading.field]


def dataset_units(reading: Reading, split: str | None) -> list[Unit]:
    """The unit of one split of a source's dataset, if it has any."""
    if reading.dataset is None or split is None:
        return []
    part = DatasetPart(
        reading.dataset, reading.subset, split, reading.revision,
        None if reading.masked else reading.field, stream=reading.limit is not None,
    )  # fmt: skip
    mode = reading.reasoning
    return [
        Unit(
            part.label,
            lambda: _rows(part, reading),
            lambda: [
                "dataset",
                dataset_identity(part),
                *([CHAT_FORMAT, mode] if reading.chats else []),
                *([completions.COMPLETION_FORMAT] if reading.pairs else []),
            ],
            lambda: dataset_stamp(part),
        )
    ]


def _rows(part: DatasetPart, reading: Reading) -> Iterator[Text | Bad]:
    if reading.chats:
        return dataset_records(part, reading.reasoning)
    return completions.dataset_records(part) if reading.pairs else read_dataset(part)


class Source:
    """The documents of one source, each with its split."""

    def __init__(self, name: str, reading: Reading, seed: int, cache: TokenCache) -> None:
        self.name, self.reading, self.seed = name, reading, seed
        units = file_units(reading, reading.paths) + dataset_units(reading, reading.split)
        held = file_units(reading, reading.heldout_paths)
        held += dataset_units(reading, reading.heldout_split)
        self.refused: list[Bad] = []  # by the second pass
        self.corpus = list(_scans(units, reading.limit, cache))
        self.own_heldout = list(_scans(held, None, cache))
        self.tasks: list[tuple[str, Split, int]] = [
            (task, split, count)
            for task, train in reading.tasks.items()
            for split, count in zip(SPLITS, (train, reading.num_heldout(train)), strict=True)
        ]

    @property
    def where(self) -> str:
        """How messages about this source begin."""
        return f"source {self.name}: " if self.name else ""

    @property
    def scans(self) -> list[Scan]:
        """All that was read."""
        return [*self.corpus, *self.own_heldout]

    @property
    def num_bad(self) -> int:
        """Broken records, and those that could not be tokenised."""
        return sum(one.num_bad for one in self.scans) + len(self.refused)

    def broken(self) -> Iterator[Bad]:
        """The records that are no documents."""
        yield from itertools.chain.from_iterable(one.broken() for one in self.scans)
        yield from self.refused

    def __len__(self) -> int:
        drawn = sum(count for _, _, count in self.tasks)
        return sum(len(one.keys) for one in self.scans) + drawn

    @functools.cached_property
    def keys(self) -> NDArray[np.uint64]:
        """Hashes of the documents among which some are held out."""
        return np.concatenate([np.zeros(0, np.uint64), *(one.keys for one in self.corpus)])

    @functools.cached_property
    def cut(self) -> int:
        """The highest hash held out; found when asked for, after what is broken is told."""
        if any(len(one.keys) for one in self.own_heldout):
            return -1
        return _cut(self.keys, self.reading.num_heldout(len(self.keys)), self.where)

    def is_heldout(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of some documents of the corpus are held out."""
        return keys <= np.uint64(self.cut) if self.cut >= 0 else np.zeros(len(keys), bool)

    def heldout_keys(self) -> NDArray[np.uint64]:
        """Hashes of all held-out documents but problems, which are held out by their own rule."""
        own = [one.keys for one in self.own_heldout]
        return np.concatenate([self.keys[self.is_heldout(self.keys)], *own])

    def problems(self, task: str, split: Split, count: int) -> Iterator[str]:
        """Drawn documents; held-out ones do not change with the seed: runs of several compare."""
        seed = self.seed if split == "train" else 0
        if self.reading.chats:
            mode, hasty = self.reading.reasoning, self.reading.hasty
            drawn = (problem_chat(task, seed, i, split, mode, hasty) for i in range(count))
            return (chat.to_json() for chat in drawn)
        if self.reading.pairs:
            pairs = (completion(task, seed, index, split) for index in range(count))
            return (completions.as_text(*pair) for pair in pairs)
        return (document(task, seed, index, split) for index in range(count))

    def training_texts(self) -> Iterator[str]:
        """The training documents; of chats and completions, what is said in them."""
        if self.reading.pairs:
            return map(completions.spoken, self._training())
        return map(spoken, self._training()) if self.reading.chats else self._training()

    def _training(self) -> Iterator[str]:
        for one in self.corpus:
            heldout = self.is_heldout(one.keys)
            for index, text in enumerate(one.texts()):
                if not heldout[index]:
                    yield text
        for task, split, count in self.tasks:
            if split == "train":
                yield from self.problems(task, split, count)


def _scans(units: Iterable[Unit], limit: int | None, cache: TokenCache) -> Iterator[Scan]:
    left = limit
    for unit in units:
        if left == 0:
            return
        found = scan(unit, left, cache)
        left = None if left is None else left - len(found.keys)
        yield found


def _cut(keys: NDArray[np.uint64], count: int, where: str) -> int:
    """The highest hash that is held out; -1 for none. Equal documents stay together."""
    if count == 0 or len(keys) == 0:
        return -1
    if count >= len(keys):
        raise DataError(
            f"{where}heldout asks for {count} of {len(keys)} documents and leaves none to train on"
        )
    cut = int(np.partition(keys, count - 1)[count - 1])
    if cut == int(keys.max()):
        raise DataError(
            f"{where}the documents are all alike, so none can be held out; set heldout = 0"
        )
    return cut
