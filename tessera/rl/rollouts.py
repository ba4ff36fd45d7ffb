"""Reinforcement learning as a source of batches: generate, judge, compare, pack.

A completion is a function of (seed, rollout, prompt, sample) and the weights, so a run killed in a
rollout generates it again. Rollouts that feed several steps, or are generated while the trainer
learns from the one before (`staleness = 1`), are on disk while a resume state needs them. Prompt g
of a rollout belongs to update g mod U and process ⌊g / U⌋ mod P. Processes that hold the engine's
weights together (`tensor`) answer the prompts of all of them, and each judges some.
"""

from __future__ import annotations

import json
import queue
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import torch
from pydantic import Field, model_validator
from torch.distributed.device_mesh import DeviceMesh

from tessera import dist
from tessera.data.batch import Batch
from tessera.data.chat import ChatEncoder
from tessera.data.config import no_chat_template
from tessera.data.switch import Switch, obedience
from tessera.data.tokenizer import load_tokenizer
from tessera.generate.engine import Completion, Engine
from tessera.model.placement import Layout, PlacedConfig, Placement, beside_training
from tessera.model.source import resolve
from tessera.model.transformer import Transformer
from tessera.rl.advantages import Advantages, of_group
from tessera.rl.curriculum import CurriculumConfig, Order, order
from tessera.rl.experience import Answer, Group, Level, pack, row, rows, spans
from tessera.rl.pool import Judged, Rubric
from tessera.rl.profile import Prompt, read, sample_answers
from tessera.rl.rewards import Reward, Sample, require_fields
from tessera.runs.files import FailureError, atomic_write
from tessera.runs.plan import Step
from tessera.runs.run import Run
from tessera.train.engine import context_of
from tessera.train.losses import token_log_probs
from tessera.train.optim import AllLayers, TrainConfig
from tessera.vllm.config import EngineChoice, open_engine

T = TypeVar("T")
KEPT = 3  # samples of each kind


class RolloutConfig(EngineChoice, PlacedConfig):
    """How prompts are answered and judged.

    dtype, tensor: of the weights that answer, "auto" being train.dtype. train: `steps` are
    optimizer steps, `microbatch_tokens` is the length of a packed row, and `tokens_per_step` is not
    used. prompts_per_rollout, samples: the report has 72 and 16.
    switch: how the mode is said, as in the stage that made the prompts; the model's own where not
    given.
    overlong: "mask" leaves out answers that were cut at max_tokens. overlong_buffer: over so many
    tokens before max_tokens the reward falls by up to 1 (DAPO, arXiv 2503.14476, §3.4).
    dynamic_sampling: how many further sets of prompts may replace groups whose answers are all
    worth the same (DAPO §3.2). samples_every: rollouts between samples that are kept.
    """

    train: Annotated[TrainConfig, AllLayers]
    prompts_per_rollout: int = Field(default=64, ge=1)
    samples: int = Field(default=16, ge=2)
    updates_per_rollout: int = Field(default=1, ge=1)
    max_tokens: int = Field(default=1024, ge=1)
    rewards: tuple[Reward, ...] = ()
    curriculum: CurriculumConfig = CurriculumConfig()
    switch: Switch | None = None
    level: Level = "token"
    overlong: Literal["keep", "mask"] = "keep"
    overlong_buffer: int = Field(default=0, ge=0)
    dynamic_sampling: int = Field(default=0, ge=0)
    staleness: Literal[0, 1] = 0
    engine_batch: int = Field(default=256, ge=1)
    workers: int = Field(default=2, ge=1)
    samples_every: int = Field(default=10, ge=1)

    def warnings(self, step: Step, steps: Sequence[Step]) -> list[str]:
        return no_chat_template(step, steps)

    def placement(self, *models: str | Path) -> Placement:
        """Of the weights that answer, beside the model in training. Raises LayoutError."""
        (model,) = models
        tensor = 1 if self.staleness else self.tensor
        return beside_training(model, self.train.placement, self.dtype, tensor)

    @property
    def keep_all(self) -> bool:
        """Rows also hold answers without advantage, because the loss reads them."""
        return False

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.updates_per_rollout > self.prompts_per_rollout:
            raise ValueError(
                "updates_per_rollout exceeds prompts_per_rollout: a step needs prompts"
            )
        if self.staleness and (self.tensor or 1) > 1:
            raise ValueError(
                f"tensor = {self.tensor} makes processes answer together, which staleness = 1 does "
                "in a thread that calls no other process: leave one of them out"
            )
        if self.overlong_buffer > self.max_tokens:
            raise ValueError(
                f"overlong_buffer = {self.overlong_buffer} exceeds max_tokens = {self.max_tokens}: "
                "the shortest answer would lose reward; give a part of max_tokens"
            )
        return self


