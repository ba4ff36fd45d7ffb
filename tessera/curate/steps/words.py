"""Hashes of the words and word n-grams of many texts at once, in numpy.

A word is a run of ASCII letters and digits or of bytes above 127; case and punctuation do not
count. All texts are laid end to end. With a random 64-bit value v for every byte, position i
contributes v[byte] p^i, and the word from a to b has the hash (S_b - S_a) p^-a, where S are prefix
sums modulo 2^64 and p is odd, hence invertible. No loop runs over texts or words, so that 33
million rows are a matter of hours. The hash resists accidents, not adversaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
_RNG = np.random.default_rng(20250502)
_VALUES = _RNG.integers(1, 2**64, 256, dtype=np.uint64)
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
