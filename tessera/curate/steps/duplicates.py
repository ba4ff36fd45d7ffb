"""Hashes of the words and word n-grams of many texts at once, in numpy.

A word is a run of ASCII letters and digits or of bytes above 127; case and punctuation do not
count. All texts are laid end to end. With a random 64-bit value v for every byte, position i
contributes v[byte] p^i, and the word from a to b has the hash (S_b - S_a) p^-a, where S are prefix
sums modulo 2^64 and p is odd, hence invertible. No loop runs over texts or words, so that 33
million rows are a matter of hours. The hash resists accidents, not adversaries.

Duplicates: the same text, and nearly the same.

`dedupe` keeps the first of equal texts, by 128 bits each. `near_dedupe` keeps the first of texts
whose sets of word n-grams have a Jaccard index over a threshold, by MinHash (Broder 1997): the
share of equal entries of two signatures estimates the index. Candidates agree in all entries of
some band; the estimate over the whole signature then decides, and clusters are connected
components, as in datatrove and NeMo Curator. A signature is 256 bytes a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from tessera.curate.steps import Result, rows
from tessera.curate.steps.rows import Drop
from tessera.data.conversation import Chat
from tessera.runs.recipe import Config

Hashes = NDArray[np.uint64]
_WORDS_RNG = np.random.default_rng(20250502)
_VALUES = _WORDS_RNG.integers(1, 2**64, 256, dtype=np.uint64)
_BASE = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))
_STEP = np.uint64(0xD1342543DE82EF95)
_WORD = np.zeros(256, bool)
_WORD[[*range(48, 58), *range(97, 123), *range(128, 256)]] = True
_DIGIT = np.zeros(256, bool)
_DIGIT[48:58] = True
CHUNK = 1 << 22  # bytes laid end to end at once: bounds the memory to some 40 of it


@dataclass(frozen=True)
class Grams:
    """n-grams of several texts: `hashes[starts[i] : starts[i + 1]]` are those of text i."""

    hashes: Hashes
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def owner(self) -> NDArray[np.int64]:
        """The text of each n-gram."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))


def word_grams(texts: Sequence[str], n: int, *, mask_digits: bool = False) -> Grams:
    """The n-grams of words of each text; one shorter than n words is one gram, an empty one none.

    mask_digits: every number counts as the same word.
    """
    pieces: list[Hashes] = []
    counts: list[NDArray[np.int64]] = []
    batch: list[bytes] = []
    size = 0
    for text in texts:
        batch.append(text.lower().encode("utf-8", "replace"))
        size += len(batch[-1])
        if size > CHUNK:
            _add(batch, n, mask_digits, pieces, counts)
            batch, size = [], 0
    _add(batch, n, mask_digits, pieces, counts)
    lengths = np.concatenate(counts) if counts else np.zeros(0, np.int64)
    hashes = np.concatenate(pieces) if pieces else np.zeros(0, np.uint64)
    return Grams(hashes, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def _add(
    batch: list[bytes],
    n: int,
    mask_digits: bool,
    pieces: list[Hashes],
    counts: list[NDArray[np.int64]],
) -> None:
    if batch:
        words, lengths = _words(batch, mask_digits)
        found, per_text = _grams(words, lengths, n)
        pieces.append(found)
        counts.append(per_text)


def _words(batch: Sequence[bytes], mask_digits: bool) -> tuple[Hashes, NDArray[np.int64]]:
    """The hash of every word, and how many words each text has."""
    data = np.frombuffer(b" ".join(batch) + b" ", np.uint8)
    inside = _WORD[data]
    edges = np.flatnonzero(np.diff(inside, prepend=False))
    begins, ends = edges[::2], edges[1::2]
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(len(data), _BASE))
        sums = np.concatenate([[np.uint64(0)], np.cumsum(_VALUES[data] * powers)])
        inverses = np.cumprod(np.full(len(data), _INVERSE))
        words = mixed((sums[ends] - sums[begins]) * inverses[begins])
    if mask_digits:
        digits = np.concatenate([[0], np.cumsum(_DIGIT[data])])
        words = np.where(digits[ends] - digits[begins] == ends - begins, np.uint64(1), words)
    stops = np.cumsum([len(one) + 1 for one in batch])
    return words, np.diff(np.searchsorted(begins, stops), prepend=0)


def _grams(words: Hashes, lengths: NDArray[np.int64], n: int) -> tuple[Hashes, NDArray[np.int64]]:
    counts = np.where(lengths >= n, lengths - n + 1, np.minimum(lengths, 1))
    firsts = np.cumsum(lengths) - lengths
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = np.repeat(firsts, counts) + offsets
    stops = np.repeat(firsts + lengths, counts)
    found = np.zeros(len(begins), np.uint64)
    with np.errstate(over="ignore"):
        for k in range(n):
            at = begins + k
            inside = at < stops
            found *= _STEP
            found[inside] += words[at[inside]]
    return mixed(found), counts


