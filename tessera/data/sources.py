"""A source of documents: what it reads, and which documents are held out.

The records with the lowest hashes are held out, so the split depends on no seed and no order. A
chat is hashed by its first question, a completion by its prompt: both modes of a question are held
out together. Memory is 8 bytes a record of the source.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.data import dataset, readers
from tessera.data.audit import rows_named
from tessera.data.chat import ChatEncoder
from tessera.data.config import Reading
from tessera.data.conversation import Chat, SchemaError, fault, misnamed
from tessera.data.dialects import KEYS, chats_of, read_texts
from tessera.data.encode import Encoder, Entry, Unit, read_unit
from tessera.data.problems import SPLITS, Split, completion, document, problem_chat
from tessera.data.readers import EXCERPT, Bad, DataError, Record, without_chats
from tessera.data.store import TokenCache
from tessera.progress import Progress

LOOKED_AT = 100  # rows of each file that `tessera check` reads


def _of_rows(
    label: str, rows: Iterable[tuple[int, Any]], reading: Reading
) -> Iterator[Record[Any] | Bad]:
    """The chats of rows that may be trained on, or their prompts with completions as TRL has them.

    Of a small model trained from scratch: what nobody can predict (the question) drowns what is to
    be learned; the toy of recipes/sft-toy.toml learns in 500 steps what took it 1,500 on whole
    documents.
    """
    if reading.chats:
        for number, chat in chats_of(label, rows):
            if isinstance(chat, Bad):
                yield chat
            elif reading.reasoning is None or chat.mode == reading.reasoning:
                if reason := fault(chat):
                    yield Bad(label, number, reason, chat.to_json()[:EXCERPT])
                else:
                    question = next(
                        one["content"] for one in chat.messages if one["role"] == "user"
                    )
                    yield Record(chat, key=question.strip(), line=number)
        return
    for number, row in rows:
        if isinstance(row, Bad):
            yield row
            continue
        try:
            prompt, completion = read_texts(row)
            yield Record((prompt, completion), key=prompt, line=number)
        except SchemaError as error:
            told = json.dumps(row, default=str)[:EXCERPT]
            yield Bad(label, number, str(error), told)


def _kind(reading: Reading) -> list[Any]:
    """What the records of rows follow from beside the rows."""
    return [reading.format, reading.reasoning] if reading.masked else []


def _file_unit(reading: Reading, path: Path) -> Unit:
    def records() -> Iterator[Record[Any] | Bad]:
        if reading.masked:
            return _of_rows(str(path), readers.read_rows(path), reading)
        return readers.read(
            path, format=reading.format, field=reading.field, separator=reading.separator
        )

    def identity() -> list[Any]:
        how = _kind(reading)
        if not how:
            format = readers.format_of(path) if reading.format == "auto" else reading.format
            how = [format, reading.separator if format == "text" else reading.field]
        return ["file", how, readers.content_hash(path)]

    def stamp() -> tuple[int, int]:
        return path.stat().st_size, path.stat().st_mtime_ns

    return Unit(str(path), records, identity, stamp)


def forewarn(reading: Reading, encoder: ChatEncoder | None) -> list[str]:
    """What the first rows of a source's files will be refused for, before a run finds it.

    encoder: of chats, to know what the template refuses.
    """
    told: list[str] = []
    for path in readers.expand(
        [*without_chats(reading.paths), *without_chats(reading.heldout_paths)]
    ):
        units = iter([_file_unit(reading, path)])
        told += first_refusals(path, (one for unit in units for one in unit.records()), encoder)
    return told


def first_refusals(
    path: Path, records: Iterable[Any], encoder: ChatEncoder | None = None
) -> list[str]:
    """Warnings about the first records of a file, of which some are `Bad`."""
    refused: dict[str, list[int]] = {}
    try:
        found = list(itertools.islice(records, LOOKED_AT))
    except DataError as error:
        return [str(error)]
    for record in found:
        if isinstance(record, Bad):
            refused.setdefault(record.reason, []).append(record.line)
    chats = [one for one in found if isinstance(one, Record) and isinstance(one.content, Chat)]
    encoded = encoder.encode_batch([one.content for one in chats]) if encoder else ()
    for record, documents in zip(chats, encoded, strict=False):
        if isinstance(documents, str):
            refused.setdefault(documents, []).append(record.line)
    told = [
        f"{path}: {reason}; refused among the first {len(found)} rows{rows_named(numbers)}"
        for reason, numbers in refused.items()
    ]
    names = {name for one in chats for name in one.content.extra}
    return told + ([f"{path}: unknown fields{odd}"] if (odd := misnamed(names, KEYS)) else [])


def _units(reading: Reading, patterns: str | list[str], split: str | None) -> list[Unit]:
    """A unit for every file, and for a split of the source's dataset, if it has any."""
    units = [_file_unit(reading, path) for path in readers.expand(patterns)]
    if reading.dataset is None or split is None:
        return units
    field = None if reading.masked else reading.field
    streamed = reading.limit is not None
    part = dataset.DatasetPart(
        reading.dataset, reading.subset, split, reading.revision, field, streamed
    )

    def records() -> Iterator[Record[Any] | Bad]:
        if reading.masked:
            return _of_rows(part.label, dataset.read_dataset_rows(part), reading)
        return dataset.read_dataset(part)

    def identity() -> list[Any]:
        return ["dataset", dataset.dataset_identity(part), _kind(reading)]

    return [*units, Unit(part.label, records, identity, lambda: dataset.dataset_stamp(part))]


