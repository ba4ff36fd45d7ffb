"""Stage `rpo`: preference optimisation on pairs of answers, one better by a margin of reward.

Pairs come from rows of files (`prompt` or `messages`, `chosen`, `rejected`, and where known
`chosen_reward` and `rejected_reward`, as NeMo-Aligner's sets have them), or online from the best
and the worst of what the policy answers. Both answers of a pair share its prompt in one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from tessera import dist
from tessera.data.batch import Batch, best_fit
from tessera.data.chat import ChatEncoder
from tessera.data.conversation import Message, SchemaError, tidy
from tessera.data.readers import Bad, DataError, expand, read_rows
from tessera.data.thought import split
from tessera.data.tokenizer import load_tokenizer
from tessera.model.checkpoint import save_model
from tessera.model.source import resolve
from tessera.model.transformer import Transformer
from tessera.objectives.rpo import RPO, RPOLossConfig
from tessera.rl import monitors, prompts
from tessera.rl.advantages import rloo
from tessera.rl.experience import Answer, Group, Piece, row, spans
from tessera.rl.rewards import require_fields
from tessera.rl.rollouts import RolloutConfig, Rollouts, Sampled, whole
from tessera.rl.rubric import Rubric
from tessera.runs.files import FailureError
from tessera.runs.recipe import RecipeError
from tessera.runs.run import Run
from tessera.train.engine import Trainer
from tessera.train.optim import TrainConfig
from tessera.train.parallel import Layout
from tessera.vllm.choice import open_engine

MAX_TRIES = 8  # rollouts in a row without a pair, then the run ends
ORDER_STREAM = 0x2B0  # keeps the order of pairs apart from other draws of the same seed


class RPOConfig(RolloutConfig, RPOLossConfig):
    """paths: files of pairs; without, the policy answers the stage's prompts. pairs_per_step: of
    files."""

    train: TrainConfig
    paths: tuple[str, ...] = ()
    pairs_per_step: int = Field(default=64, ge=1)


@dataclass(frozen=True, slots=True)
class Pair:
    """Ids of a prompt and of both answers; margin: by how much reward the chosen one is better."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float

    def __len__(self) -> int:
        return len(self.prompt) - 1 + len(self.chosen) + len(self.rejected)


def of_group(group: Group) -> Pair | None:
    """The best and the worst answer of a group; None where they are worth the same."""
    known = [answer for answer in group.answers if answer.reward is not None and answer.ids]
    if not known:
        return None
    best, worst = (pick(known, key=lambda one: one.reward or 0.0) for pick in (max, min))
    margin = (best.reward or 0.0) - (worst.reward or 0.0)
    return Pair(group.ids, best.ids, worst.ids, margin) if margin > 0 else None


def of_files(paths: Sequence[str], encoder: ChatEncoder) -> list[Pair]:
    """The pairs of files of rows. Raises DataError naming a row that is none."""
    return [pair for path in expand(paths) for pair in _of_file(path, encoder)]


def _of_file(path: Path, encoder: ChatEncoder) -> Iterator[Pair]:
    stop = list(encoder.tokenizer.eos_ids[:1])
    for number, found in read_rows(path):
        if isinstance(found, Bad):
            raise DataError(str(found))
        try:
            messages, chosen, rejected, margin = _read(found)
        except (SchemaError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}:{number}: no pair: {error}") from None
        mode = "off" if split(chosen).thought is None else "on"
        better, worse = (encoder.tokenizer.encode(text) + stop for text in (chosen, rejected))
        yield Pair(encoder.prompt(messages, mode), better, worse, margin)


def _read(found: Any) -> tuple[list[Message], str, str, float]:
    """(conversation, chosen, rejected, margin) of one row; chosen may hold messages, too."""
    if not isinstance(found, dict):
        raise SchemaError(f"a {type(found).__name__} and not an object")
    asked = found.get("messages") or found.get("prompt")
    messages = tidy([{"role": "user", "content": asked}] if isinstance(asked, str) else asked)
    chosen, rejected = (
        _text(found, ("chosen", "chosen_response")),
        _text(found, ("rejected", "rejected_response")),
    )
    given = found.get("chosen_reward"), found.get("rejected_reward")
    # NeMo-Aligner's defaults, for a null too.
    better, worse = (d if g is None else float(g) for g, d in zip(given, (1.0, 0.0), strict=True))
    margin = better - worse
    if margin <= 0:
        raise SchemaError(f"the chosen answer's reward {better} is not above {worse}")
    return messages, chosen, rejected, margin


