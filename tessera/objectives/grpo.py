"""Group-relative policy optimisation on the policy's own answers (Llama-Nemotron §5.1, §5.2).

    ρ_t = π(y_t) / π_old(y_t)
    ℓ_t = -min(ρ_t A, clip(ρ_t, 1-ε_low, 1+ε_high) A) + β (π_ref/π - log(π_ref/π) - 1)

(DeepSeekMath, arXiv 2402.03300). log(π_ref/π) counts within ±20, as in NeMo-RL; a token beyond has
no slope of the second term. A dual clip bounds the first by c·A from below where A < 0
(arXiv 1912.09729). π_old is the policy of the rollout in the trainer's own arithmetic; where an
engine of another precision sampled, terms are weighed by min(π_old / π_engine, cap), truncated
importance sampling. RLOO is the same with the others' mean as baseline; with one update a rollout
ρ = 1 and nothing is clipped.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from tessera.data.batch import Batch
from tessera.data.chat import ChatEncoder
from tessera.data.config import no_chat_template
from tessera.data.tokenizer import load_tokenizer
from tessera.model.checkpoint import save_model
from tessera.model.context import Context
from tessera.model.source import resolve
from tessera.model.transformer import Transformer
from tessera.plot import Series, line_chart
from tessera.rl import advantages, prompts
from tessera.rl.monitors import Guard
from tessera.rl.rewards import Reward, require_fields
from tessera.rl.rollouts import RolloutConfig, Rollouts, whole
from tessera.rl.rubric import Rubric
from tessera.runs.plan import Step
from tessera.runs.run import Run
from tessera.train.engine import Stats, Trainer, one_group
from tessera.train.flops import Work, model_cost
from tessera.train.losses import log_prob_loss, token_log_probs
from tessera.train.optim import TrainConfig
from tessera.vllm.choice import open_engine

FAR = 20.0  # nats, NeMo-RL's bound: e^20 is 5e8 already, e^90 no float32 at all


class PolicyConfig(RolloutConfig):
    """train: `steps` are optimizer steps; `microbatch_tokens` is the length of a packed row, and
    `tokens_per_step` says nothing here. kl: β, the weight of the distance from the model that
    training began with. importance_cap: 0 corrects for nothing; left out it is 2 where answers may
    be stale or are another engine's. gap_limit: see `Guard`."""

    train: TrainConfig
    rewards: tuple[Reward, ...] = Field(min_length=1)
    clip_low: float = Field(default=0.2, gt=0)
    clip_high: float = Field(default=0.2, gt=0)
    dual_clip: float = Field(default=0.0, ge=0)
    kl: float = Field(default=0.0, ge=0)
    importance_cap: float | None = Field(default=None, ge=0)
    gap_limit: float = Field(default=0.05, gt=0)

    def warnings(self, step: Step, steps: Sequence[Step]) -> list[str]:
        return no_chat_template(step, steps)

    @field_validator("dual_clip")
    @classmethod
    def _bounds_only_what_is_far(cls, value: float) -> float:
        if 0 < value <= 1:
            raise ValueError(
                f"dual_clip = {value:g} stops every answer that is worse than its group from being "
                "learned from; give a number above 1, or 0 for no bound"
            )
        return value

    @property
    def cap(self) -> float:
        """The importance cap that holds."""
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


