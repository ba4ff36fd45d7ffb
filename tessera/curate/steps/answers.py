"""Final answers: extracted, compared with the expected one, voted on.

Where no answer is known, the answer that most samples give is the reference (arXiv 2505.00949 §3.1
and §3.3); the share of right samples is the difficulty that reinforcement learning goes by.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from tessera.curate.steps import rows
from tessera.curate.steps.rows import Drop, Result, RowStep, SetStep
from tessera.data.conversation import Chat
from tessera.rl.verifiers.answer import boxed, final_answer, normalized, same_answer
from tessera.rl.verifiers.exact import verify_exact, verify_number
from tessera.rl.verifiers.mathematics import verify_math
from tessera.rl.verifiers.outcome import Outcome
from tessera.runs.files import RunError

LONGEST = 400  # characters of a final answer; what is longer is a text


class Extract(RowStep):
    """Writes the final answer of the last answer's text into `predicted_answer`.

    source = "boxed" takes `\\boxed{…}` alone, as the paper's math data do; "any" takes any form
    (rl/verifiers/answer.py). to: the key written. required: rows without are left out.
    """

    step: Literal["extract_answer"]
    source: Literal["boxed", "any"] = "any"
    to: str = "predicted_answer"
    required: bool = True

    def apply(self, chat: Chat) -> Result:
        text = rows.answer(chat)
        found = boxed(text) if self.source == "boxed" else final_answer(text)
        if not found or len(found) > LONGEST:
            return Drop("no final answer") if self.required else chat
        return rows.tagged(chat, self.step, **{self.to: found})


class Verify(RowStep):
    """Compares `predicted_answer` with `expected_answer`, where there is one; writes `correct`.

    verifier: "equal" (the same number, or the same text up to spelling), "exact", "number" and
    "math" as the rewards have them, or `package.module:function`, a function of the two texts that
    gives True, False, None or an Outcome. keep: "all" keeps what is wrong or not judged.
    """

    step: Literal["verify"]
    verifier: str = "equal"
    keep: Literal["correct", "all"] = "correct"

    def apply(self, chat: Chat) -> Result:
        expected, predicted = (chat.extra.get(f"{n}_answer") for n in ("expected", "predicted"))
        if expected is None:
            return chat
        right = None if predicted is None else self._right(str(predicted), str(expected))
        if self.keep == "correct" and right is not True:
            return Drop("a wrong answer" if right is False else "an answer that cannot be judged")
        return rows.tagged(chat, self.step, correct=right)

    def _right(self, predicted: str, expected: str) -> bool | None:
        if not predicted.strip() or not expected.strip():
            return None
        outcome = self._function(predicted, expected)
        if isinstance(outcome, Outcome):
            return {"right": True, "wrong": False}.get(outcome.verdict)
        return outcome

    @functools.cached_property
    def _function(self) -> Callable[[str, str], Any]:
        if self.verifier in VERIFIERS:
            return VERIFIERS[self.verifier]
        module, _, function = self.verifier.partition(":")
        try:
            return getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise RunError(
                f"verifier = {self.verifier!r}: {error}; give package.module:function, or one of "
                + ", ".join(VERIFIERS)
            ) from None


VERIFIERS: dict[str, Callable[[str, str], Any]] = {
    "equal": same_answer,
    "exact": functools.partial(verify_exact, ignore_case=False),
    "number": verify_number,
    "math": verify_math,
}


class Majority(SetStep):
    """Makes the majority's `predicted_answer` the `expected_answer` where a row has none.

    Rows of the problem that answer otherwise are left out, and whole problems whose majority has
    under `min_votes` votes or under `min_share` of them. Of equal counts the first seen wins.
    """

    step: Literal["majority"]
    min_votes: int = Field(default=2, ge=1)
    min_share: float = Field(default=0.0, ge=0, le=1)

    def digest(self, chats: Sequence[Chat]) -> NDArray[Any]:
        """(rows, 2): hashes of problem and answer, for which 0 is none and 1 known before."""
        marks = [0] * len(chats)
        for index, chat in enumerate(chats):
            if chat.extra.get("expected_answer") is not None:
                marks[index] = 1
            elif (predicted := chat.extra.get("predicted_answer")) is not None:
                marks[index] = max(2, rows.text_hash(normalized(str(predicted))))
        return rows.keyed(chats, marks)

    def decide(self, digests: NDArray[Any], seed: int) -> NDArray[Any]:
        """(rows,): 0 another answer, 1 the majority's, 2 known before, 3 too small a majority."""
        verdicts = np.where(digests[:, 1] == 1, 2, 0).astype(np.int8)
        voting = np.flatnonzero(digests[:, 1] >= 2)
        if not len(voting):
            return verdicts
        pairs, firsts, of, votes = np.unique(
            digests[voting], axis=0, return_index=True, return_inverse=True, return_counts=True
        )
        problems, problem = np.unique(pairs[:, 0], return_inverse=True)
        cast = np.bincount(problem, weights=votes, minlength=len(problems))
        order = np.lexsort((firsts, -votes, problem))
        best = order[np.flatnonzero(np.diff(problem[order], prepend=-1))]
        enough = (votes[best] >= self.min_votes) & (votes[best] >= self.min_share * cast)
        of = of.reshape(-1)
        won = best[problem[of]] == of
        verdicts[voting] = np.where(enough[problem[of]], won, 3)
        return verdicts

    def judge(self, chat: Chat, verdict: Any) -> Result:
        if verdict == 2:
            return chat
        if verdict != 1:
            return Drop("too small a majority" if verdict == 3 else "not the majority's answer")
        answer = chat.extra["predicted_answer"]
        return rows.tagged(chat, self.step, expected_answer=answer, correct=True)


class PassRate(SetStep):
    """Writes the share of right samples of each problem into `pass_rate`, and bounds it.

    Samples that could not be judged do not count; problems of those alone are kept unless a bound
    is given. Super and Ultra leave out what is solved too often (arXiv 2505.00949 §5).
    """

    step: Literal["pass_rate"]
    min: float = Field(default=0.0, ge=0, le=1)
    max: float = Field(default=1.0, ge=0, le=1)

    def digest(self, chats: Sequence[Chat]) -> NDArray[Any]:
        """(rows, 2): the hash of the problem, and 0 wrong, 1 right, 2 not judged."""
        said = (chat.extra.get("correct") for chat in chats)
        return rows.keyed(chats, (int(one) if isinstance(one, bool) else 2 for one in said))

    def decide(self, digests: NDArray[Any], seed: int) -> NDArray[Any]:
        """(rows,) shares; -1 where none was judged."""
        _, problem = np.unique(digests[:, 0], return_inverse=True)
        judged = np.bincount(problem, digests[:, 1] < 2)
        right = np.bincount(problem, digests[:, 1] == 1)
        share = np.where(judged > 0, right / np.maximum(judged, 1), -1.0)
        return share[problem]

    def judge(self, chat: Chat, verdict: Any) -> Result:
        bounded = self.min > 0 or self.max < 1
        if verdict < 0:
            return Drop("no sample was judged") if bounded else chat
        if not self.min <= verdict <= self.max:
            return Drop(f"pass rate {'under' if verdict < self.min else 'over'} the bound")
        return rows.tagged(chat, self.step, pass_rate=round(float(verdict), 4))
