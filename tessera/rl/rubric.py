"""What a completion is worth: the weighted sum of its rewards, or nothing where one cannot tell.

A reward that could not judge leaves the sample out of its group: any number in its place would be
learned from. Checkers run in the processes of `pool.py`; judges and reward models are asked over
HTTP, and a server that fails too often stops the run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

from tessera.ask import judge
from tessera.ask.ask import Reply, Request
from tessera.ask.endpoint import Endpoint
from tessera.rl.pool import Pool
from tessera.rl.rewards import AskedReward, CheckedReward, JudgeReward, Reward, Sample, names
from tessera.rl.verifiers.outcome import Outcome, judged, unjudged, wrong

_REWARD = re.compile(r"reward[\s:=*]{0,3}(-?\d+(?:\.\d+)?)", re.IGNORECASE)


class Asked:
    """A reward that a server gives: samples in, outcomes out."""

    def __init__(self, reward: AskedReward) -> None:
        self.reward = reward
        self.endpoint = Endpoint(reward.endpoint, seed=0, deadline=reward.deadline)

    def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        """The outcome of each sample, all asked at once."""
        answered = [sample for sample in samples if sample.answer]
        found = judge.replies(self.endpoint, [self._request(sample) for sample in answered])
        outcomes = map(self._outcome, found)
        return [next(outcomes) if sample.answer else wrong("no answer") for sample in samples]

    def _request(self, sample: Sample) -> Request:
        if not isinstance(self.reward, JudgeReward):
            asked = [dict(message) for message in sample.messages]
            return judge.request("", [*asked, {"role": "assistant", "content": sample.answer}], 64)
        question = next(m["content"] for m in reversed(sample.messages) if m["role"] == "user")
        expected = str(sample.fields[self.reward.answer])
        text = judge.same_answer(question, expected, sample.answer, self.reward.template)
        return judge.request("", text, self.reward.max_tokens)

    def _outcome(self, reply: Reply) -> Outcome:
        if reply.error:
            return unjudged(reply.error)
        if isinstance(self.reward, JudgeReward):
            verdict = judge.verdict(reply.answer)
            if verdict is None:
                return unjudged(f"no verdict in the judge's reply: {reply.answer[-80:]!r}")
            return judged(verdict, "the judge says so")
        scores = _REWARD.findall(reply.answer)
        if not scores:
            return unjudged(f"no reward in the model's reply: {reply.answer[-80:]!r}")
        score = float(scores[-1])
        return Outcome("right" if score >= self.reward.right_from else "wrong", score)


@dataclass(frozen=True, slots=True)
class Judged:
    """A sample's reward (None: could not be judged), and the outcome of each part by name."""

    reward: float | None
    parts: dict[str, Outcome]


class Rubric:
    """Some rewards and the processes that compute them; a context manager."""

    def __init__(self, rewards: Sequence[Reward], workers: int) -> None:
        self.rewards, self.names = list(rewards), names(rewards)
        self._pool = Pool([one for one in self.rewards if isinstance(one, CheckedReward)], workers)
        self._asked = [Asked(one) if isinstance(one, AskedReward) else None for one in self.rewards]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.close()

    def __call__(self, samples: Sequence[Sample]) -> list[Judged]:
        """What each sample is worth. Raises RewardError where nothing can be judged at all."""
        parts = range(len(self._pool.rewards))
        checked = iter(self._pool.check([(part, sample) for part in parts for sample in samples]))
        columns = [
            list(islice(checked, len(samples))) if one is None else one(samples)
            for one in self._asked
        ]
        return [self._sum([column[i] for column in columns]) for i in range(len(samples))]

    def _sum(self, outcomes: Sequence[Outcome]) -> Judged:
        total = 0.0
        parts = dict(zip(self.names, outcomes, strict=True))
        for reward, outcome in zip(self.rewards, outcomes, strict=True):
            if outcome.score is None:
                return Judged(None, parts)
            total += reward.weight * outcome.score
        return Judged(total, parts)
