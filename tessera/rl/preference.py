"""Stage `rpo`: preference optimisation on pairs of answers, one better by a margin of reward.

Pairs come from rows of files (data/preferences.py says of which), or online from the best and the
worst of what the policy answers. Both answers of a pair share its prompt in one row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from tessera import dist
from tessera.data.audit import rows_named
from tessera.data.batch import Batch, best_fit
from tessera.data.chat import ChatEncoder
from tessera.data.config import encoder_for
from tessera.data.preferences import Pair, read_pairs
from tessera.data.readers import Bad, DataError, expand
from tessera.data.sources import first_refusals
from tessera.data.tokenizer import load_tokenizer
from tessera.model.checkpoint import save_model
from tessera.model.source import resolve
from tessera.objectives.rpo import RPO, RPOLossConfig
from tessera.rl.advantages import rloo
from tessera.rl.experience import Answer, Group, row, spans
from tessera.rl.rollouts import Rollout, RolloutConfig, Rollouts, keep_samples, padded
from tessera.runs.files import FailureError
from tessera.runs.plan import Step
from tessera.runs.recipe import RecipeError
from tessera.runs.run import Run
from tessera.train.engine import Trainer

MAX_ATTEMPTS = 8  # rollouts in a row without a pair, then the run ends
ORDER_STREAM = 0x2B0  # keeps the order of pairs apart from other draws of the same seed


class RPOConfig(RolloutConfig, RPOLossConfig):
    """paths: files of pairs; without, the policy answers the stage's prompts. pairs_per_step: of
    files."""

    paths: tuple[str, ...] = ()
    pairs_per_step: int = Field(default=64, ge=1)

    def warnings(self, step: Step, steps: Sequence[Step]) -> list[str]:
        told = super().warnings(step, steps)
        encoder = None if told else encoder_for(step, steps, "last", self.switch)
        if encoder is None or not self.paths:
            return told
        for path in expand(self.paths):
            told += first_refusals(path, (one for _, one in read_pairs(path, encoder)))
        return told


def of_group(group: Group) -> Pair | None:
    """The best and the worst answer of a group; None where they are worth the same."""
    known = [(one.reward, one.ids) for one in group.answers if one.reward is not None and one.ids]
    if not known:
        return None
    (most, best), (least, worst) = (pick(known, key=lambda one: one[0]) for pick in (max, min))
    return Pair(group.ids, best, worst, most - least) if most > least else None


def of_files(
    paths: Sequence[str], encoder: ChatEncoder, say: Callable[[str], None] = print
) -> list[Pair]:
    """The pairs of files of rows; `say` is told which rows are left out, and why.

    Raises DataError for a file of something else, and where no row is a pair.
    """
    found: list[Pair] = []
    for path in expand(paths):
        refused: dict[str, list[int]] = {}
        for number, one in read_pairs(path, encoder):
            if isinstance(one, Bad):
                refused.setdefault(one.reason, []).append(number)
            else:
                found.append(one)
        for reason, numbers in refused.items():
            say(f"{path}: {reason}: left out{rows_named(numbers)}")
        if refused and not found:
            reason, numbers = next(iter(refused.items()))
            raise DataError(f"{path}:{numbers[0]}: no pair: {reason}; nor is any other row one")
    return found


def rows(pairs: Sequence[Pair], row_length: int) -> list[Batch]:
    """Batches of one row each, every pair whole in one; ValueError for a pair that is too long."""
    lengths = [len(pair) for pair in pairs]
    if max(lengths, default=0) > row_length:
        raise ValueError(
            f"a pair of {max(lengths)} tokens does not fit into a row of {row_length}; raise "
            "train.microbatch_tokens"
        )
    return [_row([pairs[i] for i in one]) for one in best_fit(lengths, row_length)]


def _row(pairs: Sequence[Pair]) -> Batch:
    """A row of pairs; without any it trains nothing.

    streams: `pair`, k for the chosen and -k for the rejected answer of the k-th pair of the row;
    `margin`; `first`, 1 at the first prediction of each pair.
    """

    def answer(ids: list[int]) -> Answer:
        return Answer(ids, [0.0] * len(ids), "stop", "", None, {}, True, advantage=1.0)

    groups = [Group(0, "", p.prompt, [answer(p.chosen), answer(p.rejected)]) for p in pairs]
    batch = row(groups)
    streams = {name: torch.zeros_like(batch.weight) for name in ("pair", "margin", "first")}
    for number, (_, here) in enumerate(spans(groups)):
        pair, rejected = divmod(number, 2)
        streams["pair"][0, here] = -(pair + 1) if rejected else pair + 1
        streams["margin"][0, here] = pairs[pair].margin
        if not rejected:
            streams["first"][0, here.start] = 1.0
    batch.streams = streams
    return batch


class PairSource:
    """A `Source` over pairs, each once an epoch, in an order that follows from the seed."""

    def __init__(self, pairs: Sequence[Pair], config: RPOConfig, seed: int) -> None:
        self.pairs, self.config, self.seed = pairs, config, seed
        self._epoch, self._order = -1, np.empty(0, int)

    def batches(self, step: int) -> list[Batch]:
        """This process's rows of one step; see `Source`."""
        first, layout = step * self.config.pairs_per_step, self.config.train.placement.layout
        numbers = [self._at(first + i) for i in range(self.config.pairs_per_step)]
        own = [self.pairs[i] for i in numbers[layout.data_rank :: layout.data_world]]
        return padded(rows(own, self.config.train.microbatch_tokens), _row([]))

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
    """Rollouts whose rows hold the best and the worst answer of every group."""

    def _complete(self, number: int, found: Rollout) -> None:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            pairs = torch.tensor([len(_pairs(found.groups))], device=dist.device())
            if int(dist.max(pairs)) >= self.config.updates_per_rollout:
                return
            if attempt < MAX_ATTEMPTS:  # further prompts are answered by the same weights
                self.run.say(f"rollout {number}: too few prompts have answers of different reward")
                self.engine.sync(self.module, number)
                more = self._sample(number, attempt)
                found.groups += more.groups
                for name, spent in more.seconds.items():
                    found.seconds[name] += spent
        keep_samples(found.groups, self.prompts, number, self.run)
        raise FailureError(
            f"{MAX_ATTEMPTS} rollouts in a row have no prompt whose answers differ in reward; see "
            f"samples/{number:08}.jsonl of the run, and give prompts that are neither always nor "
            "never solved, or take more samples of each"
        )

    def _rows(self, update: int) -> list[Batch]:
        found = _pairs(self._groups)[update :: self.config.updates_per_rollout]
        return padded(rows(found, self.row_length), _row([]))


def _pairs(groups: Sequence[Group]) -> list[Pair]:
    return [pair for group in groups if (pair := of_group(group))]


def rpo(config: RPOConfig, run: Run, inputs: Mapping[str, Path | None]) -> None:
    """Stage `rpo`: train `model` on pairs of files, or on those it makes of `prompts`."""
    model, placement = inputs["model"], config.train.placement
    assert model is not None
    module = placement.load(model)
    objective = RPO(config, placement.load(model, frozen=True))
    if config.paths:
        encoder = ChatEncoder.of(load_tokenizer(resolve(model)), switch=config.switch)
        source = PairSource(of_files(config.paths, encoder, run.say), config, run.seed)
        Trainer(module, objective, source, config.train, run).fit()
    elif inputs["prompts"] is None or not config.rewards:
        raise RecipeError(
            f'{run.name}: give paths = ["PAIRS.jsonl"], or prompts (a [profile] above) and rewards '
            "to make pairs by"
        )
    else:
        with OnlinePairs.open(module, config, rloo, run, inputs) as source:
            Trainer(module, objective, source, config.train, run).fit()
    save_model(module, run.model_path, tokenizer_from=resolve(model))
