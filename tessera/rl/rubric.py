"""Rewards that a server gives: an LLM as judge, and a reward model. Both over the OpenAI API.

A reply that did not come, or says no verdict, is could-not-judge. Requests are tried again as
`ask/endpoint.py` does; a server that fails too often stops the run, which can go on later.

What a completion is worth: the weighted sum of its rewards, or nothing where one cannot tell.

A reward that could not judge leaves the sample out of its group: any number in its place would be
learned from. Checkers run in the killable processes of `pool.py`; judges and reward models are
asked over HTTP (`asked.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from tessera.ask.ask import Reply, Request
from tessera.ask.endpoint import Endpoint
from tessera.data.conversation import Message
from tessera.rl.pool import Pool
from tessera.rl.rewards import AskedReward, CheckedReward, JudgeReward, Reward, Sample, names
from tessera.rl.verifiers.outcome import Outcome, judged, unjudged, wrong

TEMPLATE = (
    "Say whether a prediction gives the same answer as the reference. Only the final answer "
    "counts, not its form or the way to it.\n\nQuestion:\n{question}\n\nReference answer:\n{answer}"
    "\n\nPrediction:\n{prediction}\n\nEnd with one line: Verdict: right, or Verdict: wrong."
)
_FIELD = re.compile(r"\{(question|answer|prediction)\}")
_VERDICT = re.compile(r"verdict\W{0,4}(right|wrong)\b", re.IGNORECASE)
_REWARD = re.compile(r"reward[\s:=*]{0,3}(-?\d+(?:\.\d+)?)", re.IGNORECASE)


class Asked:
    """One reward of this kind: samples in, outcomes out."""

    def __init__(self, reward: AskedReward) -> None:
        self.reward = reward
        self.endpoint = Endpoint(reward.endpoint, seed=0, deadline=reward.deadline)

    def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        """The outcome of each sample, all asked at once."""
        found: dict[int, Outcome] = {}
        requests = []
        for number, sample in enumerate(samples):
            if not sample.answer:
                found[number] = wrong("no answer")
            else:
                requests.append(Request(str(number), self._asks(sample), self._sampling()))
        self._ask(requests, found)
        return [found[number] for number in range(len(samples))]

    def _ask(self, requests: Iterable[Request], found: dict[int, Outcome]) -> None:
        def receive(request: Request, reply: Reply) -> None:
            number = int(request.teacher)
            found[number] = unjudged(reply.error) if reply.error else self._read(reply)

        self.endpoint.ask(requests, receive)

    def _asks(self, sample: Sample) -> list[Message]:
        if not isinstance(self.reward, JudgeReward):
            asked = [dict(message) for message in sample.messages]
            return [*asked, {"role": "assistant", "content": sample.answer}]
        question = next(m["content"] for m in reversed(sample.messages) if m["role"] == "user")
        said = {
            "question": question,
            "answer": str(sample.fields[self.reward.answer]),
            "prediction": sample.answer,
        }
        # One pass and no `format`: braces of LaTeX are no fields, nor is "{answer}" in a question.
        text = _FIELD.sub(lambda found: said[found[1]], self.reward.template or TEMPLATE)
        return [{"role": "user", "content": text}]

    def _sampling(self) -> dict:
        if isinstance(self.reward, JudgeReward):
            return {"temperature": 0.0, "max_tokens": self.reward.max_tokens}
        return {"temperature": 0.0, "max_tokens": 64}

    def _read(self, reply: Reply) -> Outcome:
        if isinstance(self.reward, JudgeReward):
            verdicts = _VERDICT.findall(reply.answer)
            if not verdicts:
                return unjudged(f"no verdict in the judge's reply: {reply.answer[-80:]!r}")
            return judged(verdicts[-1].lower() == "right", "the judge says so")
        scores = _REWARD.findall(reply.answer)
        if not scores:
            return unjudged(f"no reward in the model's reply: {reply.answer[-80:]!r}")
        score = float(scores[-1])
        good = score >= self.reward.right_from
        return Outcome("right" if good else "wrong", score, "")


@dataclass(frozen=True, slots=True)
class Judged:
    """A sample's reward (None: could not be judged), and the outcome of each part by name."""

    reward: float | None
    parts: dict[str, Outcome]


class Rubric:
    """Some rewards and the processes that compute them; a context manager.

    with Rubric(rewards, workers=8) as rubric:
        judged = rubric(samples)
    """

    def __init__(self, rewards: Sequence[Reward], workers: int) -> None:
        self.rewards, self.names = list(rewards), names(rewards)
        checked = [one for one in self.rewards if isinstance(one, CheckedReward)]
        self._pool = Pool(checked, workers)
        self._asked = [Asked(one) for one in self.rewards if isinstance(one, AskedReward)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.close()

    def __call__(self, samples: Sequence[Sample]) -> list[Judged]:
        """What each sample is worth. Raises RewardError where nothing can be judged at all."""
        checked = self._checked(samples)
        asked = iter([one(samples) for one in self._asked])
        columns = [
            next(checked) if isinstance(one, CheckedReward) else next(asked) for one in self.rewards
        ]
        return [self._sum([column[i] for column in columns]) for i in range(len(samples))]

    def _checked(self, samples: Sequence[Sample]) -> Any:
        count = len(self._pool.rewards)
        tasks = [(part, sample) for part in range(count) for sample in samples]
        found = self._pool.check(tasks) if tasks else []
        return iter([found[i * len(samples) : (i + 1) * len(samples)] for i in range(count)])

    def _sum(self, outcomes: Sequence[Outcome]) -> Judged:
        parts = dict(zip(self.names, outcomes, strict=True))
        total = 0.0
        for reward, outcome in zip(self.rewards, outcomes, strict=True):
            if outcome.score is None:
                return Judged(None, parts)
            total += reward.weight * outcome.score
        return Judged(total, parts)
