"""Steps that decide over all rows: majorities, pass rates, pairs, blends, order.

Where no answer is known, the answer that most samples give is the reference (arXiv 2505.00949 §3.1
and §3.3); the share of right samples is the difficulty that reinforcement learning goes by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from tessera.curate.steps import rows
from tessera.curate.steps.rows import Drop, Result, SetStep
from tessera.data.conversation import Chat
from tessera.rl.verifiers.answer import normalized


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


class Pair(SetStep):
    """Keeps questions that have answers with reasoning on and with reasoning off.

    on, off: at most so many answers of each question. both = false keeps the other questions, too.
    """

    step: Literal["pair"]
    both: bool = True
    on: int = Field(default=1, ge=1)
    off: int = Field(default=1, ge=1)

    def digest(self, chats: Sequence[Chat]) -> NDArray[Any]:
        """(rows, 2): the hash of the question, and 1 for on."""
        return rows.keyed(chats, (chat.mode == "on" for chat in chats))

    def decide(self, digests: NDArray[Any], seed: int) -> NDArray[Any]:
        """(rows,): 0 kept, 1 one too many, 2 without its other side."""
        _, question = np.unique(digests[:, 0], return_inverse=True)
        on = digests[:, 1] == 1
        rank = _rank_within(question * 2 + on)
        verdicts = np.where(rank < np.where(on, self.on, self.off), 0, 1).astype(np.int8)
        if self.both:
            sides = [np.bincount(question, weights=side) > 0 for side in (on, ~on)]
            verdicts[~(sides[0] & sides[1])[question]] = 2
        return verdicts

    def judge(self, chat: Chat, verdict: Any) -> Result:
        if not verdict:
            return chat
        return Drop("one answer too many" if verdict == 1 else "a question of one mode only")


class Blend(SetStep):
    """Draws rows so that each value of `key` has its share of `weights`; only ratios count.

    rows: how many are drawn in all; without it as many as need no row twice. A value with fewer
    rows than its share is repeated, its rows equally often up to one. Other values are left out.
    """

    step: Literal["blend"]
    key: str = "source"
    weights: dict[str, float] = Field(min_length=1)
    rows: int | None = Field(default=None, ge=1)

    @field_validator("weights")
    @classmethod
    def _positive(cls, value: dict[str, float]) -> dict[str, float]:
        if not all(0 < one < float("inf") for one in value.values()):
            raise ValueError("every weight is a positive number; leave out what is not wanted")
        return value

    def digest(self, chats: Sequence[Chat]) -> NDArray[Any]:
        """(rows,): which weight a row falls under, -1 for none."""
        places = {name: index for index, name in enumerate(self.weights)}
        said = [c.mode if self.key == "reasoning" else str(c.extra.get(self.key)) for c in chats]
        return np.array([places.get(one, -1) for one in said], np.int32)

    def decide(self, digests: NDArray[Any], seed: int) -> NDArray[Any]:
        """(rows,): how often a row is taken; -1 for a value without a weight."""
        weights = np.array(list(self.weights.values()))
        counts = np.bincount(digests[digests >= 0], minlength=len(weights))
        shares = weights / weights.sum()
        if self.rows is None:
            wanted = np.floor((counts / shares).min() * shares + 1e-9)
        else:
            wanted = np.where(counts > 0, np.round(self.rows * shares), 0)
        copies = np.where(digests < 0, -1, 0)
        for index in np.flatnonzero(counts):
            members = np.flatnonzero(digests == index)
            whole, rest = divmod(int(wanted[index]), len(members))
            copies[members] = whole
            chosen = np.random.default_rng([seed, int(index)]).permutation(len(members))[:rest]
            copies[members[chosen]] += 1
        return copies

    def judge(self, chat: Chat, verdict: Any) -> Result:
        if verdict > 0:
            return [chat] * int(verdict)
        return Drop(f"no weight for its {self.key}" if verdict < 0 else "not drawn")


class Order(SetStep):
    """Puts the rows in another order.

    by: "shuffle", "length" of the completion, "pass_rate" from easy to hard (rows without one
    first). interleave: on and off take turns, each side in that order; the longer side's rest ends.
    """

    reorders: ClassVar[bool] = True
    step: Literal["order"]
    by: Literal["shuffle", "length", "pass_rate"] = "shuffle"
    interleave: bool = False

    def digest(self, chats: Sequence[Chat]) -> NDArray[Any]:
        """(rows, 2): what is sorted by, and 1 for on."""
        found = [(self._key(chat), chat.mode == "on") for chat in chats]
        return np.array(found, np.float64).reshape(len(chats), 2)

    def decide(self, digests: NDArray[Any], seed: int) -> NDArray[Any]:
        """(rows,): the numbers of the rows in their new order."""
        keys = digests[:, 0]
        if self.by == "shuffle":
            keys = np.random.default_rng(seed).random(len(digests))
        order = np.argsort(keys, kind="stable")
        if not self.interleave:
            return order
        on = digests[order, 1] == 1
        turn = _rank_within(on.astype(np.int64))
        return order[np.lexsort((~on, turn))]

    def _key(self, chat: Chat) -> float:
        if self.by == "length":
            return len(rows.thought(chat) or "") + len(rows.answer(chat))
        rate = chat.extra.get("pass_rate")
        return -rate if isinstance(rate, float | int) and rate == rate else -2.0


def _rank_within(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """(rows,): how many rows of its own group stand before each."""
    order = np.argsort(groups, kind="stable")
    sorted_groups = groups[order]
    new = np.diff(sorted_groups, prepend=-1) != 0
    firsts = np.maximum.accumulate(np.where(new, np.arange(len(groups)), 0))
    ranks = np.empty(len(groups), np.int64)
    ranks[order] = np.arange(len(groups)) - firsts
    return ranks