def mixed(values: Hashes) -> Hashes:
    """Every bit spread over all (the finaliser of SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


NUM_HASHES = 128
CAUGHT = 0.98  # of the pairs at the threshold itself, by the bands
NOTHING = np.uint16(0xFFFF)  # an entry of the signature of a text without words
_RNG = np.random.default_rng(1997)
_FACTORS = _RNG.integers(0, 2**63, NUM_HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_SHIFTS = _RNG.integers(0, 2**64, NUM_HASHES, dtype=np.uint64)


class Dedupe(Config):
    """Keeps the first of the rows whose `field` is the same text, white space and case apart.

    With field = "question" this stands before anything that makes several rows of one.
    """

    step: Literal["dedupe"]
    field: rows.Field = "all"

    def digest(self, chats: Sequence[Chat]) -> NDArray[Any]:
        """(rows, 2): 128 bits of each text."""
        texts = (" ".join(rows.text_of(chat, self.field).lower().split()) for chat in chats)
        hashes = [blake2b(t.encode("utf-8", "replace"), digest_size=16).digest() for t in texts]
        return np.frombuffer(b"".join(hashes), np.uint64).reshape(len(chats), 2)

    def decide(self, digests: NDArray[Any], seed: int) -> NDArray[Any]:
        """(rows,): whether a row is the first of its text."""
        order = np.lexsort((np.arange(len(digests)), digests[:, 1], digests[:, 0]))
        new = np.ones(len(digests), bool)
        new[1:] = np.any(digests[order[1:]] != digests[order[:-1]], axis=1)
        first = np.zeros(len(digests), bool)
        first[order] = new
        return first

    def judge(self, chat: Chat, verdict: Any) -> Result:
        return chat if verdict else Drop("the same text as an earlier row")


class NearDedupe(Config):
    """Keeps the first of rows whose `field` has a Jaccard index of `threshold` or more.

    n: words in an n-gram; long texts want 5, questions of a few sentences 2 or 3. One changed word
    costs n of them. With field = "question", this stands before anything that makes several rows of
    one: of several samples of a question, or of its answers with reasoning on and off, it keeps the
    first. field = "all" looks at answers, too, and keeps a pair whose answers differ.
    """

    step: Literal["near_dedupe"]
    field: rows.Field = "question"
    threshold: float = Field(default=0.8, gt=0, lt=1)
    n: int = Field(default=3, ge=1, le=32)

    def digest(self, chats: Sequence[Chat]) -> NDArray[Any]:
        """(rows, 128): the signature of each text."""
        return signatures(word_grams([rows.text_of(chat, self.field) for chat in chats], self.n))

    def decide(self, digests: NDArray[Any], seed: int) -> NDArray[Any]:
        """(rows,): whether a row is the first of its cluster."""
        return clusters(digests, self.threshold) == np.arange(len(digests))

    def judge(self, chat: Chat, verdict: Any) -> Result:
        return chat if verdict else Drop("nearly the text of an earlier row")


def signatures(grams: Grams) -> NDArray[np.uint16]:
    """(texts, 128): the smallest of each of 128 hashes over the n-grams of a text, cut to 16 bits.

    Two unequal entries are equal after the cut once in 65,536.
    """
    found = np.full((len(grams), NUM_HASHES), NOTHING)
    full = np.flatnonzero(np.diff(grams.starts))
    if not len(full):
        return found
    starts = grams.starts[full]
    with np.errstate(over="ignore"):
        for index in range(NUM_HASHES):
            # Multiply-shift: the upper half of a x + b, which is where the good bits are.
            hashed = (grams.hashes * _FACTORS[index] + _SHIFTS[index]) >> np.uint64(32)
            least = np.minimum.reduceat(hashed.astype(np.uint32), starts)
            found[full, index] = mixed(least.astype(np.uint64)) >> np.uint64(48)
    return found


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands, entries of each): the longest bands that catch 98 % of the pairs at the threshold."""
    fits = [(NUM_HASHES // size, size) for size in range(1, 33)]
    good = [(b, r) for b, r in fits if 1 - (1 - threshold**r) ** b >= CAUGHT]
    return good[-1] if good else fits[0]


def clusters(found: NDArray[np.uint16], threshold: float) -> NDArray[np.int64]:
    """(rows,): the first row of each row's cluster, which is itself for most."""
    bands, size = bands_for(threshold)
    labels = np.arange(len(found))
    wordy = np.flatnonzero((found != NOTHING).any(axis=1))
    edges = [_edges(found, wordy, band * size, size, threshold) for band in range(bands)]
    left, right = np.concatenate(edges, axis=1)
    while True:
        low = np.minimum(labels[left], labels[right])
        before = labels.copy()
        np.minimum.at(labels, left, low)
        np.minimum.at(labels, right, low)
        labels = labels[labels]
        if np.array_equal(before, labels):
            return labels


def _edges(
    found: NDArray[np.uint16], among: NDArray[np.int64], at: int, size: int, threshold: float
) -> NDArray[np.int64]:
    """(2, edges): rows that agree in one band, each with the first that does, and in the whole."""
    with np.errstate(over="ignore"):
        keys = np.zeros(len(among), np.uint64)
        for column in range(at, at + size):
            keys = mixed(keys * np.uint64(0x9E3779B97F4A7C15) + found[among, column] + np.uint64(1))
    order = np.argsort(keys, kind="stable")
    new = np.diff(keys[order], prepend=keys[order[:1]] + np.uint64(1)) != 0
    firsts = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    left, right = among[order[firsts[~new]]], among[order[~new]]
    same = np.zeros(len(left))
    for begin in range(0, len(left), 1 << 16):  # bounds the memory of the comparison
        piece = slice(begin, begin + (1 << 16))
        same[piece] = (found[left[piece]] == found[right[piece]]).mean(axis=1)
    agreed = same >= threshold
    return np.stack([left[agreed], right[agreed]])
