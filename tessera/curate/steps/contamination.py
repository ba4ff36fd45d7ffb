"""Decontamination: rows that hold a problem of an evaluation, or a part of one.

`decontaminate` finds copies and light rewording: the overlap of a row with a problem is the number
of distinct word n-grams that both have, over the smaller of their numbers. For paraphrases,
`nearest` finds a problem by embedding and `same_problem` asks a judge (the paper's §3.1, §3.2).
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr

from tessera.ask import judge
from tessera.ask.ask import Reply, Request
from tessera.curate.steps import rows
from tessera.curate.steps.ask import ChatStep
from tessera.curate.steps.rows import AskStep, Drop, Result, RowStep
from tessera.curate.steps.words import BRACKETS, tokens
from tessera.data.conversation import Chat
from tessera.data.readers import Bad, DataError, expand, read_rows
from tessera.runs.files import FailureError
from tessera.runs.recipe import Config

SAME_PROBLEM = """\
Are these two the same problem in other words? They are, if who can solve one has solved the \
other: other names or another order of sentences make no difference, other numbers do. End with \
the line `VERDICT: yes` or `VERDICT: no`.

First:
{question}

Second:
{nearest}"""


def word_grams(text: str, n: int, *, mask_digits: bool = False) -> set[int]:
    """The distinct n-grams of words; a text shorter than n words is one gram, an empty one none.

    Each is a hash, which holds in this process alone and takes a third less time than a text.
    mask_digits: every number is the same word.
    """
    words = [one for one in tokens(text) if one not in BRACKETS]
    if mask_digits:
        words = ["0" if word[0].isdigit() else word for word in words]
    if len(words) < n:
        return {hash(tuple(words))} if words else set()
    return {*map(hash, zip(*(words[k:] for k in range(n)), strict=False))}


class EvalSet(Config):
    """Problems that must not be trained on: the string under `field` in each row of `paths`."""

    paths: str | list[str]
    field: str
    name: str | None = None

    @property
    def patterns(self) -> list[str]:
        return [self.paths] if isinstance(self.paths, str) else self.paths

    def problems(self) -> list[str]:
        """The problems. Raises DataError where a file holds none."""
        found: list[str] = []
        for path in expand(self.patterns):
            read = [row for _, row in read_rows(path) if not isinstance(row, Bad)]
            texts = [row.get(self.field) for row in read if isinstance(row, dict)]
            texts = [text for text in texts if isinstance(text, str) and text.strip()]
            if not texts:
                keys = ", ".join(read[0]) if read and isinstance(read[0], dict) else "none"
                raise DataError(f'{path} has no texts under "{self.field}"; its keys: {keys}')
            found += texts
        return found


class Decontaminate(RowStep):
    """Leaves out rows that overlap with a problem of `against` by `share` or more of n-grams.

    least: n-grams in common below which there is no overlap, so that two short questions are not
    the same problem for one phrase. mask_digits: numbers count as equal, so that the same problem
    with other numbers is caught, too.
    """

    step: Literal["decontaminate"]
    against: list[EvalSet] = Field(min_length=1)
    field: rows.Field = "question"
    n: int = Field(default=5, ge=1, le=32)
    share: float = Field(default=0.4, gt=0, le=1)
    least: int = Field(default=3, ge=1)
    mask_digits: bool = False

    def apply(self, chat: Chat) -> Result:
        share, problem = self.overlap(rows.text_of(chat, self.field))
        if share < self.share:
            return chat
        return Drop(f"contaminated by {self._problems[problem][0]}")

    def overlap(self, text: str) -> tuple[float, int]:
        """The text's largest overlap with a problem, and that problem's number."""
        having, sizes = self._index
        grams = word_grams(text, self.n, mask_digits=self.mask_digits)
        common = Counter(problem for gram in grams for problem in having.get(gram, ()))
        best = (0.0, 0)
        for problem, shared in common.items():
            if shared >= min(self.least, sizes[problem]):
                best = max(best, (shared / min(len(grams), sizes[problem]), problem))
        return best

    @functools.cached_property
    def _index(self) -> tuple[dict[int, list[int]], list[int]]:
        """The problems that have each n-gram, and the distinct n-grams of each problem."""
        having: dict[int, list[int]] = defaultdict(list)
        sizes = []
        for number, (_, text) in enumerate(self._problems):
            grams = word_grams(text, self.n, mask_digits=self.mask_digits)
            sizes.append(len(grams))
            for gram in grams:
                having[gram].append(number)
        return dict(having), sizes

    @functools.cached_property
    def _problems(self) -> list[tuple[str, str]]:
        """The name of its set and the text of each problem."""
        sets = [(one.name or one.patterns[0], one) for one in self.against]
        return [(name, text) for name, one in sets for text in one.problems()]


class Nearest(AskStep):
    """Writes the problem of `against` that is nearest by embedding into `nearest`.

    Its cosine goes into `nearest_score`. drop: rows from this cosine up are left out without a
    judge. teacher: of kind "embedder", or an endpoint that serves /embeddings.
    """

    step: Literal["nearest"]
    teacher: str = "embedder"
    against: list[EvalSet] = Field(min_length=1)
    drop: float = Field(default=1.01, gt=0)
    _vectors: NDArray[Any] = PrivateAttr()

    def problems(self) -> list[Request]:
        """What has to be embedded beside the rows."""
        return [_embedded(self.teacher, text) for text in self._texts]

    def requests(self, chat: Chat) -> list[Request]:
        return [_embedded(self.teacher, rows.question(chat))]

    def learn(self, replies: Sequence[Reply]) -> None:
        """Takes the embeddings of the problems. Raises FailureError where one failed."""
        failed = next((one.error for one in replies if one.vector is None), None)
        if failed:
            raise FailureError(f"a problem of `against` could not be embedded: {failed}")
        self._vectors = _unit(np.array([one.vector for one in replies], np.float32))

    def receive(self, chat: Chat, replies: Sequence[Reply]) -> Result:
        reply = replies[0]
        if reply.vector is None:
            return self.failed(reply.error or "no vector")
        scores = self._vectors @ _unit(np.array([reply.vector], np.float32))[0]
        best = int(scores.argmax())
        if scores[best] >= self.drop:
            return Drop("contaminated by its embedding")
        score = round(float(scores[best]), 4)
        return rows.tagged(chat, self.step, nearest=self._texts[best], nearest_score=score)

    @functools.cached_property
    def _texts(self) -> list[str]:
        return [text for one in self.against for text in one.problems()]


class SameProblem(ChatStep):
    """Asks whether a row is the problem that `nearest` found, and leaves it out if it is.

    over: the cosine from which it is asked. A reply without a verdict counts as the same.
    """

    step: Literal["same_problem"]
    over: float = 0.6
    text: str = SAME_PROBLEM

    def requests(self, chat: Chat) -> list[Request]:
        score = chat.extra.get("nearest_score")
        if not isinstance(score, float | int) or score < self.over:
            return []
        fields = {"question": rows.question(chat), "nearest": str(chat.extra.get("nearest"))}
        return [self.prompt(judge.fill(self.text, **fields))]

    def take(self, chat: Chat, reply: str) -> Result:
        return chat if judge.verdict(reply) is False else Drop("contaminated as judged")


def _embedded(teacher: str, text: str) -> Request:
    return Request(teacher, [{"role": "user", "content": text}], embed=True)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
