"""Stages `grpo` and `rloo`: learning from the policy's own answers (Llama-Nemotron §5)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from pydantic import Field

from tessera.model.checkpoint import save_model
from tessera.model.source import resolve
from tessera.objectives.grpo import PolicyGradient, PolicyLossConfig
from tessera.rl import advantages
from tessera.rl.advantages import Advantages
from tessera.rl.monitors import Guard
from tessera.rl.rewards import Reward
from tessera.rl.rollouts import RolloutConfig, Rollouts
from tessera.runs.run import Run
from tessera.train.engine import Trainer


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


def train(config: PolicyConfig, rule: Advantages, run: Run, inputs: Mapping[str, Path]) -> None:
    """Trains `model` on `prompts` with the advantages of `rule`."""
    model, spread = inputs["model"], config.train.spread
    module = spread.load(model)
    objective = PolicyGradient(config, spread.load(model, frozen=True) if config.kl else None)
    with Rollouts.open(module, config, rule, run, inputs) as source:
        if config.curriculum.order == "curriculum":
            eighth = max(1, len(source.order.batches) // 8)
            run.write_table("curriculum", source.order.table(eighth))
        guard = Guard(run, config.gap_limit)
        Trainer(module, objective, source, config.train, run, check=guard).fit()
    save_model(module, run.model_path, tokenizer_from=resolve(model))


def grpo(config: GRPOConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `grpo`."""
    train(config, partial(advantages.grpo, std=config.std), run, inputs)


def rloo(config: RLOOConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `rloo`."""
    train(config, advantages.rloo, run, inputs)
