"""A toy policy and its training, in as many processes as there are, for test_rollouts.py.

python -m tests.rl.policy_runs JOBS      a JSON list of jobs, each the keywords of `train`
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from tessera import dist
from tessera.pipeline import run_recipe
from tessera.rl import rollouts
from tessera.rl.policy import GKDConfig, GRPOConfig, gkd, grpo
from tessera.runs.recipe import loads
from tessera.runs.run import Run

RECIPE = """
[data]
tokenizer = { bpe = 290, chat = true }
tasks = { calc = 60 }
[defaults]
train = { tokens_per_step = 480, microbatch_tokens = 160, sequence_length = 160 }
[parent]
architecture = { hidden_size = 16, num_hidden_layers = 2, intermediate_size = 16 }
train.steps = 3
[cpt]
train.steps = 9
train.lr = 2e-2
[profile]
switch = "detailed thinking"
tasks = { "calc@2" = 9 }
off = 0.4
samples = 0
"""
INPUTS = {"model": "parent", "prompts": "profile", "teacher": "cpt"}
REWARDS = [{"kind": "function", "function": "tests.rl.letters:variety"}]


def made(home: Path) -> Path:
    """A home with a model and prompts."""
    run_recipe(loads(RECIPE), home, quiet=True)
    return home / "recipe"


def train(
    home: str,
    run: str,
    stop: int | None = None,
    within: bool = False,
    stage: str = "grpo",
    **more: Any,
) -> None:
    """Train in run directory `run`, interrupted before rollout `stop`, or while it is made."""
    table = {
        "prompts_per_rollout": 4,
        "samples": 3,
        "max_tokens": 8,
        **({"rewards": REWARDS, "workers": 1} if stage == "grpo" else {}),
        "samples_every": 2,
        "train": {"steps": 6, "lr": 1e-3, "microbatch_tokens": 256, "save_seconds": 1e-9},
        **more,
    }
    inputs: Any = {name: Path(home) / run for name, run in INPUTS.items()}
    plain = rollouts.Rollouts.batches
    judged = rollouts.Rollouts._answered

    def stopping(self: rollouts.Rollouts, step: int):
        if step == stop and not within:
            raise KeyboardInterrupt
        return plain(self, step)

    def breaking(self: rollouts.Rollouts, key: int, numbers: Any, seconds: Any):
        groups = judged(self, key, numbers, seconds)
        if key == stop and within:
            raise KeyboardInterrupt
        return groups

    rollouts.Rollouts.batches, rollouts.Rollouts._answered = stopping, breaking  # type: ignore
    try:
        config, function = {"grpo": (GRPOConfig, grpo), "gkd": (GKDConfig, gkd)}[stage]
        opened = Run.open(Path(run), stage=stage, config=table, inputs=inputs, seed=0, quiet=True)
        with contextlib.suppress(KeyboardInterrupt), opened:
            function(config(**table), opened, inputs)  # type: ignore[arg-type]
    finally:
        rollouts.Rollouts.batches, rollouts.Rollouts._answered = plain, judged  # type: ignore
    dist.barrier()


def main() -> None:
    with dist.processes():
        for job in json.loads(sys.argv[1]):
            train(**job)


if __name__ == "__main__":
    main()
