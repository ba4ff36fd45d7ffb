"""What to watch in reinforcement learning, and what to think of when it looks wrong.

A policy that is trained on its own writing fails in known ways: answers grow or shrink, all answers
of a group are alike so that nothing pulls, the entropy is gone, tags are written for their own
sake. Each has a number in metrics.jsonl, and past its bound a sentence that says where to look.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tessera import dist
from tessera.rl.experience import Answer, Group
from tessera.rl.prompts import Prompt
from tessera.runs.files import FailureError
from tessera.runs.run import Run, read_metrics
from tessera.train.parallel import Layout

KEPT = 3  # of the best, of the worst and of all, a rollout whose samples are kept


def measured(groups: Sequence[Group], names: Sequence[str], layout: Layout) -> dict[str, float]:
    """Means over the answers of all processes.

    reward, and reward/NAME of each part: of what could be judged. no_signal: share of groups whose
    answers are all worth the same. length: in tokens. truncated, unjudged, obedience: shares.
    """
    answers = [answer for group in groups for answer in group.answers]
    known = [one.reward for one in answers if one.reward is not None]
    pairs: dict[str, tuple[float, float]] = {"reward": (sum(known), len(known))}
    for name in names:
        scores = [one.parts[name] for one in answers]
        judged = [score for score in scores if score is not None]
        pairs[f"reward/{name}"] = (sum(judged), len(judged))
    flat = sum(not group.has_signal for group in groups)
    pairs["no_signal"] = (flat, len(groups))
    for name, value in (
        ("length", sum(len(one.ids) for one in answers)),
        ("truncated", sum(one.truncated for one in answers)),
        ("unjudged", sum(None in one.parts.values() for one in answers)),
        ("obedience", sum(one.obedient for one in answers)),
    ):
        pairs[name] = (value, len(answers))
    sums = torch.tensor(list(pairs.values()), dtype=torch.float64, device=dist.device())
    totals = layout.sum(sums).tolist()
    found = zip(pairs, totals, strict=True)
    return {name: total / count for name, (total, count) in found if count}


def keep_samples(
    groups: Sequence[Group], prompts: Sequence[Prompt], rollout: int, run: Run
) -> None:
    """Writes the best, the worst and some answers of the main process to `samples/`."""
    every = [(group, answer) for group in groups for answer in group.answers]
    ranked = sorted(
        (pair for pair in every if pair[1].reward is not None),
        key=lambda pair: pair[1].reward or 0.0,
    )
    chance = random.Random(f"{run.seed} {rollout}")
    chosen = {
        "best": ranked[::-1][:KEPT],
        "worst": ranked[:KEPT],
        "random": chance.sample(every, min(KEPT, len(every))),
        "unjudged": [pair for pair in every if pair[1].reward is None][:KEPT],
    }
    lines = [
        json.dumps({"rollout": rollout, "kind": kind, **_shown(prompts[group.number], answer)})
        for kind, pairs in chosen.items()
        for group, answer in pairs
    ]
    run.write_file(f"samples/{rollout:08}.jsonl", "".join(line + "\n" for line in lines))


def _shown(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    return {
        "prompt": prompt.messages[-1]["content"],
        "mode": prompt.mode,
        "text": answer.text,
        "reward": answer.reward,
        "parts": answer.parts,
        "unjudged": answer.unjudged,
        "tokens": len(answer.ids),
        "finish_reason": answer.finish_reason,
    }


class Guard:
    """Looks at each step's metrics: says once what looks wrong, and stops what cannot be right.

    gap_limit: of the mean distance between the engine's and the trainer's log-prob of a token.
    """

    def __init__(self, run: Run, gap_limit: float) -> None:
        self.run, self.gap_limit = run, gap_limit
        self._told: set[str] = set()
        before = (row.get("length") for row in read_metrics(run.path))  # where it was stopped
        self._first_length: float | None = next((one for one in before if one is not None), None)

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises FailureError where engine and trainer disagree on what was sampled."""
        gap = metrics.get("gap", 0.0)
        if gap > self.gap_limit:
            raise FailureError(
                f"step {step + 1}: the engine's log-probs are {gap:.3g} from the trainer's a "
                f"token, and gap_limit is {self.gap_limit:g}. They hold different weights, or "
                "compute differently: check the engine's dtype and quantisation, and with "
                "staleness the learning rate; or correct for it with importance_cap and raise "
                "gap_limit"
            )
        for name, text in self._worries(metrics):
            if name not in self._told:
                self._told.add(name)
                self.run.say(f"step {step + 1}: {text}")

    def _worries(self, metrics: Mapping[str, float]) -> list[tuple[str, str]]:
        length = metrics.get("length")
        if length is not None and self._first_length is None:
            self._first_length = length
        first = self._first_length or 1.0
        found = []
        if metrics.get("unjudged", 0.0) > 0.05:
            share = metrics["unjudged"]
            found.append(("unjudged", f"{share:.0%} of the answers could not be judged; samples/"))
        if metrics.get("truncated", 0.0) > 0.3:
            share = metrics["truncated"]
            found.append(
                ("truncated", f"{share:.0%} of the answers are cut at max_tokens; raise it")
            )
        if metrics.get("no_signal", 0.0) > 0.9:
            found.append(
                ("no_signal", "nine of ten groups have no signal: all right or all wrong; profile")
            )
        if length is not None and not 0.5 <= length / first <= 2.0:
            found.append(
                ("length", f"answers have {length:.0f} tokens, {first:.0f} at first; look at them")
            )
        if metrics.get("obedience", 1.0) < 0.9:
            found.append(
                ("obedience", f"the switch is obeyed by {metrics['obedience']:.0%} of the answers")
            )
        if metrics.get("entropy", 1.0) < 0.01:
            found.append(
                ("entropy", "the policy has hardly any entropy left; lower lr, or stop earlier")
            )
        return found
