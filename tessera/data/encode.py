"""Documents to ids: beginning, text, end; and a source's token files, written from the cache.

A unit's documents are tokenised once, all of them in order, into an entry of the cache; which of
them are held out is decided by the source they stand in, so the entry serves every source, mix
and recipe. Writing a split is then copying. Problems are drawn and tokenised anew: what they are
follows from code and not from a file, and they cost little.

Chats to ids: the template's text and the mask of what is trained, for a source's token files.

The counterpart of `Encoder`. A chat gives one document or several (chat.py), or none where only the
template or the tokenizer refuses it: such a row is quarantined when it is tokenised.

Prompts and completions to ids: the mask holds the completion alone (`completions.py`).
"""

from __future__ import annotations

import functools
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tessera.data.batch import OFF, ON, PLAIN, chunks, fill
from tessera.data.chat import ChatEncoder
from tessera.data.chat_records import CHAT_FORMAT
from tessera.data.completions import COMPLETION_FORMAT
from tessera.data.conversation import Chat
from tessera.data.documents import WINDOW
from tessera.data.readers import Bad
from tessera.data.sources import SPLITS, Scan, Source, Split, TokenCache
from tessera.data.store import TokenWriter, blocks, open_tokens
from tessera.data.tokenizer import Tokenizer
from tessera.progress import Progress

TOKENIZE_AT_ONCE = 512  # documents, and about as many characters: whichever is reached first
CHARACTERS_AT_ONCE = 1 << 22
FILL_LENGTH = 512  # the summary states the fill of rows this long
ENTRY, TRAINED, ORIGIN, REFUSED = "documents", "trained", "origin.npy", "refused.jsonl"


@dataclass(frozen=True)
class Portion:
    """Some documents: their ids end to end, (n,) how many each has, (n,) bytes of its text.

    Of chats also: trained, the mode of each id that is trained, else 0; origin, (n,) the number of
    the text that a document is made of; refused, numbers of texts that gave none and the reasons.
    """

    ids: NDArray[Any]
    lengths: NDArray[np.int64]
    sizes: NDArray[np.integer[Any]]
    trained: NDArray[np.uint8] | None = None
    origin: NDArray[np.int64] | None = None
    refused: Sequence[tuple[int, str]] = ()


class Encoding(Protocol):
    """How the texts of a source become documents."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def specials(self) -> int: ...
    @property
    def identity(self) -> list[Any]: ...
    def portions(self, texts: Iterable[str]) -> Iterator[Portion]: ...


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, whether documents begin with its <s>, and the ids that end them (0 or 1)."""

    tokenizer: Tokenizer
    bos: bool
    end: tuple[int, ...]

    @property
    def specials(self) -> int:
        """Ids of a document that are not of its text."""
        return self.bos + len(self.end)

    @property
    def identity(self) -> list[Any]:
        """What the ids of a document follow from, beside its text."""
        return [self.tokenizer.fingerprint(), self.tokenizer.bos_id if self.bos else None, self.end]

    def portions(self, texts: Iterable[str]) -> Iterator[Portion]:
        """The texts as documents, some at a time; the tokenizer's own threads share each time."""
        for some in _batched(texts):
            encoded = self.tokenizer.encode_batch(some, bos=self.bos)
            tail = list(self.end)
            documents = [np.array(ids + tail, np.uint32) for ids in encoded]
            lengths = np.array([len(ids) for ids in documents], np.int64)
            sizes = np.array([len(text.encode()) for text in some], np.int64)
            yield Portion(np.concatenate(documents), lengths, sizes)


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    some: list[str] = []
    characters = 0
    for text in texts:
        some.append(text)
        characters += len(text)
        if len(some) >= TOKENIZE_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield some
            some, characters = [], 0
    if some:
        yield some