def _text(found: dict[str, Any], names: Sequence[str]) -> str:
    value = next((found[name] for name in names if found.get(name)), None)
    if isinstance(value, list):
        value = value[-1].get("content")
    elif isinstance(value, dict):
        value = value.get("content")
    if not isinstance(value, str):
        raise SchemaError(f"no {' or '.join(names)}")
    return value


def rows(pairs: Sequence[Pair], row_length: int) -> list[Batch]:
    """Batches of one row each, every pair whole in one of them.

    streams: `pair`, k for the chosen and -k for the rejected answer of the k-th pair of the row;
    `margin`; `first`, 1 at the first prediction of each pair.
    Raises ValueError for a pair that no row can hold.
    """
    for pair in pairs:
        if len(pair) > row_length:
            raise ValueError(
                f"a pair of {len(pair)} tokens does not fit into a row of {row_length}; raise "
                "train.microbatch_tokens"
            )
    return [_row([pairs[i] for i in one]) for one in best_fit([len(p) for p in pairs], row_length)]


def _row(pairs: Sequence[Pair]) -> Batch:
    parts = [Piece(one.prompt, [_answer(one.chosen), _answer(one.rejected)]) for one in pairs]
    batch = row(parts)
    shape = batch.tokens.shape
    streams = {name: np.zeros(shape, np.float32) for name in ("pair", "margin", "first")}
    for number, (_, here) in enumerate(spans(parts)):
        pair, rejected = divmod(number, 2)
        streams["pair"][0, here] = -(pair + 1) if rejected else pair + 1
        streams["margin"][0, here] = pairs[pair].margin
        if not rejected:
            streams["first"][0, here.start] = 1.0
    batch.streams = {name: torch.from_numpy(value) for name, value in streams.items()}
    return batch


def _answer(ids: list[int]) -> Answer:
    return Answer(ids, [0.0] * len(ids), "stop", "", None, {}, True, advantage=1.0)


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
        made = rows([self.pairs[i] for i in own], self.config.train.microbatch_tokens)
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
        for further in range(1, MAX_TRIES + 1):
            if self._most(len(_pairs(found.groups))) >= self.config.updates_per_rollout:
                return
            if further < MAX_TRIES:
                self.run.say(f"rollout {rollout}: too few answers differ in worth; asking further")
                self.engine.sync(whole(self.module), rollout)
                more = self._sample(rollout, further)
                found.groups += more.groups
                for name, spent in more.seconds.items():
                    found.seconds[name] = found.seconds.get(name, 0.0) + spent
        monitors.keep_samples(found.groups, self.prompts, rollout, self.run)
        raise FailureError(
            f"{MAX_TRIES} rollouts in a row have no prompt whose answers differ in worth; see "
            f"samples/{rollout:08}.jsonl of the run, and ask prompts that are neither always nor "
            "never solved, or take more samples of each"
        )

    def _rows(self, update: int) -> list[Batch]:
        found = _pairs(self._groups)[update :: self.config.updates_per_rollout]
        return _even(rows(found, self.row_length))


def _pairs(groups: Sequence[Group]) -> list[Pair]:
    return [pair for group in groups if (pair := of_group(group))]


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


def rpo(config: RPOConfig, run: Run, inputs: Mapping[str, Path | None]) -> None:
    """Stage `rpo`: train `model` on pairs of files, or on those it makes of `prompts`."""
    model, prompts_run = inputs["model"], inputs["prompts"]
    assert model is not None
    spread = config.train.spread
    module, reference = spread.load(model), spread.load(model, frozen=True)
    encoder = ChatEncoder.of(load_tokenizer(resolve(model)), switch=config.switch)
    objective = RPO(config, reference)
    if config.paths:
        found = of_files(config.paths, encoder)
        source = PairSource(found, config, spread.layout, run.seed)
        Trainer(module, objective, source, config.train, run).fit()
    else:
        if prompts_run is None or not config.rewards:
            raise RecipeError(
                f'{run.name}: give paths = ["PAIRS.jsonl"], or prompts (a [profile] above) and '
                "rewards to make pairs by"
            )
        _online(config, run, module, objective, encoder, prompts_run)
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
