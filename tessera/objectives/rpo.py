"""Reward-aware preference optimisation: the gap of two answers' log-probs learns the gap of their
rewards (Nemotron-4 340B §3.3.2; Llama-Nemotron §5.3; one framework in arXiv 2502.00203).

    D  = β [(log π - log π_ref)(chosen) - (log π - log π_ref)(rejected)]        D* = η (r_c - r_r)
    backward  KL(σ(D*) ‖ σ(D))      forward  KL(σ(D) ‖ σ(D*))      squared  (D - D*)²

With D* → ∞ the backward form is DPO, which knows no measure of how much better an answer is and
pushes it for ever. `rpo` trains on rows of pairs, or online: it answers prompts itself, and the
best and the worst answer of each make a pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tessera import dist
from tessera.data.batch import Batch
from tessera.data.chat import ChatEncoder
from tessera.data.config import no_chat_template
from tessera.data.tokenizer import load_tokenizer
from tessera.model.checkpoint import save_model
from tessera.model.context import Context
from tessera.model.source import resolve
from tessera.model.transformer import Transformer
from tessera.rl import monitors, pairs, prompts
from tessera.rl.advantages import rloo
from tessera.rl.experience import Group, row
from tessera.rl.pairs import Pair
from tessera.rl.rewards import Reward, require_fields
from tessera.rl.rollouts import RolloutConfig, Rollouts, Sampled, whole
from tessera.rl.rubric import Rubric
from tessera.runs.files import FailureError
from tessera.runs.plan import Step
from tessera.runs.recipe import RecipeError
from tessera.runs.run import Run
from tessera.train.engine import Stats, Trainer, one_group
from tessera.train.flops import Work, model_cost
from tessera.train.losses import cross_entropy, token_log_probs
from tessera.train.optim import TrainConfig
from tessera.train.parallel import Layout
from tessera.vllm.choice import open_engine

Distance = Literal["backward", "forward", "squared"]
BARREN = 8  # rollouts without a pair in a row that end a run
ORDER_STREAM = 0x2B0  # keeps the order of pairs apart from other draws of the same seed


class RPOConfig(RolloutConfig):
    """paths: files of pairs; none, and the policy answers the stage's prompts. beta, eta: β and η
    (the report's Super: 1e-5 and 3; Nano's offline rounds: 3e-2). sft: weight of the chosen
    answer's cross entropy. pairs_per_step: of files."""

    train: TrainConfig
    paths: tuple[str, ...] = ()
    pairs_per_step: int = Field(default=64, ge=1)
    rewards: tuple[Reward, ...] = ()
    beta: float = Field(default=0.01, gt=0)
    eta: float = Field(default=1.0, gt=0)
    distance: Distance = "backward"
    sft: float = Field(default=0.0, ge=0)

    def warnings(self, step: Step, steps: Sequence[Step]) -> list[str]:
        return no_chat_template(step, steps)


def distance(kind: Distance, gap: Tensor, target: Tensor) -> Tensor:
    """The loss of each pair `(P,)` from its gap D and what that should be, D*."""
    if kind == "squared":
        return (gap - target) ** 2
    p, q = (gap, target) if kind == "forward" else (target, gap)
    likely = F.logsigmoid(p) - F.logsigmoid(q)
    unlikely = F.logsigmoid(-p) - F.logsigmoid(-q)
    return p.sigmoid() * likely + (-p).sigmoid() * unlikely


class RPO:
    """A pair weighs 1. `reference` is the model that training began with, frozen."""

    def __init__(self, config: RPOConfig, reference: Transformer) -> None:
        self.config, self.reference = config, reference

    def losses(self, module: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Stats]]:
        assert isinstance(module, Transformer)
        chosen = (batch.weight.flatten() > 0).nonzero().squeeze(1)
        hidden = module(batch.tokens, _context(batch)).flatten(0, 1)[chosen]
        labels = batch.labels.flatten()[chosen]
        streams = {name: one.flatten()[chosen] for name, one in batch.streams.items()}
        with torch.no_grad():
            theirs = self.reference(batch.tokens, _context(batch)).flatten(0, 1)[chosen]
            further = token_log_probs(hidden, module.head, labels)
            further -= token_log_probs(theirs, self.reference.head, labels)
        sign, index = streams["pair"].sign(), streams["pair"].abs().long() - 1
        count = int(streams["first"].sum())
        gap = self.config.beta * _sums(further * sign, index, count)
        margin = _sums(streams["margin"] * streams["first"], index, count)
        gap.requires_grad_()
        with torch.enable_grad():
            each = distance(self.config.distance, gap, self.config.eta * margin)
            (slope,) = torch.autograd.grad(each.sum(), gap) if count else (gap,)
        # A gap is linear in log-probs, so the pairs' slopes weigh their tokens' cross entropy.
        pull = -self.config.beta * slope.detach()[index] * sign
        if self.config.sft:
            length = _sums((sign > 0).float(), index, count)[index]
            pull = pull + self.config.sft * (sign > 0) / length
        loss = cross_entropy(hidden, module.head, labels, pull)
        told = each.detach().sum()
        yield loss - loss.detach() + told, _statistics(gap.detach(), margin, told)

    def weight(self, batch: Batch) -> Tensor:
        return batch.streams["first"].sum()

    def groups(self, module: nn.Module) -> Mapping[str, Sequence[nn.Parameter]]:
        return one_group(module)

    def flops(self, module: nn.Module, batch: Batch) -> int:
        assert isinstance(module, Transformer)
        work = Work.of(batch, module.config.sliding_window)
        theirs = model_cost(self.reference.config).forward(work)
        return model_cost(module.config).training(work) + theirs