class SourceWriter:
    """Both splits of a source on their way to `directory`, and what there is to say of them.

    refused: records that the tokenizer or the chat template had to refuse.
    """

    def __init__(
        self, directory: Path, encoder: Encoding, cache: TokenCache, bar: Progress
    ) -> None:
        self.directory, self.encoder, self.cache, self.bar = directory, encoder, cache, bar
        self.counts: dict[Split, Counter[str]] = {split: Counter() for split in SPLITS}
        self.refused: list[Bad] = []

    def write(self, source: Source) -> list[dict[str, Any]]:
        """Writes the token files of a source; returns a row of figures for each split."""
        with ExitStack() as stack:
            self.writers: dict[Split, _Files] = {
                split: _Files(stack, self.directory, split, self.encoder, source.reading.masked)
                for split in SPLITS
            }
            for one in source.corpus:
                self._copy(one, source.is_heldout(one.keys))
            for one in source.own_heldout:
                self._copy(one, np.ones(len(one.keys), bool))
            for task, split, count in source.tasks:
                for portion in self.encoder.portions(source.problems(task, split, count)):
                    self._add(split, portion, np.ones(len(portion.lengths), bool))
                    self.bar.advance(len(portion.lengths), len(portion.ids))
                    self.refused += [Bad(task, i + 1, why, "") for i, why in portion.refused]
            return [self._row(split) for split in SPLITS]

    def _row(self, split: Split) -> dict[str, Any]:
        files = self.writers[split]
        row = {"split": split, **figures(self.counts[split], files.finish())}
        if files.mask is None:
            return row
        del row["bytes"], row["bytes_per_token"]  # of the template's text nobody speaks in bytes
        return {**row, "trained": files.num_trained}

    def _copy(self, one: Scan, heldout: NDArray[np.bool_]) -> None:
        """Adds the documents of a unit, which are tokenised now if they never were."""
        home = self._tokens(one)
        ids, offsets = open_tokens(home, ENTRY)
        trained = origin = None
        if (home / ORIGIN).is_file():
            trained, _ = open_tokens(home, TRAINED)
            origin = np.load(home / ORIGIN)
            heldout = heldout[origin]
            self._tell_refused(one, home)
        for start, stop in blocks(offsets):
            part, span = slice(start, stop), slice(offsets[start], offsets[stop])
            portion = Portion(
                ids[span],
                np.diff(offsets[start : stop + 1]),
                one.sizes[part] if origin is None else np.zeros(stop - start, np.int64),
                None if trained is None else trained[span],
            )
            self._add("train", portion, ~heldout[part])
            self._add("heldout", portion, heldout[part])

    def _tell_refused(self, one: Scan, home: Path) -> None:
        for line in (home / REFUSED).read_text(encoding="utf-8").split("\n")[:-1]:
            number, reason = json.loads(line)
            row = number + 1 if one.lines is None else int(one.lines[number])
            self.refused.append(Bad(one.unit.label, row, reason, ""))

    def _tokens(self, one: Scan) -> Path:
        """The entry of the cache that holds a unit's documents."""
        before = self.cache.misses
        identity = ["tokens", one.identity, self.encoder.identity]
        home = self.cache.entry(identity, functools.partial(self._tokenise, one))
        if self.cache.misses == before:
            self.bar.advance(len(one.keys), 0)
        return home

    def _tokenise(self, one: Scan, directory: Path) -> None:
        origin: list[NDArray[np.int64]] = []
        refused: list[tuple[int, str]] = []
        size = self.encoder.tokenizer.vocab_size
        with ExitStack() as stack:
            writer = stack.enter_context(TokenWriter(directory, ENTRY, size))
            mask = stack.enter_context(TokenWriter(directory, TRAINED, size, np.uint8))
            for portion in self.encoder.portions(one.texts()):
                writer.add(portion.ids, portion.lengths)
                self.bar.advance(len(portion.lengths), len(portion.ids))
                if portion.trained is not None and portion.origin is not None:
                    mask.add(portion.trained, portion.lengths)
                    origin.append(portion.origin)
                    refused += portion.refused
            writer.finish()
            if origin:
                mask.finish()
        if origin:
            np.save(directory / ORIGIN, np.concatenate(origin))
            lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in refused]
            (directory / REFUSED).write_text("".join(lines), encoding="utf-8")

    def _add(self, split: Split, portion: Portion, chosen: NDArray[np.bool_]) -> None:
        """Adds the chosen documents to a split, but those that hold no prediction."""
        lengths, counts = portion.lengths, self.counts[split]
        counts["bytes"] += int(portion.sizes[chosen].sum())
        counts["ids"] += int((lengths[chosen] - self.encoder.specials).sum())
        kept = chosen & (lengths > 1)
        if kept.all():
            self.writers[split].add(portion.ids, lengths, portion.trained)
        elif kept.any():
            ids = np.repeat(kept, lengths)
            trained = None if portion.trained is None else portion.trained[ids]
            self.writers[split].add(portion.ids[ids], lengths[kept], trained)


