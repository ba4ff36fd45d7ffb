"""Stages `grpo`, `rloo` (Llama-Nemotron §5) and `gkd`: learning from the policy's own answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from tessera.model.checkpoint import save_model
from tessera.model.source import resolve
from tessera.model.transformer import Transformer
from tessera.objectives.gkd import GKD, GKDLossConfig
from tessera.objectives.grpo import PolicyGradient, PolicyLossConfig
from tessera.objectives.kd import load_teacher
from tessera.rl import advantages
from tessera.rl.advantages import Advantages
from tessera.rl.rewards import Reward
from tessera.rl.rollouts import RolloutConfig, Rollouts
from tessera.runs.files import FailureError
from tessera.runs.run import Run, read_metrics
from tessera.train.engine import Objective, Trainer

MOST_UNJUDGED = 0.5  # share of a step's answers


class Guard:
    """Looks at each step's metrics: warns once of what looks wrong, and stops what is wrong.

    gap_limit: of the mean distance between the engine's and the trainer's log-prob of a token.
    """

    def __init__(self, run: Run, gap_limit: float) -> None:
        self.run, self.gap_limit = run, gap_limit
        self._warned: set[str] = set()
        before = (row.get("length") for row in read_metrics(run.path))  # of a resumed run
        self._first_length: float | None = next((one for one in before if one is not None), None)

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises FailureError where engine and trainer disagree on what was sampled, or where most
        answers cannot be judged."""
        gap = metrics.get("gap", 0.0)
        if gap > self.gap_limit:
            raise FailureError(
                f"step {step + 1}: the engine's log-probs are {gap:.3g} from the trainer's a "
                f"token, over gap_limit = {self.gap_limit:g}. Check the engine's dtype and "
                "quantisation, and with staleness the learning rate; or correct for it with "
                "importance_cap and raise gap_limit"
            )
        if (share := metrics.get("unjudged", 0.0)) > MOST_UNJUDGED:
            raise FailureError(
                f"step {step + 1}: {share:.0%} of the answers could not be judged; the reasons are "
                f"in {self.run.path / 'samples'}. What is learnt from the rest is not what the "
                "rewards ask for"
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


class PolicyConfig(RolloutConfig, PolicyLossConfig):
    """gap_limit: see `Guard`."""

    rewards: tuple[Reward, ...] = Field(min_length=1)
    gap_limit: float = Field(default=0.05, gt=0)

    @property
    def cap(self) -> float:
        if self.importance_cap is None:
            return 2.0 if self.staleness or self.engine != "tessera" else 0.0
        return self.importance_cap

    @property
    def keep_all(self) -> bool:
        return self.kl > 0


class GRPOConfig(PolicyConfig):
    """std: advantages are in standard deviations of their group."""

    std: bool = True


class RLOOConfig(PolicyConfig):
    """The report's for instructions: 128 prompts a step, fewer than 120 steps (§5.2)."""

    prompts_per_rollout: int = Field(default=128, ge=1)
    kl: float = Field(default=0.01, ge=0)


class GKDConfig(RolloutConfig, GKDLossConfig):
    """No answer is judged, so what is about rewards is left out."""

    samples: int = Field(default=1, ge=1)
    rewards: ClassVar[tuple[Reward, ...]] = ()
    workers: ClassVar[int] = 0
    overlong: ClassVar[str] = "keep"
    overlong_buffer: ClassVar[int] = 0
    dynamic_sampling: ClassVar[int] = 0


def _fit(
    module: Transformer,
    objective: Objective,
    config: RolloutConfig,
    rule: Advantages | None,
    run: Run,
    inputs: Mapping[str, Path],
    gap_limit: float,
) -> None:
    """Trains `module` on its own answers to the prompts, and saves it."""
    with Rollouts.open(module, config, rule, run, inputs) as source:
        if config.curriculum.order == "curriculum":
            eighth = max(1, len(source.order.batches) // 8)
            run.write_table("curriculum", source.order.table(eighth))
        guard = Guard(run, gap_limit)
        Trainer(module, objective, source, config.train, run, check=guard).fit()
    save_model(module, run.model_path, tokenizer_from=resolve(inputs["model"]))


def train(config: PolicyConfig, rule: Advantages, run: Run, inputs: Mapping[str, Path]) -> None:
    """Trains `model` on `prompts` with the advantages of `rule`."""
    model, placement = inputs["model"], config.train.placement
    module = placement.load(model)
    objective = PolicyGradient(config, placement.load(model, frozen=True) if config.kl else None)
    _fit(module, objective, config, rule, run, inputs, config.gap_limit)


def grpo(config: GRPOConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `grpo`."""
    train(config, partial(advantages.grpo, std=config.std), run, inputs)


def rloo(config: RLOOConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `rloo`."""
    train(config, advantages.rloo, run, inputs)


def gkd(config: GKDConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `gkd`: `teacher` corrects every token of what `model` answers to `prompts`."""
    module = config.train.placement.load(inputs["model"])
    teacher = load_teacher(inputs["teacher"], config.train, module)
    _fit(module, GKD(teacher, config), config, None, run, inputs, math.inf)
    run.inherit(inputs["model"], "architecture")