class PolicyGradient:
    """The clipped surrogate, for any advantages; `reference` is needed where kl > 0."""

    def __init__(self, config: PolicyConfig, reference: Transformer | None = None) -> None:
        self.config, self.reference = config, reference

    def losses(self, module: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Stats]]:
        assert isinstance(module, Transformer)
        trained = (batch.weight.flatten() > 0).nonzero().squeeze(1)
        hidden = module(batch.tokens, _context(batch)).flatten(0, 1)[trained]
        labels, weight = batch.labels.flatten()[trained], batch.weight.flatten()[trained]
        streams = {name: one.flatten()[trained] for name, one in batch.streams.items()}
        if self.reference is not None:
            with torch.no_grad():
                theirs = self.reference(batch.tokens, _context(batch)).flatten(0, 1)[trained]
            streams["reference"] = token_log_probs(theirs, self.reference.head, labels)
        curve = _Curve(self.config, streams, weight)
        loss = log_prob_loss(hidden, module.head, labels, weight, curve)
        yield loss, curve.stats

    def weight(self, batch: Batch) -> Tensor:
        return batch.weight.sum()

    def groups(self, module: nn.Module) -> Mapping[str, Sequence[nn.Parameter]]:
        return one_group(module)

    def flops(self, module: nn.Module, batch: Batch) -> int:
        assert isinstance(module, Transformer)
        work = Work.of(batch, module.config.sliding_window)
        theirs = model_cost(self.reference.config).forward(work) if self.reference else 0
        return model_cost(module.config).training(work) + theirs


class _Curve:
    """ℓ of each token as a function of its log-prob, with its derivative; gathers statistics."""

    def __init__(self, config: PolicyConfig, streams: Mapping[str, Tensor], weight: Tensor) -> None:
        self.config, self.streams, self.weight = config, streams, weight
        names = ("entropy", "gap", "clipped", *(["kl"] if "reference" in streams else []))
        self.stats: Stats = {name: weight.new_zeros(()) for name in names}

    def __call__(self, log_prob: Tensor, entropy: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        config, behaviour = self.config, self.streams["behaviour"][part]
        # Of one update a rollout the policy itself is the old one.
        old = self.streams["old"][part] if "old" in self.streams else log_prob
        advantage, ratio = self.streams["advantage"][part], (log_prob - old).exp()
        inside = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        gain = torch.minimum(ratio * advantage, inside * advantage)
        moves = ratio * advantage <= inside * advantage
        if config.dual_clip:
            least = config.dual_clip * advantage
            moves &= (advantage >= 0) | (gain > least)
            gain = torch.where(advantage < 0, torch.maximum(gain, least), gain)
        slope = torch.where(moves, ratio * advantage, 0.0)
        if config.cap:
            correction = (old - behaviour).exp().clamp(max=config.cap)
            gain, slope = gain * correction, slope * correction
        self._note("entropy", entropy, part)
        self._note("gap", (old - behaviour).abs(), part)
        self._note("clipped", (~moves).float(), part)
        if "reference" not in self.streams:
            return -gain, -slope
        further = self.streams["reference"][part] - log_prob
        beyond, further = further.abs() > FAR, further.clamp(-FAR, FAR)
        kl = further.exp() - further - 1
        self._note("kl", kl, part)
        pull = (1 - further.exp()).masked_fill(beyond, 0.0)
        return config.kl * kl - gain, config.kl * pull - slope

    def _note(self, name: str, values: Tensor, part: slice) -> None:
        self.stats[name] = self.stats[name] + values @ self.weight[part]


def _context(batch: Batch) -> Context:
    return Context(batch.positions, batch.segments, prefix=batch.prefix)


def train(
    config: PolicyConfig, rule: advantages.Advantages, run: Run, inputs: Mapping[str, Path]
) -> None:
    """Trains `model` on `prompts` with the advantages of `rule`."""
    model, spread = inputs["model"], config.train.spread
    asked = prompts.read(inputs["prompts"])
    for prompt in asked:
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
            asked,
            config,
            rule=rule,
            steps=config.train.steps,
            row_length=config.train.microbatch_tokens,
            layout=spread.layout,
            run=run,
            rubric=rubric,
            keep_all=config.kl > 0,
        )
        _tell_order(source, run, config)
        objective, guard = PolicyGradient(config, reference), Guard(run, config.gap_limit)
        Trainer(module, objective, source, config.train, run, check=guard).fit()
    save_model(module, run.model_path, tokenizer_from=resolve(model))


def _tell_order(source: Rollouts, run: Run, config: PolicyConfig) -> None:
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


def stage(config: GRPOConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `grpo`."""
    train(config, functools.partial(advantages.grpo, std=config.std), run, inputs)


def rloo(config: RLOOConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `rloo`."""
    train(config, advantages.rloo, run, inputs)