class _Files:
    """The token files of a split, and of chats the file of what is trained."""

    def __init__(
        self, stack: ExitStack, directory: Path, split: Split, encoder: Encoding, masked: bool
    ) -> None:
        size = encoder.tokenizer.vocab_size
        self.ids = stack.enter_context(TokenWriter(directory, split, size))
        self.num_trained = 0
        self.mask = None
        if masked:
            mask = TokenWriter(directory, f"{split}.trained", size, np.uint8)
            self.mask = stack.enter_context(mask)

    def add(
        self, ids: NDArray[Any], lengths: NDArray[np.int64], trained: NDArray[np.uint8] | None
    ) -> None:
        self.ids.add(ids, lengths)
        if self.mask is not None:
            assert trained is not None
            self.mask.add(trained, lengths)
            self.num_trained += int(np.count_nonzero(trained))

    def finish(self) -> NDArray[np.int64]:
        if self.mask is not None:
            self.mask.finish()
        return self.ids.finish()


def figures(counts: Mapping[str, int], offsets: NDArray[np.int64]) -> dict[str, Any]:
    """What the summary says of one split."""
    lengths = np.diff(offsets)
    window = lengths[:WINDOW].tolist()
    pieces = [b - a - 1 for n in window for a, b in chunks(n, FILL_LENGTH)]
    return {
        "documents": len(lengths),
        "tokens": int(offsets[-1]),
        "bytes": counts["bytes"],
        "bytes_per_token": round(counts["bytes"] / max(1, counts["ids"]), 4),
        "longest": int(lengths.max(initial=0)),
        f"fill_{FILL_LENGTH}": round(fill(pieces, FILL_LENGTH), 4),
    }


@dataclass(frozen=True)
class ChatsEncoder:
    """Turns chats into portions: the counterpart of `Encoder` for a source of chats."""

    encoder: ChatEncoder

    @property
    def tokenizer(self) -> Tokenizer:
        return self.encoder.tokenizer

    @property
    def specials(self) -> int:
        """Nothing is added that is not of the template."""
        return 0

    @property
    def identity(self) -> list[Any]:
        """What the ids of a chat follow from, beside itself."""
        return [CHAT_FORMAT, *self.encoder.identity]

    def portions(self, texts: Iterable[str]) -> Iterator[Portion]:
        """The documents of the chats, some chats at a time."""
        rest = iter(texts)
        first = 0
        while some := [Chat.from_json(text) for text in itertools.islice(rest, TOKENIZE_AT_ONCE)]:
            yield self._portion(some, first)
            first += len(some)

    def _portion(self, chats: list[Chat], first: int) -> Portion:
        ids: list[NDArray[Any]] = [np.zeros(0, np.uint32)]
        trained: list[NDArray[np.uint8]] = [np.zeros(0, np.uint8)]
        origin, refused = [], []
        for number, found in enumerate(self.encoder.encode_batch(chats), first):
            if isinstance(found, str):
                refused.append((number, found))
                continue
            for document in found:
                ids.append(np.array(document.ids, np.uint32))
                mark = ON if document.mode == "on" else OFF
                trained.append(np.array(document.trained, np.uint8) * np.uint8(mark))
                origin.append(number)
        lengths = np.array([len(one) for one in ids[1:]], np.int64)
        return Portion(
            np.concatenate(ids),
            lengths,
            np.zeros(len(lengths), np.int64),
            np.concatenate(trained),
            np.array(origin, np.int64),
            refused,
        )


@dataclass(frozen=True)
class CompletionsEncoder:
    """Turns pairs into portions: prompt and completion are encoded apart, as an engine does."""

    encoder: Encoder

    @property
    def tokenizer(self) -> Tokenizer:
        return self.encoder.tokenizer

    @property
    def specials(self) -> int:
        return self.encoder.specials

    @property
    def identity(self) -> list[Any]:
        """What the ids of a pair follow from, beside itself."""
        return [COMPLETION_FORMAT, *self.encoder.identity]

    def portions(self, texts: Iterable[str]) -> Iterator[Portion]:
        """The documents of the pairs, some at a time."""
        rest, first = iter(texts), 0
        while some := [json.loads(text) for text in itertools.islice(rest, TOKENIZE_AT_ONCE)]:
            prompts, completions = zip(*some, strict=True)
            asked = self.tokenizer.encode_batch(list(prompts), bos=self.encoder.bos)
            told = self.tokenizer.encode_batch(list(completions))
            tail = list(self.encoder.end)
            ids = [np.array(a + b + tail, np.uint32) for a, b in zip(asked, told, strict=True)]
            marks = [
                np.repeat(np.array([0, PLAIN], np.uint8), [len(a), len(b) + len(tail)])
                for a, b in zip(asked, told, strict=True)
            ]
            sizes = [len(prompt.encode()) + len(told.encode()) for prompt, told in some]
            yield Portion(
                np.concatenate(ids),
                np.array([len(one) for one in ids], np.int64),
                np.array(sizes, np.int64),
                np.concatenate(marks),
                np.arange(first, first + len(some)),
            )
            first += len(some)
