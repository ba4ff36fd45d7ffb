"""Decontamination by n-grams: rows that hold a problem of an evaluation, or a part of one.

The overlap of a row with a problem is the number of distinct word n-grams that both have, over the
smaller of their numbers: 1 for a copy, for a copy within a longer text, and for a part of a
problem. It sees copies, near-copies and light rewording; a real paraphrase shares few n-grams, and
is found by `nearest` and `same_problem` (similar.py), as in the paper (§3.1).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from tessera.curate.steps import Result, rows
from tessera.curate.steps.rows import Drop
from tessera.curate.steps.words import Hashes, word_grams
from tessera.data.conversation import Chat
from tessera.data.readers import Bad, DataError, expand, read_rows
from tessera.runs.recipe import Config


class EvalSet(Config):
    """Problems that must not be trained on: the string under `field` in each row of `paths`."""

    paths: str | list[str]
    field: str
    name: str | None = None

    def problems(self) -> list[str]:
        """The problems. Raises DataError where a file holds none."""
        patterns = [self.paths] if isinstance(self.paths, str) else self.paths
        found: list[str] = []
        for path in expand(patterns):
            read = [row for _, row in read_rows(path) if not isinstance(row, Bad)]
            texts = [row.get(self.field) for row in read if isinstance(row, dict)]
            texts = [text for text in texts if isinstance(text, str) and text.strip()]
            if not texts:
                keys = ", ".join(read[0]) if read and isinstance(read[0], dict) else "none"
                raise DataError(f'{path} has no texts under "{self.field}"; its keys: {keys}')
            found += texts
        return found


class Decontaminate(Config):
    """Leaves out rows that overlap with a problem of `against` by `share` or more of n-grams.

    least: n-grams in common below which nothing is said, so that two short questions are not the
    same problem for one phrase. mask_digits: numbers count as equal, so that the same problem with
    other numbers is caught, too.
    """

    step: Literal["decontaminate"]
    against: list[EvalSet] = Field(min_length=1)
    field: rows.Field = "question"
    n: int = Field(default=5, ge=1, le=32)
    share: float = Field(default=0.4, gt=0, le=1)
    least: int = Field(default=3, ge=1)
    mask_digits: bool = False

    def apply_all(self, chats: Sequence[Chat]) -> Sequence[Result]:
        texts = [rows.text_of(chat, self.field) for chat in chats]
        shares, nearest = self.overlaps(texts)
        names = self._index.names
        return [
            Drop(f"contaminated by {names[found]}") if share >= self.share else chat
            for chat, share, found in zip(chats, shares, nearest, strict=True)
        ]

    def overlaps(self, texts: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Each text's largest overlap with a problem, and the number of that problem."""
        grams = word_grams(texts, self.n, mask_digits=self.mask_digits)
        return self._index.overlaps(*_distinct(grams.owner, grams.hashes), len(texts), self.least)

    @functools.cached_property
    def _index(self) -> Index:
        names, problems = [], []
        for one in self.against:
            found = one.problems()
            label = one.name or (one.paths if isinstance(one.paths, str) else one.paths[0])
            names += [label] * len(found)
            problems += found
        grams = word_grams(problems, self.n, mask_digits=self.mask_digits)
        return Index.of(*_distinct(grams.owner, grams.hashes), names)


@dataclass(frozen=True)
class Index:
    """The n-grams of all problems, sorted; `owners` are the problems that have each.

    sizes: distinct n-grams of each problem. names: the set that it belongs to.
    """

    hashes: Hashes
    owners: NDArray[np.int64]
    sizes: NDArray[np.int64]
    names: list[str]

    @classmethod
    def of(cls, owners: NDArray[np.int64], hashes: Hashes, names: list[str]) -> Index:
        order = np.argsort(hashes, kind="stable")
        sizes = np.bincount(owners, minlength=len(names))
        return cls(hashes[order], owners[order], sizes, names)

    def overlaps(
        self, owners: NDArray[np.int64], hashes: Hashes, count: int, least: int
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """(texts,) the largest overlap with a problem, and which problem that is."""
        begins = np.searchsorted(self.hashes, hashes, "left")
        hits = np.searchsorted(self.hashes, hashes, "right") - begins
        text = np.repeat(owners, hits)
        offsets = np.arange(hits.sum()) - np.repeat(np.cumsum(hits) - hits, hits)
        problem = self.owners[np.repeat(begins, hits) + offsets]
        pairs, common = np.unique(text * len(self.names) + problem, return_counts=True)
        text, problem = np.divmod(pairs, len(self.names))
        own = np.bincount(owners, minlength=count)
        enough = common >= np.minimum(least, self.sizes[problem])
        share = np.where(enough, common / np.minimum(own[text], self.sizes[problem]), 0.0)
        best, nearest = np.zeros(count), np.zeros(count, np.int64)
        order = np.argsort(share, kind="stable")  # the largest is written last, and stays
        best[text[order]], nearest[text[order]] = share[order], problem[order]
        return best, nearest


def _distinct(owners: NDArray[np.int64], hashes: Hashes) -> tuple[NDArray[Any], NDArray[Any]]:
    """Every n-gram of every text once."""
    order = np.lexsort((hashes, owners))
    owners, hashes = owners[order], hashes[order]
    new = np.ones(len(owners), bool)
    new[1:] = (owners[1:] != owners[:-1]) | (hashes[1:] != hashes[:-1])
    return owners[new], hashes[new]
