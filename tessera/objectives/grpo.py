"""Group-relative policy optimisation (Llama-Nemotron §5.1, §5.2; DeepSeekMath, arXiv 2402.03300).

    ρ_t = π(y_t) / π_old(y_t)
    ℓ_t = -min(ρ_t A, clip(ρ_t, 1-ε_low, 1+ε_high) A) + β (π_ref/π - log(π_ref/π) - 1)

π_old is the trainer's policy at the rollout. Where the engine's differs, terms are multiplied by
min(π_old / π_engine, cap). RLOO is the same loss with other advantages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from tessera.data.batch import Batch
from tessera.model.transformer import Transformer
from tessera.runs.recipe import Config
from tessera.train.engine import Objective, Stats, context_of
from tessera.train.losses import log_prob_loss, token_log_probs

MAX_LOG_RATIO = 20.0  # nats, NeMo-RL's clamp of log(π_ref/π): e^90 overflows float32


class PolicyLossConfig(Config):
    """clip_low, clip_high: ε. dual_clip: c, the surrogate is at least c·A where A < 0 (arXiv
    1912.09729), 0 for no bound. kl: β, the reference is the model that training began with.
    importance_cap: 0 corrects for nothing; None is 2 for stale answers and for another engine's."""

    clip_low: float = Field(default=0.2, gt=0)
    clip_high: float = Field(default=0.2, gt=0)
    dual_clip: float = Field(default=0.0, ge=0)
    kl: float = Field(default=0.0, ge=0)
    importance_cap: float | None = Field(default=None, ge=0)

    @field_validator("dual_clip")
    @classmethod
    def _above_one(cls, value: float) -> float:
        if 0 < value <= 1:
            raise ValueError(
                f"dual_clip = {value:g} leaves no gradient to any answer below its group's mean; "
                "give a number above 1, or 0 for no bound"
            )
        return value

    @property
    def cap(self) -> float:
        return self.importance_cap or 0.0


class PolicyGradient(Objective):
    """The clipped surrogate, for any advantages; `reference` is needed where kl > 0."""

    def __init__(self, config: PolicyLossConfig, reference: Transformer | None = None) -> None:
        self.config = config
        self.reference = self.frozen = reference

    def losses(self, module: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Stats]]:
        assert isinstance(module, Transformer)
        trained = (batch.weight.flatten() > 0).nonzero().squeeze(1)
        hidden = module(batch.tokens, context_of(batch)).flatten(0, 1)[trained]
        labels, weight = batch.labels.flatten()[trained], batch.weight.flatten()[trained]
        streams = {name: one.flatten()[trained] for name, one in batch.streams.items()}
        if self.reference is not None:
            with torch.no_grad():
                theirs = self.reference(batch.tokens, context_of(batch)).flatten(0, 1)[trained]
            streams["reference"] = token_log_probs(theirs, self.reference.head, labels)
        token_loss = _TokenLoss(self.config, streams, weight)
        loss = log_prob_loss(hidden, module.head, labels, weight, token_loss)
        yield loss, token_loss.stats


class _TokenLoss:
    """ℓ of each token and its derivative, both as functions of its log-prob; sums statistics."""

    def __init__(
        self, config: PolicyLossConfig, streams: Mapping[str, Tensor], weight: Tensor
    ) -> None:
        self.config, self.streams, self.weight = config, streams, weight
        names = ("entropy", "gap", "clipped", *(["kl"] if "reference" in streams else []))
        self.stats: Stats = {name: weight.new_zeros(()) for name in names}

    def __call__(self, log_prob: Tensor, entropy: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        config, behaviour = self.config, self.streams["behaviour"][part]
        # With one update a rollout the policy itself is the old one.
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
        self._sum("entropy", entropy, part)
        self._sum("gap", (old - behaviour).abs(), part)
        self._sum("clipped", (~moves).float(), part)
        if "reference" not in self.streams:
            return -gain, -slope
        log_ratio = self.streams["reference"][part] - log_prob
        clamped = log_ratio.abs() > MAX_LOG_RATIO
        log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = log_ratio.exp() - log_ratio - 1
        self._sum("kl", kl, part)
        kl_slope = (1 - log_ratio.exp()).masked_fill(clamped, 0.0)
        return config.kl * kl - gain, config.kl * kl_slope - slope

    def _sum(self, name: str, values: Tensor, part: slice) -> None:
        self.stats[name] = self.stats[name] + values @ self.weight[part]
