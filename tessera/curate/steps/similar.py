"""Decontamination of paraphrases: the nearest problem of an evaluation, and a judge.

NeMo-Skills' way and the paper's (§3.1, §3.2): embed, take the nearest problem by cosine, ask a
model whether the two are the same. `nearest` writes the nearest problem and its cosine into the row
and `same_problem` asks about those above a threshold; each is resumed a request at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr

from tessera.ask.ask import Reply, Request
from tessera.curate.steps import Result, prompts, rows
from tessera.curate.steps.asking import Asking
from tessera.curate.steps.contamination import EvalSet
from tessera.curate.steps.rows import Drop
from tessera.data.conversation import Chat
from tessera.runs.files import FailureError
from tessera.runs.recipe import Config


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
    text: str = prompts.SAME_PROBLEM

    def requests(self, chat: Chat) -> list[Request]:
        score = chat.extra.get("nearest_score")
        if not isinstance(score, float | int) or score < self.over:
            return []
        fields = {"question": rows.question(chat), "nearest": str(chat.extra.get("nearest"))}
        return [self.prompt(prompts.fill(self.text, **fields))]

    def receive(self, chat: Chat, replies: Sequence[Reply]) -> Result:
        if error := replies[0].error:
            return Drop(f"{self.teacher}: {error[:120]}")
        said = prompts.verdict(replies[0].text)
        return chat if said is False else Drop("contaminated as judged")


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
