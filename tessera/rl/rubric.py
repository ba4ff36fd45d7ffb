"""What a completion is worth: the weighted sum of its rewards, or nothing where one cannot tell.

A reward that could not judge leaves the sample out of its group: any number in its place would be
learned from. Checkers run in the killable processes of `pool.py`; judges and reward models are
asked over HTTP (`asked.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from tessera.rl.asked import Asked
from tessera.rl.pool import Pool
from tessera.rl.rewards import AskedReward, CheckedReward, Reward, Sample, names
from tessera.rl.verifiers.outcome import Outcome


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
