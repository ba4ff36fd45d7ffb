"""Duplicates: the same text, and nearly the same.

`near_dedupe` keeps the first of texts whose sets of word n-grams have a Jaccard index over a
threshold, by MinHash (Broder 1997): candidates agree in all entries of some band, the share of
equal entries of the whole signature decides, and clusters are connected components.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from tessera.curate.steps import rows
from tessera.curate.steps.rows import Drop, Result, SetStep
from tessera.data.conversation import Chat
from tessera.runs.files import RunError

NUM_HASHES = 128
CAUGHT = 0.98  # of the pairs at the threshold itself, by the bands
NOTHING = np.uint16(0xFFFF)  # every entry of the signature of a text without words
_FACTORS = np.random.default_rng(1997).integers(1, 2**64, 32, dtype=np.uint64)  # hash a band
_WORD = re.compile(r"[a-z0-9\u0080-\U0010ffff]+")


def word_grams(text: str, n: int, *, mask_digits: bool = False) -> set[str]:
    """The distinct n-grams of words; a text shorter than n words is one gram, an empty one none.

    A word is a run of ASCII letters, digits and characters above 127, in lower case. mask_digits:
    every number is the same word.
    """
    words = _WORD.findall(text.lower())
    if mask_digits:
        words = ["0" if word.isdecimal() and word.isascii() else word for word in words]
    count = max(len(words) - n + 1, min(len(words), 1))
    return {" ".join(words[i : i + n]) for i in range(count)}


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

    n: words in an n-gram; long texts want 5, questions of a few sentences 2 or 3. With field =
    "question", this stands before anything that makes several rows of one, of which it keeps the
    first. field = "all" looks at answers, too, and keeps a pair whose answers differ.
    """

    step: Literal["near_dedupe"]
    field: rows.Field = "question"
    threshold: float = Field(default=0.8, gt=0, lt=1)
    n: int = Field(default=3, ge=1, le=32)

    def digest(self, chats: Sequence[Chat]) -> NDArray[Any]:
        return signatures(word_grams(rows.text_of(chat, self.field), self.n) for chat in chats)

    def decide(self, digests: NDArray[Any], seed: int) -> NDArray[Any]:
        return clusters(digests, self.threshold) == np.arange(len(digests))

    def judge(self, chat: Chat, verdict: Any) -> Result:
        return chat if verdict else Drop("nearly the text of an earlier row")


def signatures(grams: Iterable[set[str]]) -> NDArray[np.uint16]:
    """(texts, 128): MinHash signatures, each entry cut to its lower 16 bits. Needs rensa."""
    try:
        import rensa
    except ImportError:
        raise RunError(
            "the step `near_dedupe` needs rensa: pip install 'tessera[curate]'"
        ) from None
    library: Any = rensa
    found = library.RMinHash.digests_from_token_sets(list(grams), NUM_HASHES, 1997)
    return np.array(found, np.uint32).reshape(-1, NUM_HASHES).astype(np.uint16)


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
    keys = found[among, at : at + size].astype(np.uint64) @ _FACTORS[:size]
    _, firsts, of = np.unique(keys, return_index=True, return_inverse=True)
    left, right = among[firsts[of]], among
    left, right = left[left != right], right[left != right]
    same = np.zeros(len(left))
    for begin in range(0, len(left), 1 << 16):  # bounds the memory of the comparison
        piece = slice(begin, begin + (1 << 16))
        same[piece] = (found[left[piece]] == found[right[piece]]).mean(axis=1)
    agreed = same >= threshold
    return np.stack([left[agreed], right[agreed]])