def _sums(values: Tensor, index: Tensor, count: int) -> Tensor:
    return values.new_zeros(count).index_add_(0, index, values.to(values.dtype))


def _statistics(gap: Tensor, margin: Tensor, told: Tensor) -> Stats:
    """accuracy: the share of pairs whose better answer gained more than the other."""
    return {"accuracy": (gap > 0).float().sum(), "gap_mean": gap.sum(), "margin": margin.sum()}


def _context(batch: Batch) -> Context:
    return Context(batch.positions, batch.segments, prefix=batch.prefix)


class PairSource:
    """A `Source` over pairs in an order that follows from the seed, each once an epoch."""

    def __init__(self, found: Sequence[Pair], config: RPOConfig, layout: Layout, seed: int) -> None:
        self.pairs, self.config, self.layout, self.seed = found, config, layout, seed
        self._epoch, self._order = -1, np.empty(0, int)  # the epoch whose order is kept

    def batches(self, step: int) -> list[Batch]:
        """This process's rows of one step; see `Source`."""
        first = step * self.config.pairs_per_step
        numbers = [self._at(first + i) for i in range(self.config.pairs_per_step)]
        own = numbers[self.layout.data_rank :: self.layout.data_world]
        made = pairs.rows([self.pairs[i] for i in own], self.config.train.microbatch_tokens)
        return _even(made)

    def _at(self, place: int) -> int:
        epoch, at = divmod(place, len(self.pairs))
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, ORDER_STREAM, epoch])
            self._epoch, self._order = epoch, rng.permutation(len(self.pairs))
        return int(self._order[at])

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class OnlinePairs(Rollouts):
    """Rollouts whose rows hold the best and the worst answer of every group.

    Where no step of a rollout would have a pair, further prompts are asked of the same weights.
    """

    def _complete(self, rollout: int, found: Sampled) -> None:
        for further in range(1, BARREN + 1):
            if self._most(len(_pairs(found.groups))) >= self.config.updates_per_rollout:
                return
            if further < BARREN:
                self.run.say(f"rollout {rollout}: too few answers differ in worth; asking further")
                self.engine.sync(whole(self.module), rollout)
                more = self._sample(rollout, further)
                found.groups += more.groups
                for name, spent in more.seconds.items():
                    found.seconds[name] = found.seconds.get(name, 0.0) + spent
        monitors.keep_samples(found.groups, self.prompts, rollout, self.run)
        raise FailureError(
            f"{BARREN} rollouts in a row have no prompt whose answers differ in worth; see "
            f"samples/{rollout:08}.jsonl of the run, and ask prompts that are neither always nor "
            "never solved, or take more samples of each"
        )

    def _rows(self, update: int) -> list[Batch]:
        found = _pairs(self._groups)[update :: self.config.updates_per_rollout]
        return _even(pairs.rows(found, self.row_length))


def _pairs(groups: Sequence[Group]) -> list[Pair]:
    return [pair for group in groups if (pair := pairs.of_group(group))]


def _even(made: list[Batch]) -> list[Batch]:
    """As many rows in every process, the last of them without pairs."""
    most = len(made)
    if dist.world() > 1:
        most = int(dist.max(torch.tensor([most], device=dist.device())))
    return made + [_nothing() for _ in range(most - len(made))]


def _nothing() -> Batch:
    batch = row([])
    batch.streams = {name: torch.zeros_like(batch.weight) for name in ("pair", "margin", "first")}
    return batch


def stage(config: RPOConfig, run: Run, inputs: Mapping[str, Path | None]) -> None:
    """Stage `rpo`: train `model` on pairs of files, or on those it makes of `prompts`."""
    model, asked = inputs["model"], inputs["prompts"]
    assert model is not None
    spread = config.train.spread
    module, reference = spread.load(model), spread.load(model, frozen=True)
    encoder = ChatEncoder.of(load_tokenizer(resolve(model)), switch=config.switch)
    objective = RPO(config, reference)
    if config.paths:
        found = pairs.of_files(config.paths, encoder)
        source = PairSource(found, config, spread.layout, run.seed)
        Trainer(module, objective, source, config.train, run).fit()
    else:
        if asked is None or not config.rewards:
            raise RecipeError(
                f'{run.name}: give paths = ["PAIRS.jsonl"], or prompts (a [profile] above) and '
                "rewards to make pairs by"
            )
        _online(config, run, module, objective, encoder, asked)
    save_model(module, run.model_path, tokenizer_from=resolve(model))


def _online(
    config: RPOConfig,
    run: Run,
    module: Transformer,
    objective: RPO,
    encoder: ChatEncoder,
    asked: Path,
) -> None:
    questions = prompts.read(asked)
    for prompt in questions:
        require_fields(config.rewards, prompt.fields)
    engine = open_engine(config, whole(module), config.engine_batch)
    with closing(engine), Rubric(config.rewards, config.workers) as rubric:
        source = OnlinePairs(
            module,
            engine,
            encoder,
            questions,
            config,
            rule=rloo,
            steps=config.train.steps,
            row_length=config.train.microbatch_tokens,
            layout=config.train.spread.layout,
            run=run,
            rubric=rubric,
        )
        Trainer(module, objective, source, config.train, run).fit()
