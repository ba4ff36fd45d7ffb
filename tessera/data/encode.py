"""Documents to ids: beginning, text, end; and a source's token files, written from the cache.

A unit's documents are tokenised once, all of them in order, into an entry of the cache; which of
them are held out is decided by the source they stand in, so the entry serves every source, mix
and recipe. Writing a split is then copying. Problems are drawn and tokenised anew: what they are
follows from code and not from a file, and they cost little.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.data.batch import chunks, fill
from tessera.data.cache import TokenCache
from tessera.data.order import WINDOW
from tessera.data.sources import SPLITS, Scan, Source, Split
from tessera.data.store import TokenWriter, blocks, open_tokens
from tessera.data.tokenizer import Tokenizer
from tessera.progress import Progress

TOKENIZE_AT_ONCE = 512  # documents, and about as many characters: whichever is reached first
CHARACTERS_AT_ONCE = 1 << 22
FILL_LENGTH = 512  # the summary states the fill of rows this long
ENTRY = "documents"


@dataclass(frozen=True)
class Portion:
    """Some documents: their ids end to end, (n,) how many each has, (n,) bytes of its text."""

    ids: NDArray[Any]
    lengths: NDArray[np.int64]
    sizes: NDArray[np.integer[Any]]


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

    @functools.cached_property
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
    """Both splits of a source on their way to `directory`, and what there is to say of them."""

    def __init__(self, directory: Path, encoder: Encoder, cache: TokenCache, bar: Progress) -> None:
        self.directory, self.encoder, self.cache, self.bar = directory, encoder, cache, bar
        self.counts: dict[Split, Counter[str]] = {split: Counter() for split in SPLITS}

    def write(self, source: Source) -> list[dict[str, Any]]:
        """Writes the token files of a source; returns a row of figures for each split."""
        size = self.encoder.tokenizer.vocab_size
        with (
            TokenWriter(self.directory, "train", size) as train,
            TokenWriter(self.directory, "heldout", size) as heldout,
        ):
            self.writers = {"train": train, "heldout": heldout}
            for one in source.corpus:
                self._copy(one, source.is_heldout(one.keys))
            for one in source.own_heldout:
                self._copy(one, np.ones(len(one.keys), bool))
            for task, split, count in source.tasks:
                for portion in self.encoder.portions(source.problems(task, split, count)):
                    self._add(split, portion, np.ones(len(portion.lengths), bool))
                    self.bar.advance(len(portion.lengths), len(portion.ids))
            return [
                {"split": split, **figures(self.counts[split], self.writers[split].finish())}
                for split in SPLITS
            ]

    def _copy(self, one: Scan, heldout: NDArray[np.bool_]) -> None:
        """Adds the documents of a unit, which are tokenised now if they never were."""
        ids, offsets = self._tokens(one)
        for start, stop in blocks(offsets):
            part = slice(start, stop)
            portion = Portion(
                ids[offsets[start] : offsets[stop]],
                np.diff(offsets[start : stop + 1]),
                one.sizes[part],
            )
            self._add("train", portion, ~heldout[part])
            self._add("heldout", portion, heldout[part])

    def _tokens(self, one: Scan) -> tuple[NDArray[Any], NDArray[np.int64]]:
        before = self.cache.misses
        identity = ["tokens", one.identity, self.encoder.identity]
        home = self.cache.entry(identity, functools.partial(self._tokenise, one))
        if self.cache.misses == before:
            self.bar.advance(len(one.keys), 0)
        return open_tokens(home, ENTRY)

    def _tokenise(self, one: Scan, directory: Path) -> None:
        with TokenWriter(directory, ENTRY, self.encoder.tokenizer.vocab_size) as writer:
            for portion in self.encoder.portions(one.texts()):
                writer.add(portion.ids, portion.lengths)
                self.bar.advance(len(portion.lengths), len(portion.ids))
            writer.finish()

    def _add(self, split: Split, portion: Portion, chosen: NDArray[np.bool_]) -> None:
        """Adds the chosen documents to a split, but those that hold no prediction."""
        lengths, counts = portion.lengths, self.counts[split]
        counts["bytes"] += int(portion.sizes[chosen].sum())
        counts["ids"] += int((lengths[chosen] - self.encoder.specials).sum())
        kept = chosen & (lengths > 1)
        if kept.all():
            self.writers[split].add(portion.ids, lengths)
        elif kept.any():
            self.writers[split].add(portion.ids[np.repeat(kept, lengths)], lengths[kept])


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