class Source:
    """The documents of one source, each with its split; `read` fills `corpus` and `own_heldout`."""

    def __init__(self, name: str, reading: Reading, seed: int) -> None:
        self.name, self.reading, self.seed = name, reading, seed
        self.where = f"source {name}: " if name else ""  # how messages about it begin
        self.units = _units(reading, reading.paths, reading.split)
        self.heldout_units = _units(reading, reading.heldout_paths, reading.heldout_split)
        self.tasks: list[tuple[str, Split, int]] = [
            (task, split, count)
            for task, train in reading.tasks.items()
            for split, count in zip(SPLITS, (train, reading.num_heldout(train)), strict=True)
        ]
        self.corpus: list[Entry] = []
        self.own_heldout: list[Entry] = []
        self.refused: list[Bad] = []  # problems that the tokenizer or the template refused

    def read(self, encoder: Encoder | None, cache: TokenCache, bar: Progress | None = None) -> None:
        """Reads and tokenises what is not in the cache; without an encoder it hashes alone."""
        left, self.corpus = self.reading.limit, []
        for unit in self.units:
            if left != 0:
                entry = read_unit(unit, left, encoder, cache, bar)
                left = None if left is None else left - len(entry.keys)
                self.corpus.append(entry)
        self.own_heldout = [read_unit(one, None, encoder, cache, bar) for one in self.heldout_units]

    @property
    def entries(self) -> list[Entry]:
        return [*self.corpus, *self.own_heldout]

    @property
    def num_bad(self) -> int:
        """Broken records, and those that could not be tokenised."""
        return sum(one.num_bad for one in self.entries) + len(self.refused)

    def broken(self) -> Iterator[Bad]:
        """The records that are no documents."""
        yield from itertools.chain.from_iterable(one.broken() for one in self.entries)
        yield from self.refused

    @property
    def keys(self) -> NDArray[np.uint64]:
        """Hashes of the records among which some are held out."""
        return np.concatenate([np.zeros(0, np.uint64), *(one.keys for one in self.corpus)])

    @functools.cached_property
    def cut(self) -> int:
        """The highest hash held out, -1 for none; equal documents stay together.

        Raises DataError where none would be trained.
        """
        keys = self.keys
        count = self.reading.num_heldout(len(keys))
        if any(len(one.keys) for one in self.own_heldout) or count == 0 or len(keys) == 0:
            return -1
        if count >= len(keys):
            raise DataError(
                f"{self.where}heldout asks for {count} of {len(keys)} documents and leaves none to "
                "train on"
            )
        cut = int(np.partition(keys, count - 1)[count - 1])
        if cut == int(keys.max()):
            raise DataError(f"{self.where}the documents are all alike; set heldout = 0")
        return cut

    def is_heldout(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of some records of the corpus are held out."""
        return keys <= np.uint64(self.cut) if self.cut >= 0 else np.zeros(len(keys), bool)

    def heldout_keys(self) -> NDArray[np.uint64]:
        """Hashes of all held-out records but problems, which are held out by their own rule."""
        own = [one.keys for one in self.own_heldout]
        return np.concatenate([self.keys[self.is_heldout(self.keys)], *own])

    def problems(self, task: str, split: Split, count: int) -> Iterator[Any]:
        """Drawn contents; held-out ones do not change with the seed: runs of several compare."""
        seed = self.seed if split == "train" else 0
        draw: Any = completion if self.reading.masked else document
        if self.reading.chats:
            draw = functools.partial(
                problem_chat, mode=self.reading.reasoning, hasty=self.reading.hasty
            )
        return (draw(task, seed, index, split) for index in range(count))

    def training_texts(self) -> Iterator[str]:
        """What a tokenizer is trained on: the training documents, of chats what is said in them."""
        read = (
            itertools.compress(one.contents(), ~self.is_heldout(one.keys)) for one in self.corpus
        )
        drawn = (self.problems(*task) for task in self.tasks if task[1] == "train")
        for content in itertools.chain.from_iterable(itertools.chain(read, drawn)):
            if isinstance(content, Chat):
                yield "\n".join(message["content"] for message in content.messages)
            else:
                yield "".join(content)
