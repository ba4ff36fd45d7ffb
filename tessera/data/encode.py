"""Records to ids, once: what a file or a split of a dataset became is kept in the cache.

An entry holds a unit's documents, the hash of every record and the broken records. What is held out
is not part of it, so it serves every source, mix and recipe, and writing a split is copying. A
tokenizer that is still to be trained needs the hashes first: then an entry is made without ids.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.data.batch import OFF, ON, PLAIN
from tessera.data.chat import ChatEncoder
from tessera.data.conversation import Chat
from tessera.data.readers import Bad, DataError, Record
from tessera.data.store import TokenCache, TokenWriter, blocks, open_tokens, open_trained
from tessera.data.tokenizer import Tokenizer
from tessera.progress import Progress

TOKENIZE_AT_ONCE = 512  # documents, and about as many characters: whichever is reached first
CHARACTERS_AT_ONCE = 1 << 22
IDS = "documents"
_Made = list[tuple[list[int], NDArray[np.uint8] | None]]  # documents of a record: ids, mask


@dataclass(frozen=True)
class Portion:
    """Some documents: their ids end to end, (n,) how many each has, (n,) bytes of its text.

    trained: the mode of each id that is trained, else 0; None where all are. origin: (n,) the
    record that each document is made of. refused: records that gave none, and why.
    """

    ids: NDArray[Any]
    lengths: NDArray[np.int64]
    sizes: NDArray[np.uint32]
    trained: NDArray[np.uint8] | None
    origin: NDArray[np.int64]
    refused: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True)
class Encoder:
    """How the records of a source become documents.

    begin, end: the ids that texts begin and end with. chats: of conversations, whose template
    decides their first and last ids. masked: whether a part of each document is not trained.
    """

    tokenizer: Tokenizer
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    chats: ChatEncoder | None = None
    masked: bool = False

    @property
    def identity(self) -> list[Any]:
        """What the ids of a document follow from, beside its record."""
        if self.chats is not None:
            return self.chats.identity
        return [self.tokenizer.fingerprint(), self.begin, self.end]

    def portions(self, contents: Iterable[Any]) -> Iterator[Portion]:
        """The documents of records of one kind, some at a time."""
        encode = self._chats if self.chats else self._pairs if self.masked else self._texts
        first = 0
        for some in _batched(contents):
            ids, marks, origin, refused = [], [], [], []
            for number, found in enumerate(encode(some), first):
                if isinstance(found, str):
                    refused.append((number, found))
                    continue
                for one, mark in found:
                    ids.append(np.array(one, np.uint32))
                    marks.append(mark)
                    origin.append(number)
            sizes = [0] * len(ids) if self.masked else [len(text.encode()) for text in some]
            yield Portion(
                np.concatenate([np.zeros(0, np.uint32), *ids]),
                np.array([len(one) for one in ids], np.int64),
                np.array(sizes, np.uint32),
                np.concatenate([np.zeros(0, np.uint8), *marks]) if self.masked else None,
                np.array(origin, np.int64),
                refused,
            )
            first += len(some)

    def _texts(self, texts: list[str]) -> list[_Made]:
        head, tail = list(self.begin), list(self.end)
        return [[(head + one + tail, None)] for one in self.tokenizer.encode_batch(texts)]

    def _pairs(self, pairs: list[tuple[str, str]]) -> list[_Made]:
        """Prompt and completion are encoded apart, as an engine does."""
        head, tail = list(self.begin), list(self.end)
        asked = [head + ids for ids in self.tokenizer.encode_batch([prompt for prompt, _ in pairs])]
        told = self.tokenizer.encode_batch([completion for _, completion in pairs])
        marks = [
            np.repeat(np.array([0, PLAIN], np.uint8), [len(a), len(b) + len(tail)])
            for a, b in zip(asked, told, strict=True)
        ]
        return [[(a + b + tail, m)] for a, b, m in zip(asked, told, marks, strict=True)]

    def _chats(self, chats: list[Chat]) -> list[_Made | str]:
        assert self.chats is not None
        values = {"on": np.uint8(ON), "off": np.uint8(OFF)}
        return [
            found
            if isinstance(found, str)
            else [(one.ids, np.array(one.trained, np.uint8) * values[one.mode]) for one in found]
            for found in self.chats.encode_batch(chats)
        ]


def _batched(contents: Iterable[Any]) -> Iterator[list[Any]]:
    some, characters = [], 0
    for content in contents:
        some.append(content)
        characters += len(content) if isinstance(content, str) else 0
        if len(some) >= TOKENIZE_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield some
            some, characters = [], 0
    if some:
        yield some


@dataclass(frozen=True)
class Unit:
    """A file or a split of a dataset.

    records: its documents and broken records, in order. identity: JSON values that those follow
    from. stamp: changes whenever the content may have.
    """

    label: str
    records: Callable[[], Iterator[Record[Any] | Bad]]
    identity: Callable[[], Any]
    stamp: Callable[[], Any]


class Entry:
    """What a unit became.

    keys: (records,) 64-bit hashes of its good records. records: how many it has, broken ones too.
    num_bad: those that are broken or were refused by the tokenizer or the chat template.
    """

    def __init__(self, unit: Unit, home: Path, stamp: Any) -> None:
        self.unit, self.home, self._stamp = unit, home, stamp
        self.keys: NDArray[np.uint64] = np.load(home / "keys.npy", mmap_mode="r")
        counts = json.loads((home / "counts.json").read_text())
        self.records, self.num_bad = counts["records"], counts["bad"]

    def broken(self) -> Iterator[Bad]:
        """The records that gave no document, under the name that the unit goes by now."""
        with (self.home / "bad.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                yield Bad(self.unit.label, *json.loads(line))

    def contents(self) -> Iterator[Any]:
        """The contents of its good records, read again. Raises DataError where they changed."""
        found = (one.content for one in self.unit.records() if isinstance(one, Record))
        yield from islice(filter(None, found), len(self.keys))
        _check_unchanged(self.unit, self._stamp)

    def portions(self) -> Iterator[Portion]:
        """Its documents, some at a time."""
        ids, offsets = open_tokens(self.home, IDS)
        trained = open_trained(self.home, IDS)
        sizes, origin = (np.load(self.home / f"{name}.npy") for name in ("sizes", "origin"))
        for start, stop in blocks(offsets):
            part, span = slice(start, stop), slice(offsets[start], offsets[stop])
            mask = None if trained is None else trained[span]
            lengths = np.diff(offsets[start : stop + 1])
            yield Portion(ids[span], lengths, sizes[part], mask, origin[part])


def read_unit(
    unit: Unit, limit: int | None, encoder: Encoder | None, cache: TokenCache, bar: Progress | None
) -> Entry:
    """At most `limit` good records of a unit, from the cache where they were read before.

    Without an encoder no documents. Raises DataError where the unit changes while it is read.
    """
    stamp = unit.stamp()
    identity = ["unit", unit.identity(), limit, encoder and encoder.identity]

    def build(directory: Path) -> None:
        _read(unit, limit, encoder, directory, bar)
        _check_unchanged(unit, stamp)

    home = cache.entry(identity, build)
    if bar is not None:
        bar.advance(1, 0)
    return Entry(unit, home, stamp)


def _check_unchanged(unit: Unit, stamp: Any) -> None:
    if unit.stamp() != stamp:
        raise DataError(f"{unit.label} changed while it was read; run the recipe again")


def key_of(text: bytes) -> int:
    """The 64-bit hash that decides a record's split."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _read(
    unit: Unit, limit: int | None, encoder: Encoder | None, directory: Path, bar: Progress | None
) -> None:
    keys, lines = array("Q"), array("Q")
    broken: list[tuple[int, str, str]] = []

    def contents() -> Iterator[Any]:
        records = unit.records()
        while limit is None or len(keys) < limit:
            record = next(records, None)
            if record is None:
                return
            if isinstance(record, Bad):
                broken.append((record.line, record.reason, record.excerpt))
            elif record.content:
                key = record.content if record.key is None else record.key
                keys.append(key_of(key.encode()))
                lines.append(record.line)
                yield record.content

    refused: list[tuple[int, str]] = []
    if encoder is None:
        deque(contents(), maxlen=0)
    else:
        size = encoder.tokenizer.vocab_size
        sizes, origin = [np.zeros(0, np.uint32)], [np.zeros(0, np.int64)]
        with TokenWriter(directory, IDS, size, encoder.masked) as writer:
            for portion in encoder.portions(contents()):
                writer.add(portion.ids, portion.lengths, portion.trained)
                sizes.append(portion.sizes)
                origin.append(portion.origin)
                refused += portion.refused
                if bar is not None:
                    bar.advance(0, len(portion.ids))
            writer.finish()
        np.save(directory / "sizes.npy", np.concatenate(sizes))
        np.save(directory / "origin.npy", np.concatenate(origin))
    np.save(directory / "keys.npy", np.array(keys, np.uint64))
    counts = {"records": len(keys) + len(broken), "bad": len(broken) + len(refused)}
    (directory / "counts.json").write_text(json.dumps(counts))
    broken += [(lines[number], reason, "") for number, reason in refused]
    told = [json.dumps(one, ensure_ascii=False) + "\n" for one in broken]
    (directory / "bad.jsonl").write_text("".join(told), encoding="utf-8")
