"""Generalised knowledge distillation: a teacher corrects what the student itself says.

    ℓ_t = D(p_t, q_t)      p the teacher's distribution, q the student's, at each token of an answer

    β = 0         Σ p log(p/q)                        forward KL, as in `kd`
    β = 1         Σ q log(q/p)                        reverse KL
    0 < β < 1     β Σ p log(p/m) + (1-β) Σ q log(q/m),   m = βp + (1-β)q

(GKD, arXiv 2306.13649; β is that of TRL's GKDTrainer.) Nothing is learned from which token was
drawn: the whole distributions are compared, and the gradient does not go through the sampling.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor, nn

from tessera.data.batch import Batch
from tessera.model.transformer import Transformer
from tessera.runs.recipe import Config
from tessera.train.engine import Objective, Stats, context_of
from tessera.train.losses import kl_divergence


class GKDLossConfig(Config):
    """beta: β, from the forward KL (0) to the reverse KL (1)."""

    beta: float = Field(default=1.0, ge=0, le=1)


class GKD(Objective):
    """The student learns the distribution of `teacher`, which is frozen, on its own answers."""

    def __init__(self, teacher: Transformer, config: GKDLossConfig) -> None:
        self.teacher = self.frozen = teacher
        self.config = config

    def losses(self, module: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Stats]]:
        assert isinstance(module, Transformer)
        weight = batch.weight.flatten()
        trained = (weight > 0).nonzero().squeeze(1)
        with torch.no_grad():
            theirs = self.teacher(batch.tokens, context_of(batch)).flatten(0, 1)[trained]
        hidden = module(batch.tokens, context_of(batch)).flatten(0, 1)[trained]
        head, their_head, weight = module.head, self.teacher.head, weight[trained]
        yield kl_divergence(hidden, head, theirs, their_head, weight, self.config.beta), {}
