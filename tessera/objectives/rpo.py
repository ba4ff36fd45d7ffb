"""Reward-aware preference optimisation: the gap of two answers' log-probs learns the gap of their
rewards (Nemotron-4 340B §3.3.2; Llama-Nemotron §5.3; one framework in arXiv 2502.00203).

    D  = β [(log π - log π_ref)(chosen) - (log π - log π_ref)(rejected)]        D* = η (r_c - r_r)
    backward  KL(σ(D*) ‖ σ(D))      forward  KL(σ(D) ‖ σ(D*))      squared  (D - D*)²

With D* → ∞ the backward form is DPO.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tessera.data.batch import Batch
from tessera.model.transformer import Transformer
from tessera.runs.recipe import Config
from tessera.train.engine import Objective, Stats, context_of
from tessera.train.losses import cross_entropy, token_log_probs

Distance = Literal["backward", "forward", "squared"]


class RPOLossConfig(Config):
    """beta, eta: β and η (the report's Super: 1e-5 and 3; Nano's offline rounds: 3e-2). sft: weight
    of the chosen answer's cross entropy."""

    beta: float = Field(default=0.01, gt=0)
    eta: float = Field(default=1.0, gt=0)
    distance: Distance = "backward"
    sft: float = Field(default=0.0, ge=0)


def distance(kind: Distance, gap: Tensor, target: Tensor) -> Tensor:
    """The loss of each pair `(P,)` from its gap D and what that should be, D*."""
    if kind == "squared":
        return (gap - target) ** 2
    p, q = (gap, target) if kind == "forward" else (target, gap)
    likely = F.logsigmoid(p) - F.logsigmoid(q)
    unlikely = F.logsigmoid(-p) - F.logsigmoid(-q)
    return p.sigmoid() * likely + (-p).sigmoid() * unlikely


class RPO(Objective):
    """Every pair has weight 1. reference: the frozen model it began with. `accuracy`: the
    share of pairs whose chosen answer gained more than the rejected."""

    def __init__(self, config: RPOLossConfig, reference: Transformer) -> None:
        self.config = config
        self.reference = self.frozen = reference

    def losses(self, module: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Stats]]:
        assert isinstance(module, Transformer)
        trained = (batch.weight.flatten() > 0).nonzero().squeeze(1)
        hidden = module(batch.tokens, context_of(batch)).flatten(0, 1)[trained]
        labels = batch.labels.flatten()[trained]
        streams = {name: one.flatten()[trained] for name, one in batch.streams.items()}
        with torch.no_grad():
            theirs = self.reference(batch.tokens, context_of(batch)).flatten(0, 1)[trained]
            own = token_log_probs(hidden, module.head, labels)
            log_ratio = own - token_log_probs(theirs, self.reference.head, labels)
        sign, index = streams["pair"].sign(), streams["pair"].abs().long() - 1
        count = int(batch.summed(streams["first"].sum()))
        gap = batch.summed(self.config.beta * _sums(log_ratio * sign, index, count))
        margin = batch.summed(_sums(streams["margin"] * streams["first"], index, count))
        own_pairs = _sums(streams["first"], index, count) > 0  # parts of rows: said by one process
        gap.requires_grad_()
        with torch.enable_grad():
            each = distance(self.config.distance, gap, self.config.eta * margin)
            (slope,) = torch.autograd.grad(each.sum(), gap) if count else (gap,)
        # D is linear in log-probs: the slope of a pair's loss is the weight of its tokens' CE.
        weight = -self.config.beta * slope.detach()[index] * sign
        gap, margin = gap.detach()[own_pairs], margin[own_pairs]
        value = each.detach()[own_pairs].sum()
        if self.config.sft:
            length = batch.summed(_sums((sign > 0).float(), index, count))[index]
            sft = self.config.sft * (sign > 0) / length
            weight, value = weight + sft, value - (sft * own).sum()
        loss = cross_entropy(hidden, module.head, labels, weight)
        stats = {"accuracy": (gap > 0).float().sum(), "gap_mean": gap.sum(), "margin": margin.sum()}
        yield loss - loss.detach() + value, stats

    def weight(self, batch: Batch) -> Tensor:
        return batch.streams["first"].sum()


def _sums(values: Tensor, index: Tensor, count: int) -> Tensor:
    return values.new_zeros(count).index_add_(0, index, values.to(values.dtype))
