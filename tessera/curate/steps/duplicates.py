"""Duplicates: the same text, and nearly the same.

`near_dedupe` keeps the first of texts whose sets of word n-grams have a Jaccard index over a
threshold, by MinHash (Broder 1997): candidates agree in all entries of some band, the share of
equal entries of the whole signature decides, and clusters are connected components. Beside that,
what `words.counted` finds in two texts must be equal, in order: `12 + 7` is no copy of `12 - 7`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from tessera.curate.steps import rows
from tessera.curate.steps.rows import Drop, Result, SetStep
from tessera.curate.steps.words import BRACKETS, counted, tokens
from tessera.data.conversation import Chat

NUM_HASHES = 128
CAUGHT = 0.98  # of the pairs at the threshold itself, by the bands
NOTHING = np.uint16(0xFFFF)  # every entry of the signature of a text without words
# How a question is put makes no other question: "What is 12 + 7?", "Compute 12 + 7."
PUT = BRACKETS | frozenset(
    "what what's is are the value of compute calculate evaluate find".split()
)
_RANDOM = np.random.default_rng(1997)
_FACTORS = _RANDOM.integers(1, 2**64, 40, dtype=np.uint64)  # of a band's entries, a gram's words
_SLOPES = _RANDOM.integers(0, 2**31, NUM_HASHES, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
_SHIFTS = _RANDOM.integers(0, 2**32, NUM_HASHES, dtype=np.uint32)


class Dedupe(SetStep):
    """Keeps the first row of each text, white space and case apart."""

    step: Literal["dedupe"]
    field: rows.Field = "all"

    def digest(self, chats: Sequence[Chat]) -> NDArray[Any]:
        """(rows, 2): 128 bits of each text."""
        texts = (" ".join(rows.text_of(chat, self.field).lower().split()) for chat in chats)
        hashes = [blake2b(t.encode("utf-8", "replace"), digest_size=16).digest() for t in texts]
        return np.frombuffer(b"".join(hashes), np.uint64).reshape(len(chats), 2)

    def decide(self, digests: NDArray[Any], seed: int) -> NDArray[Any]:
        _, firsts = np.unique(digests, axis=0, return_index=True)
        return np.isin(np.arange(len(digests)), firsts)

    def judge(self, chat: Chat, verdict: Any) -> Result:
        return chat if verdict else Drop("the same text as an earlier row")


class NearDedupe(SetStep):
    """Keeps the first of rows whose `field` has a Jaccard index of `threshold` or more.

    Rows whose numbers, operators or telling words (`words.counted`) differ are all kept. n: words
    in an n-gram; long texts want 5, questions of a few sentences 2 or 3. With field = "question",
    this stands before anything that makes several rows of one, of which it keeps the first.
    field = "all" looks at answers, too, and keeps a pair whose answers differ.
    """

    step: Literal["near_dedupe"]
    field: rows.Field = "question"
    threshold: float = Field(default=0.8, gt=0, lt=1)
    n: int = Field(default=3, ge=1, le=32)

    def digest(self, chats: Sequence[Chat]) -> NDArray[Any]:
        return signatures([rows.text_of(chat, self.field) for chat in chats], self.n)

    def decide(self, digests: NDArray[Any], seed: int) -> NDArray[Any]:
        return clusters(digests, self.threshold) == np.arange(len(digests))

    def judge(self, chat: Chat, verdict: Any) -> Result:
        return chat if verdict else Drop("nearly the text of an earlier row")


def signatures(texts: Iterable[str], n: int) -> NDArray[np.uint16]:
    """(texts, 132): MinHash signatures of 128 entries, and 64 bits of what `counted` finds."""
    cut = [tokens(text) for text in texts]
    hashes, counts = _grams([[one for one in found if one not in PUT] for found in cut], n)
    digest = np.full((len(cut), NUM_HASHES + 4), NOTHING)
    wordy = np.flatnonzero(counts)
    starts = (np.cumsum(counts) - counts)[wordy]
    for entry in range(NUM_HASHES if len(wordy) else 0):
        least = np.minimum.reduceat(hashes * _SLOPES[entry] + _SHIFTS[entry], starts)
        digest[wordy, entry] = least * np.uint32(0x9E3779B1) >> np.uint32(16)
    told = b"".join(_hash.__wrapped__(" ".join(counted(found))) for found in cut)
    digest[:, NUM_HASHES:] = np.frombuffer(told, np.uint16).reshape(-1, 4)
    return digest


def _grams(texts: Sequence[list[str]], n: int) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """A hash of each n-gram, text after text, and their number of each text.

    A text shorter than n words is one gram, an empty one none.
    """
    lengths = np.array([len(words) for words in texts], np.int64)
    joined = b"".join(map(_hash, (word for words in texts for word in words)))
    words = np.append(np.frombuffer(joined, np.uint64), np.zeros(n, np.uint64))
    at = np.arange(lengths.sum())
    left = np.repeat(np.cumsum(lengths), lengths) - at  # words of the text from here on
    found = np.zeros(len(at), np.uint64)
    for k in range(n):
        found += np.where(k < left, words[at + k], 0) * _FACTORS[k]
    counts = np.where(lengths >= n, lengths - n + 1, np.minimum(lengths, 1))
    begins = np.repeat(lengths, lengths) - left < np.repeat(counts, lengths)
    return (found[begins] >> np.uint64(32)).astype(np.uint32), counts


@functools.lru_cache(1 << 18)
def _hash(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands, entries of each): the longest bands that catch 98 % of the pairs at the threshold."""
    fits = [(NUM_HASHES // size, size) for size in range(1, 33)]
    good = [(b, r) for b, r in fits if 1 - (1 - threshold**r) ** b >= CAUGHT]
    return good[-1] if good else fits[0]


def clusters(found: NDArray[np.uint16], threshold: float) -> NDArray[np.int64]:
    """(rows,): the first row of each row's cluster, which is itself for most."""
    bands, size = bands_for(threshold)
    found, told = found[:, :NUM_HASHES], found[:, NUM_HASHES:].copy().view(np.uint64)[:, 0]
    labels = np.arange(len(found))
    wordy = np.flatnonzero((found != NOTHING).any(axis=1))
    edges = [_edges(found, told, wordy, band * size, size, threshold) for band in range(bands)]
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
    found: NDArray[np.uint16],
    told: NDArray[np.uint64],
    among: NDArray[np.int64],
    at: int,
    size: int,
    threshold: float,
) -> NDArray[np.int64]:
    """(2, edges): rows that agree in one band, each with the first that does, and in the whole."""
    keys = told[among] + found[among, at : at + size].astype(np.uint64) @ _FACTORS[:size]
    _, firsts, of = np.unique(keys, return_index=True, return_inverse=True)
    left, right = among[firsts[of]], among
    left, right = left[left != right], right[left != right]
    same = np.zeros(len(left))
    for begin in range(0, len(left), 1 << 16):  # bounds the memory of the comparison
        piece = slice(begin, begin + (1 << 16))
        same[piece] = (found[left[piece]] == found[right[piece]]).mean(axis=1)
    agreed = (same >= threshold) & (told[left] == told[right])
    return np.stack([left[agreed], right[agreed]])
