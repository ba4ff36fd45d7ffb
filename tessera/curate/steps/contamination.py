"""Decontamination by n-grams: rows that hold a problem of an evaluation, or a part of one.

The overlap of a row with a problem is the number of distinct word n-grams that both have, over the
smaller of their numbers: 1 for a copy, for a copy within a longer text, and for a part of a
problem. It sees copies, near-copies and light rewording; a real paraphrase shares few n-grams, and
is found by `nearest` and `same_problem` (similar.py), as in the paper (§3.1).

Decontamination of paraphrases: the nearest problem of an evaluation, and a judge.

NeMo-Skills' way and the paper's (§3.1, §3.2): embed, take the nearest problem by cosine, ask a
model whether the two are the same. `nearest` writes the nearest problem and its cosine into the row
and `same_problem` asks about those above a threshold; each is resumed a request at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr

from tessera.ask.ask import Reply, Request
from tessera.curate.steps import Result, ask, rows
from tessera.curate.steps.ask import Asking
from tessera.curate.steps.duplicates import Hashes, word_grams
from tessera.curate.steps.rows import Drop
from tessera.data.conversation import Chat
from tessera.data.readers import Bad, DataError, expand, read_rows
from tessera.runs.files import FailureError
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


class Nearest(Config):
    """Writes the problem of `against` that is nearest by embedding into `nearest`, its cosine into
    `nearest_score`, and leaves out rows over `drop` without a judge.

    teacher: of kind "embedder", or an endpoint that serves /embeddings.
    """

    step: Literal["nearest"]
    teacher: str = "embedder"
    against: list[EvalSet] = Field(min_length=1)
    drop: float = Field(default=1.01, gt=0)
    _vectors: NDArray[Any] = PrivateAttr()

    def problems(self) -> list[Request]:
        """What has to be embedded beside the rows."""
        return [self._request(text) for text in self._texts]

    def requests(self, chat: Chat) -> list[Request]:
        return [self._request(rows.question(chat))]

    def learn(self, replies: Sequence[Reply]) -> None:
        """Takes the embeddings of the problems. Raises FailureError where one failed."""
        failed = next((one.error for one in replies if one.vector is None), None)
        if failed:
            raise FailureError(f"a problem of `against` could not be embedded: {failed}")
        self._vectors = _unit(np.array([one.vector for one in replies], np.float32))

    def receive(self, chat: Chat, replies: Sequence[Reply]) -> Result:
        reply = replies[0]
        if reply.vector is None:
            return Drop(f"{self.teacher}: {(reply.error or 'no vector')[:120]}")
        scores = self._vectors @ _unit(np.array([reply.vector], np.float32))[0]
        best = int(scores.argmax())
        if scores[best] >= self.drop:
            return Drop("contaminated by its embedding")
        score = round(float(scores[best]), 4)
        return rows.tagged(chat, self.step, nearest=self._texts[best], nearest_score=score)

    def _request(self, text: str) -> Request:
        return Request(self.teacher, [{"role": "user", "content": text}], embed=True)

    @functools.cached_property
    def _texts(self) -> list[str]:
        return [text for one in self.against for text in one.problems()]


class SameProblem(Asking):
    """Asks whether a row is the problem that `nearest` found, and leaves it out if it is.

    over: the cosine from which it is asked; "no verdict" counts as the same, for what slips through
    cannot be mended later.
    """

    step: Literal["same_problem"]
    over: float = 0.6
    text: str = ask.SAME_PROBLEM

    def requests(self, chat: Chat) -> list[Request]:
        score = chat.extra.get("nearest_score")
        if not isinstance(score, float | int) or score < self.over:
            return []
        fields = {"question": rows.question(chat), "nearest": str(chat.extra.get("nearest"))}
        return [self.prompt(ask.fill(self.text, **fields))]

    def receive(self, chat: Chat, replies: Sequence[Reply]) -> Result:
        if error := replies[0].error:
            return Drop(f"{self.teacher}: {error[:120]}")
        said = ask.verdict(replies[0].text)
        return chat if said is False else Drop("contaminated as judged")


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
