"""Means, samples and warnings of reinforcement learning.

A policy that learns from its own text fails in known ways: answers grow or shrink, all answers of a
group have one reward, the entropy is gone. Each has a number in metrics.jsonl and a warning.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence

import torch

from tessera import dist
from tessera.rl.experience import Group
from tessera.rl.prompts import Prompt
from tessera.runs.files import FailureError
from tessera.runs.run import Run, read_metrics
from tessera.train.parallel import Layout

KEPT = 3  # samples of each kind


def measured(groups: Sequence[Group], names: Sequence[str], layout: Layout) -> dict[str, float]:
    """Means over the answers of all processes.

    reward, and reward/NAME of each part: of what could be judged. no_signal: share of groups whose
    answers are all worth the same. length: in tokens. truncated, unjudged, obedience: shares.
    """
    answers = [answer for group in groups for answer in group.answers]
    values: dict[str, list[float | None]] = {"reward": [one.reward for one in answers]}
    values |= {f"reward/{name}": [one.parts[name] for one in answers] for name in names}
    values["no_signal"] = [not group.has_signal for group in groups]
    values["length"] = [len(one.ids) for one in answers]
    values["truncated"] = [one.truncated for one in answers]
    values["unjudged"] = [None in one.parts.values() for one in answers]
    values["obedience"] = [one.obedient for one in answers]
    known = [[one for one in column if one is not None] for column in values.values()]
    own = [(sum(column), len(column)) for column in known]
    sums = torch.tensor(own, dtype=torch.float64, device=dist.device())
    totals = zip(values, layout.sum(sums).tolist(), strict=True)
    return {name: total / count for name, (total, count) in totals if count}


def keep_samples(
    groups: Sequence[Group], prompts: Sequence[Prompt], rollout: int, run: Run
) -> None:
    """Writes the best, the worst and some answers of the main process to `samples/`."""
    every = [(prompts[group.number], answer) for group in groups for answer in group.answers]
    judged = [(answer.reward, pair) for pair in every if (answer := pair[1]).reward is not None]
    ranked = [pair for _, pair in sorted(judged, key=lambda one: one[0])]
    chance = random.Random(f"{run.seed} {rollout}")
    chosen = {
        "best": ranked[::-1][:KEPT],
        "worst": ranked[:KEPT],
        "random": chance.sample(every, min(KEPT, len(every))),
        "unjudged": [pair for pair in every if pair[1].reward is None][:KEPT],
    }
    rows = [
        {
            "rollout": rollout,
            "kind": kind,
            "prompt": prompt.messages[-1]["content"],
            "mode": prompt.mode,
            "text": answer.text,
            "reward": answer.reward,
            "parts": answer.parts,
            "unjudged": answer.unjudged,
            "tokens": len(answer.ids),
            "finish_reason": answer.finish_reason,
        }
        for kind, pairs in chosen.items()
        for prompt, answer in pairs
    ]
    run.write_file(f"samples/{rollout:08}.jsonl", "".join(json.dumps(r) + "\n" for r in rows))


class Guard:
    """Looks at each step's metrics: warns once of what looks wrong, and stops a wrong engine.

    gap_limit: of the mean distance between the engine's and the trainer's log-prob of a token.
    """

    def __init__(self, run: Run, gap_limit: float) -> None:
        self.run, self.gap_limit = run, gap_limit
        self._warned: set[str] = set()
        before = (row.get("length") for row in read_metrics(run.path))  # of a resumed run
        self._first_length: float | None = next((one for one in before if one is not None), None)

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises FailureError where engine and trainer disagree on what was sampled."""
        gap = metrics.get("gap", 0.0)
        if gap > self.gap_limit:
            raise FailureError(
                f"step {step + 1}: the engine's log-probs are {gap:.3g} from the trainer's a "
                f"token, over gap_limit = {self.gap_limit:g}. Check the engine's dtype and "
                "quantisation, and with staleness the learning rate; or correct for it with "
                "importance_cap and raise gap_limit"
            )
        if self._first_length is None:
            self._first_length = metrics.get("length")
        for name, text in self._warnings(metrics):
            if name not in self._warned:
                self._warned.add(name)
                self.run.say(f"step {step + 1}: {text}")

    def _warnings(self, metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        first = self._first_length or 1.0
        length = metrics.get("length", first)
        if (share := metrics.get("unjudged", 0.0)) > 0.05:
            yield "unjudged", f"{share:.0%} of the answers could not be judged; see samples/"
        if (share := metrics.get("truncated", 0.0)) > 0.3:
            yield "truncated", f"{share:.0%} of the answers are cut at max_tokens; raise it"
        if metrics.get("no_signal", 0.0) > 0.9:
            yield "no_signal", "over 90% of the groups are all right or all wrong; profile them"
        if not 0.5 <= length / first <= 2.0:
            yield "length", f"answers have {length:.0f} tokens, {first:.0f} at first; see samples/"
        if (share := metrics.get("obedience", 1.0)) < 0.9:
            yield "obedience", f"{share:.0%} of the answers obey the switch"
        if metrics.get("entropy", 1.0) < 0.01:
            yield "entropy", "the policy has hardly any entropy; lower lr, or stop earlier"
