"""Stages `grpo` and `rloo`: learning from the policy's own answers (Llama-Nemotron §5)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from pydantic import Field

from tessera.data.chat import ChatEncoder
from tessera.data.tokenizer import load_tokenizer
from tessera.model.checkpoint import save_model
from tessera.model.source import resolve
from tessera.objectives.grpo import PolicyGradient, PolicyLossConfig
from tessera.plot import Series, line_chart
from tessera.rl import advantages, prompts
from tessera.rl.monitors import Guard
from tessera.rl.rewards import Reward, require_fields
from tessera.rl.rollouts import RolloutConfig, Rollouts, whole
from tessera.rl.rubric import Rubric
from tessera.runs.run import Run
from tessera.train.engine import Trainer
from tessera.train.optim import TrainConfig
from tessera.vllm.choice import open_engine


class PolicyConfig(RolloutConfig, PolicyLossConfig):
    """train: `steps` are optimizer steps, `microbatch_tokens` is the length of a packed row, and
    `tokens_per_step` is not used. gap_limit: see `Guard`."""

    train: TrainConfig
    rewards: tuple[Reward, ...] = Field(min_length=1)
    gap_limit: float = Field(default=0.05, gt=0)

    @property
    def cap(self) -> float:
        if self.importance_cap is None:
            return 2.0 if self.staleness or self.engine != "tessera" else 0.0
        return self.importance_cap


class GRPOConfig(PolicyConfig):
    """std: advantages are in standard deviations of their group."""

    std: bool = True


class RLOOConfig(PolicyConfig):
    """The report's for instructions: 128 prompts a step, fewer than 120 steps (§5.2)."""

    prompts_per_rollout: int = Field(default=128, ge=1)
    kl: float = Field(default=0.01, ge=0)


def train(
    config: PolicyConfig, rule: advantages.Advantages, run: Run, inputs: Mapping[str, Path]
) -> None:
    """Trains `model` on `prompts` with the advantages of `rule`."""
    model, spread = inputs["model"], config.train.spread
    questions = prompts.read(inputs["prompts"])
    for prompt in questions:
        require_fields(config.rewards, prompt.fields)
    module = spread.load(model)
    reference = spread.load(model, frozen=True) if config.kl else None
    encoder = ChatEncoder.of(load_tokenizer(resolve(model)), switch=config.switch)
    engine = open_engine(config, whole(module), config.engine_batch)
    with closing(engine), Rubric(config.rewards, config.workers) as rubric:
        source = Rollouts(
            module,
            engine,
            encoder,
            questions,
            config,
            rule=rule,
            steps=config.train.steps,
            row_length=config.train.microbatch_tokens,
            layout=spread.layout,
            run=run,
            rubric=rubric,
            keep_all=config.kl > 0,
        )
        _write_curriculum(source, run, config)
        objective, guard = PolicyGradient(config, reference), Guard(run, config.gap_limit)
        Trainer(module, objective, source, config.train, run, check=guard).fit()
    save_model(module, run.model_path, tokenizer_from=resolve(model))


def _write_curriculum(source: Rollouts, run: Run, config: PolicyConfig) -> None:
    """Which pass rates each part of the training has, planned and actual: a table and a chart."""
    if config.curriculum.order == "random":
        return
    every = max(1, len(source.order.batches) // 8)
    rows = source.order.table(every)
    run.write_table("curriculum", rows)
    lines = [
        Series(
            f"{kind} from step {step}",
            [(r["pass_rate"], r[kind], f"{r[kind]:.2f}") for r in rows if r["step"] == step],
        )
        for step in sorted({row["step"] for row in rows})[:: max(1, 8 // 3)]
        for kind in ("planned", "actual")
    ]
    chart = line_chart(
        lines,
        title="Pass rates of the prompts",
        x="pass rate before training",
        y="share of the prompts",
    )
    run.write_file("curriculum.svg", chart)


def grpo(config: GRPOConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `grpo`."""
    train(config, functools.partial(advantages.grpo, std=config.std), run, inputs)


def rloo(config: RLOOConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `rloo`."""
    train(config, advantages.rloo, run, inputs)
