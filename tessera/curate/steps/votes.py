"""What the samples of one problem tell together: the majority's answer, and the pass rate.

Where no answer is known, the answer that most samples give is the reference (arXiv 2505.00949 §3.1
and §3.3). The share of samples that are right is the difficulty that reinforcement learning goes
by. Both need every sample of a problem, wherever its rows stand: two hashes a row decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from tessera.curate.steps import Result, rows
from tessera.curate.steps.answers import normalised
from tessera.curate.steps.rows import Drop
from tessera.data.conversation import Chat
from tessera.runs.recipe import Config


class Majority(Config):
    """Makes the majority's `predicted_answer` the `expected_answer` where a row has none.

    Rows of the problem that answer otherwise are left out, and whole problems whose majority has
    under `min_votes` votes or under `min_share` of them. Of equal counts the first seen wins.
    Rows whose expected answer is known pass untouched.
    """

    step: Literal["majority"]
    min_votes: int = Field(default=2, ge=1)
    min_share: float = Field(default=0.0, ge=0, le=1)

    def digest(self, chats: Sequence[Chat]) -> NDArray[Any]:
        """(rows, 2): hashes of problem and answer, for which 0 is none and 1 known before."""
        found = np.zeros((len(chats), 2), np.uint64)
        for index, chat in enumerate(chats):
            found[index, 0] = text_hash(rows.question(chat))
            if chat.extra.get("expected_answer") is not None:
                found[index, 1] = 1
            elif (predicted := chat.extra.get("predicted_answer")) is not None:
                found[index, 1] = max(2, text_hash(normalised(str(predicted))))
        return found

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


class PassRate(Config):
    """Writes the share of right samples of each problem into `pass_rate`, and bounds it.

    Samples that could not be judged count for nothing; problems of those alone are kept unless a
    bound is given. Super and Ultra leave out what is solved too often (arXiv 2505.00949 §5).
    """

    step: Literal["pass_rate"]
    min: float = Field(default=0.0, ge=0, le=1)
    max: float = Field(default=1.0, ge=0, le=1)

    def digest(self, chats: Sequence[Chat]) -> NDArray[Any]:
        """(rows, 2): the hash of the problem, and 0 wrong, 1 right, 2 not judged."""
        said = [chat.extra.get("correct") for chat in chats]
        marks = [int(one) if isinstance(one, bool) else 2 for one in said]
        hashes = [text_hash(rows.question(chat)) for chat in chats]
        return np.array([hashes, marks], np.uint64).T.reshape(len(chats), 2)

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


def text_hash(text: str) -> int:
    """64 bits of a text, the white space around it apart."""
    return int.from_bytes(blake2b(text.strip().encode("utf-8", "replace"), digest_size=8).digest())