@dataclass(slots=True)
class Rollout:
    """Groups of answers, and seconds by what they went on."""

    groups: list[Group]
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))


@dataclass(eq=False)
class Rollouts:
    """A `Source` of what the policy itself writes.

    rule: rewards of a group -> advantages; None, nothing is judged and every answer counts alike.
    """

    module: Transformer
    engine: Engine
    encoder: ChatEncoder
    prompts: Sequence[Prompt]
    config: RolloutConfig
    rule: Advantages | None
    run: Run
    rubric: Rubric
    together: DeviceMesh | None = None  # the processes that hold the engine's weights
    _number: int = -1  # of the rollout in use
    _groups: list[Group] = field(default_factory=list)
    _updates: list[list[Batch]] = field(default_factory=list)
    _metrics: dict[str, float] = field(default_factory=dict)
    _seconds: dict[str, float] = field(default_factory=dict)
    _saved: list[int] = field(default_factory=list)
    _prefetched: Future[Rollout] | None = None
    _kept: int = -1  # a prefetched rollout that a resume state put on disk

    def __post_init__(self) -> None:
        self.row_length = self.config.train.microbatch_tokens
        self.layout = self.config.train.placement.layout
        here = [dist.rank()] if self.together is None else self.together.mesh.tolist()
        self._place = here.index(dist.rank()), len(here)  # this process's among `together`
        self._served = sorted({rank // self.layout.sharing for rank in here})  # data ranks
        self.order = self._order(0)
        self._thread = DaemonThread()

    @classmethod
    @contextmanager
    def open(
        cls,
        module: Transformer,
        config: RolloutConfig,
        rule: Advantages | None,
        run: Run,
        inputs: Mapping[str, Path | None],
    ) -> Iterator[Self]:
        """The rollouts of a stage on its inputs `model` and `prompts`; closes what it opened."""
        model, prompts = inputs["model"], inputs["prompts"]
        assert model is not None and prompts is not None
        questions = read(prompts)
        for prompt in questions:
            require_fields(config.rewards, prompt.fields)
        encoder = ChatEncoder.of(load_tokenizer(resolve(model)), switch=config.switch)
        placement = config.placement(model)
        engine = open_engine(config, module, config.engine_batch, placement)
        with closing(engine), Rubric(config.rewards, config.workers) as rubric:
            mesh = placement.tensor_mesh
            yield cls(module, engine, encoder, questions, config, rule, run, rubric, mesh)

    def _order(self, number: int) -> Order:
        """The prompts of each rollout: the first order, or another to fall back on."""
        config = self.config
        count = config.prompts_per_rollout * (1 + config.dynamic_sampling)
        rollouts = -(-config.train.steps // config.updates_per_rollout)
        rates = [prompt.pass_rate for prompt in self.prompts]
        return order(rates, rollouts, count, config.curriculum, self.run.seed + (number << 32))

    def batches(self, step: int) -> list[Batch]:
        """This process's rows of one optimizer step; see `Source`."""
        number, update = divmod(step, self.config.updates_per_rollout)
        self._metrics, self._seconds = {}, {}
        if number != self._number:
            own = self.layout.data_rank, self.layout.data_world
            self._groups = self._read(number, *own) if update else self._begin(number)
            self._number = number
            self._updates = [self._rows(u) for u in range(self.config.updates_per_rollout)]
        return self._updates[update]

    def metrics(self) -> dict[str, float]:
        """Means over the rollout that the last `batches` began; empty if it began none."""
        return self._metrics

    def timings(self) -> dict[str, float]:
        """Seconds of generating and judging for the last `batches`."""
        return self._seconds

    def state_dict(self) -> dict[str, Any]:
        """Rollouts follow from the step; what feeds several steps, or is prefetched, is on disk."""
        self._saved = [*self._saved[-1:], self._number]
        for file in (self.run.path / "rollouts").glob("*.jsonl"):
            if int(file.name.partition("-")[0]) < self._saved[0]:
                file.unlink(missing_ok=True)
        if self._prefetched is not None:
            self._kept = self._number + 1
            self._keep(self._kept, self._prefetched.result().groups)
        return {"rollout": self._number, "kept": self._kept, "world": self.layout.data_world}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A state of any number of processes; what they kept is shared anew."""
        self._saved, self._kept, world = [state["rollout"]], state["kept"], state["world"]
        for number in (state["rollout"], state["kept"]):
            if world != self.layout.data_world and self._path(number, 0, world).is_file():
                shares = [self._read(number, rank, world) for rank in range(world)]
                whole = joined(shares, self.config.updates_per_rollout)
                self._keep(number, self._share(whole, self.layout.data_rank))
                dist.barrier()

    def _path(self, number: int, rank: int, world: int) -> Path:
        return self.run.path / "rollouts" / f"{number:08}-{rank}-of-{world}.jsonl"

    def _keep(self, number: int, groups: Sequence[Group]) -> None:
        if not self.layout.leads:
            return  # another process has the same and writes it
        path = self._path(number, self.layout.data_rank, self.layout.data_world)
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, "".join(json.dumps(asdict(group)) + "\n" for group in groups))

    def _read(self, number: int, rank: int, world: int) -> list[Group]:
        text = self._path(number, rank, world).read_text(encoding="utf-8")
        found = [json.loads(line) for line in text.split("\n") if line]
        return [Group(**one | {"answers": [Answer(**a) for a in one["answers"]]}) for one in found]

    def _share(self, items: Sequence[T], rank: int) -> list[T]:
        return share(items, self.config.updates_per_rollout, rank, self.layout.data_world)

    def _begin(self, number: int) -> list[Group]:
        """The groups of a rollout, prefetched or generated now; starts to prefetch the next one."""
        started, prefetched, self._prefetched = time.monotonic(), self._prefetched, None
        found = None
        if prefetched:
            found = prefetched.result()
            found.seconds["wait_seconds"] = time.monotonic() - started
        elif number == self._kept:
            found = Rollout(self._read(number, self.layout.data_rank, self.layout.data_world))
        prefetch = self.config.staleness and number + 1 < len(self.order.batches)
        if found is None or prefetch:
            self.engine.sync(self.module, number)
        found = found or self._sample(number)
        self._complete(number, found)
        if prefetch:
            self._prefetched = self._thread.submit(partial(self._sample, number + 1))
        else:
            self.engine.sleep()
        groups, self._seconds = found.groups, dict(found.seconds)
        self._metrics = measured(groups, self.rubric.names, self.layout)
        if self.config.staleness:
            versions = (answer.version for group in groups for answer in group.answers)
            self._metrics["staleness"] = float(number - min(versions, default=0))
        if self.config.updates_per_rollout > 1:
            if self.rule is not None:
                self._score_old(groups)
            self._keep(number, groups)
        if number % self.config.samples_every == 0:
            keep_samples(groups, self.prompts, number, self.run)
        return groups

    def _complete(self, number: int, found: Rollout) -> None:
        """Adds what a step needs. Every process calls it while nothing is prefetched."""

    def _sample(self, number: int, attempt: int = 0) -> Rollout:
        """Judged answers to this process's share of a rollout's prompts.

        A later attempt has other prompts, or other answers. May run in another thread: it calls
        no other process than those of `together`.
        """
        drawn = self._order(attempt) if attempt else self.order
        sets, batch = 1 + self.config.dynamic_sampling, drawn.batches[number].tolist()
        left = [self._share(batch, rank) for rank in self._served]
        wanted = [-(-len(own) // sets) for own in left]
        found: list[list[Group]] = [[] for _ in left]
        seconds: dict[str, float] = defaultdict(float)
        while any(
            parts := [
                own[:count] if len(groups) < count else []
                for own, count, groups in zip(left, wanted, found, strict=True)
            ]
        ):
            fresh = iter(self._answered(attempt << 24 | number, sum(parts, []), seconds))
            for i, part in enumerate(parts):
                left[i] = left[i][len(part) :]
                keep_any = sets == 1 or not left[i]
                found[i] += [g for g in islice(fresh, len(part)) if keep_any or g.has_signal]
        mine = self._served.index(self.layout.data_rank)
        return Rollout(found[mine][: wanted[mine]], seconds)

    def _answered(self, key: int, numbers: Sequence[int], seconds: dict[str, float]) -> list[Group]:
        """A group of judged answers for each prompt; adds to `seconds`."""
        config, prompts = self.config, [self.prompts[number] for number in numbers]
        keys = [key << 32 | number for number in numbers]
        sampling = {"n": config.samples, "max_tokens": config.max_tokens, "seed": self.run.seed}
        started = time.monotonic()
        ids, completions, samples = sample_answers(
            self.engine, self.encoder, prompts, keys, **sampling
        )
        generated = time.monotonic()
        mine, n = share(range(len(numbers)), 1, *self._place), config.samples
        asked = [sample for i in mine for sample in samples[i * n : (i + 1) * n]]
        judged = iter(zip(asked, self.rubric(asked), strict=True))
        groups = []
        for i in mine:
            answers = [self._answer(prompts[i], one, *next(judged)) for one in completions[i]]
            rewards = [answer.reward for answer in answers]
            values = of_group(rewards, self.rule) if self.rule else [1.0] * n
            for one, value in zip(answers, values, strict=True):
                one.advantage = value
            groups.append(Group(numbers[i], prompts[i].mode, ids[i], answers))
        if self.together is not None:
            groups = joined(dist.gather(groups, self.together.get_group()), 1)
        seconds["generate_seconds"] += generated - started
        seconds["judge_seconds"] += time.monotonic() - generated
        return groups

    def _answer(self, prompt: Prompt, one: Completion, sample: Sample, judged: Judged) -> Answer:
        config, reward = self.config, judged.reward
        if sample.truncated and config.overlong == "mask":
            reward = None
        over = len(one.token_ids) - (config.max_tokens - config.overlong_buffer)
        if reward is not None and config.overlong_buffer and over > 0:
            reward -= min(1.0, over / config.overlong_buffer)
        unjudged = [f"{k}: {part.reason}" for k, part in judged.parts.items() if part.score is None]
        return Answer(
            one.token_ids,
            one.logprobs,
            one.finish_reason,
            sample.completion,
            reward,
            {name: outcome.score for name, outcome in judged.parts.items()},
            obedience(sample.completion, prompt.mode),
            version=one.version,
            unjudged="; ".join(unjudged),
        )

    def _rows(self, update: int) -> list[Batch]:
        """The rows of one update, as many in every process."""
        groups = self._groups[update :: self.config.updates_per_rollout]
        answers = [one for group in groups for one in group.answers if one.advantage is not None]
        trained = sum(one.weight(self.config.level) for one in answers)
        nonzero = sum(one.weight(self.config.level) for one in answers if one.advantage)
        sums = torch.tensor([trained, nonzero], dtype=dist.widest_float(), device=dist.device())
        trained, nonzero = self.layout.sum(sums).tolist()
        if not trained:
            raise self._nothing_counts()
        scale = 1.0
        if nonzero and not self.config.keep_all:
            # Answers of advantage 0 are not computed; their weight scales the others.
            scale = nonzero / trained
            groups = [
                replace(g, answers=[one for one in g.answers if one.advantage]) for g in groups
            ]
        return padded(rows(groups, self.row_length, self.config.level, scale), row([]))

    def _nothing_counts(self) -> FailureError:
        """Why a step has no answer to learn from; its answers are kept to be read."""
        keep_samples(self._groups, self.prompts, self._number, self.run)
        answers = [answer for group in self._groups for answer in group.answers]
        cut = sum(answer.truncated for answer in answers)
        if self.config.overlong == "mask" and cut:
            return FailureError(
                f"no answer of a step counts: {cut} of {len(answers)} are cut at max_tokens = "
                f'{self.config.max_tokens}, which overlong = "mask" leaves out; raise max_tokens, '
                'or take overlong = "keep"'
            )
        file = self.run.path / "samples" / f"{self._number:08}.jsonl"
        return FailureError(f"no answer of a step could be judged; the reasons are in {file}")

    @torch.no_grad()
    def _score_old(self, groups: Sequence[Group]) -> None:
        """Notes the trainer's own log-probs of the answers, before any update on them."""
        for parts in padded(pack(groups, self.row_length), []):
            batch = row(parts).to(self.module.device)
            hidden = self.module(batch.tokens, context_of(batch)).flatten(0, 1)
            found = token_log_probs(hidden, self.module.head, batch.labels.flatten()).tolist()
            for answer, here in spans(parts):
                answer.old = found[here]


class DaemonThread:
    """One thread that does calls in turn and lives as long as the process.

    The workers that judge are started in it, and the kernel ends them with the *thread* that
    started them (prctl(2), PR_SET_PDEATHSIG), so a thread for each call would not do. An executor
    of the standard library would hold up the exit.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, call: Callable[[], T]) -> Future[T]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        future: Future[T] = Future()
        self._calls.put((future, call))
        return future

    def _run(self) -> None:
        while True:
            future, call = self._calls.get()
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            del future, call  # frees the result while the thread is idle


def measured(groups: Sequence[Group], names: Sequence[str], layout: Layout) -> dict[str, float]:
    """Means over the answers of all processes.

    reward, and reward/NAME of each part: of what could be judged. no_signal: share of groups whose
    answers are all worth the same. length: in tokens. truncated, unjudged, obedience: shares.
    """
    answers = [answer for group in groups for answer in group.answers]
    values: dict[str, list[float | None]] = {"reward": [one.reward for one in answers]}
    values |= {f"reward/{name}": [one.parts[name] for one in answers] for name in names}
    if names:
        values["no_signal"] = [not group.has_signal for group in groups]
    values["length"] = [len(one.ids) for one in answers]
    values["truncated"] = [one.truncated for one in answers]
    if names:
        values["unjudged"] = [None in one.parts.values() for one in answers]
    values["obedience"] = [one.obedient for one in answers]
    known = [[one for one in column if one is not None] for column in values.values()]
    own = [(sum(column), len(column)) for column in known]
    sums = torch.tensor(own, dtype=dist.widest_float(), device=dist.device())
    totals = zip(values, layout.sum(sums).tolist(), strict=True)
    return {name: total / count for name, (total, count) in totals if count}


def keep_samples(
    groups: Sequence[Group], prompts: Sequence[Prompt], rollout: int, run: Run
) -> None:
    """Writes the best, the worst and some answers of the main process to `samples/`."""
    every = [(prompts[group.number], answer) for group in groups for answer in group.answers]
    judged = [(answer.reward, pair) for pair in every if (answer := pair[1]).reward is not None]
    ranked = [pair for _, pair in sorted(judged, key=lambda one: one[0])]
    chance = random.Random(f"{run.seed} {rollout}")
    chosen = {
        "best": ranked[::-1][:KEPT],
        "worst": ranked[:KEPT],
        "random": chance.sample(every, min(KEPT, len(every))),
        "unjudged": [pair for pair in every if pair[1].parts and pair[1].reward is None][:KEPT],
    }
    rows = [
        {
            "rollout": rollout,
            "kind": kind,
            "prompt": prompt.messages[-1]["content"],
            "mode": prompt.mode,
            "text": answer.text,
            "reward": answer.reward,
            "parts": answer.parts,
            "unjudged": answer.unjudged,
            "tokens": len(answer.ids),
            "finish_reason": answer.finish_reason,
        }
        for kind, pairs in chosen.items()
        for prompt, answer in pairs
    ]
    run.write_file(f"samples/{rollout:08}.jsonl", "".join(json.dumps(r) + "\n" for r in rows))


def share(items: Sequence[T], updates: int, rank: int, world: int) -> list[T]:
    """What one of `world` processes has of a rollout's items, which feed `updates` updates."""
    return [one for place, one in enumerate(items) if place // updates % world == rank]


def joined(shares: Sequence[Sequence[T]], updates: int) -> list[T]:
    """The inverse of `share`: a rollout's items from the shares of all processes, in order."""
    starts = range(0, max(map(len, shares), default=0), updates)
    return [one for i in starts for own in shares for one in own[i : i + updates]]


def padded(own: list[T], empty: T) -> list[T]:
    """This process's items and as many empty ones as another process has more."""
    most = int(dist.max(torch.tensor([len(own)], device=dist.device())))
    return own + [empty] * (most - len(own))
