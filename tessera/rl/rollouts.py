"""How the groups of a rollout are shared by processes, and kept on disk until no step needs them.

    prompt g of a rollout   update g mod U,  process ⌊g / U⌋ mod P

So the processes of an update have equally many, and which prompts feed it does not depend on how
many processes there are. A process's groups are a file that says by how many it was one of, so that
any number of processes can go on from the files of another.

Work that goes on while the trainer trains.

Reinforcement learning as a source of batches: ask, judge, compare, pack.

    batches(step)   where a rollout begins: the engine takes the trainer's weights, answers the
                    prompts of this step `samples` times, and each answer is judged by the rubric;
                    every rollout feeds `updates_per_rollout` optimizer steps

A completion follows from (seed, rollout, prompt, sample) and the weights, so a run killed within a
rollout makes it again; rollouts that feed several steps are kept on disk until no resume state
needs them. Processes share the prompts; each has its own engine on the whole weights.

With `staleness = 1` the engine answers the next rollout while the trainer learns from this one:
what it learns from was said by the weights of one rollout ago. Which weights is a rule and not a
race, and a resume state takes the rollout in flight along, so a stopped run is still the same run.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.distributed.tensor import DTensor

from tessera import dist
from tessera.data.batch import Batch
from tessera.data.chat import ChatEncoder
from tessera.data.switch import DETAILED, obeys
from tessera.generate.engine import Completion, Engine, SamplingParams
from tessera.model.context import Context
from tessera.model.transformer import Transformer, holding
from tessera.rl import monitors
from tessera.rl.advantages import Advantages, of_group
from tessera.rl.curriculum import CurriculumConfig, Order, order
from tessera.rl.experience import Answer, Group, Level, pack, row, rows, spans, weight_of
from tessera.rl.prompts import Prompt, judged_samples
from tessera.rl.rewards import Reward, Sample
from tessera.rl.rubric import Judged, Rubric
from tessera.runs.files import FailureError, atomic_write
from tessera.runs.run import Run
from tessera.train.losses import token_log_probs
from tessera.train.parallel import Layout
from tessera.vllm.config import EngineChoice

T = TypeVar("T")


def share(items: Sequence[T], updates: int, rank: int, world: int) -> list[T]:
    """What one of `world` processes has of a rollout's items, which feed `updates` updates."""
    return [one for place, one in enumerate(items) if place // updates % world == rank]


def joined(shares: Sequence[Sequence[T]], updates: int) -> list[T]:
    """The inverse of `share`: a rollout's items from the shares of all processes, in order."""
    longest = max(map(len, shares), default=0)
    return [
        one
        for start in range(0, longest, updates)
        for own in shares
        for one in own[start : start + updates]
    ]


class Shares:
    """The files of a run's rollouts, in `directory`."""

    def __init__(self, directory: Path, updates: int, layout: Layout) -> None:
        self.directory, self.updates, self.layout = directory, updates, layout

    def own(self, items: Sequence[T]) -> list[T]:
        """This process's part of what a rollout holds."""
        return share(items, self.updates, self.layout.data_rank, self.layout.data_world)

    def keep(self, rollout: int, groups: Sequence[Group]) -> None:
        """Writes this process's groups, whole or not at all."""
        self.directory.mkdir(exist_ok=True)
        atomic_write(self._own(rollout), "".join(group.to_json() + "\n" for group in groups))

    def read(self, rollout: int) -> list[Group]:
        """This process's groups."""
        assert self._own(rollout).is_file(), f"rollout {rollout} is gone, and so are its weights"
        return _read(self._own(rollout))

    def take_over(self, rollout: int, world: int) -> None:
        """Keeps this process's part of what `world` processes kept, if that is another number."""
        files = [self._path(rollout, rank, world) for rank in range(world)]
        if world != self.layout.data_world and all(file.is_file() for file in files):
            self.keep(rollout, self.own(joined([_read(file) for file in files], self.updates)))

    def forget(self, before: int) -> None:
        """Removes what was kept of the rollouts before one, by however many processes."""
        for file in self.directory.glob("*-*-of-*.jsonl"):
            rollout, rank = map(int, file.name.split("-")[:2])
            if rollout < before and rank % self.layout.data_world == self.layout.data_rank:
                file.unlink(missing_ok=True)

    def _own(self, rollout: int) -> Path:
        return self._path(rollout, self.layout.data_rank, self.layout.data_world)

    def _path(self, rollout: int, rank: int, world: int) -> Path:
        return self.directory / f"{rollout:08}-{rank}-of-{world}.jsonl"


def _read(file: Path) -> list[Group]:
    lines = file.read_text(encoding="utf-8").split("\n")
    return [Group.from_json(line) for line in lines if line]


class Background:
    """One thread that does calls in turn, from the first on and as long as the process lives.

    It must not end before: the kernel ends a process that dies with its parent when the *thread*
    that started it ends (prctl(2), PR_SET_PDEATHSIG), and the workers that judge are such. As a
    daemon it holds no exit up.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """The result to be; what the call raises is raised where it is asked for."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        future: Future[Any] = Future()
        self._calls.put((future, call))
        return future

    def _run(self) -> None:
        while True:
            future, call = self._calls.get()
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            del future, call  # an idle thread holds nobody's memory


class RolloutConfig(EngineChoice):
    """How prompts are answered and judged.

    prompts_per_rollout, samples: the report has 72 and 16. updates_per_rollout: optimizer steps.
    switch: how the mode is said, as in the stage that made the prompts.
    overlong: "mask" leaves answers out that were cut at max_tokens; else they are judged as they
    stand. overlong_buffer: over so many tokens before max_tokens the reward falls to one less
    (DAPO, arXiv 2503.14476, §3.4). dynamic_sampling: how often more prompts are asked where groups
    have no signal, all answers being worth the same (DAPO §3.2).
    """

    prompts_per_rollout: int = Field(default=64, ge=1)
    samples: int = Field(default=16, ge=1)
    updates_per_rollout: int = Field(default=1, ge=1)
    max_tokens: int = Field(default=1024, ge=1)
    rewards: tuple[Reward, ...] = ()
    curriculum: CurriculumConfig = CurriculumConfig()
    switch: str = DETAILED
    level: Level = "token"
    overlong: Literal["keep", "mask"] = "keep"
    overlong_buffer: int = Field(default=0, ge=0)
    dynamic_sampling: int = Field(default=0, ge=0)
    staleness: Literal[0, 1] = 0
    engine_batch: int = Field(default=256, ge=1)
    workers: int = Field(default=2, ge=1)
    samples_every: int = Field(default=10, ge=1)  # rollouts between samples that are kept

    @model_validator(mode="after")
    def _enough(self) -> RolloutConfig:
        if self.samples < 2:
            raise ValueError("samples must be 2 or more: an answer is compared with its group")
        if self.updates_per_rollout > self.prompts_per_rollout:
            raise ValueError(
                "updates_per_rollout exceeds prompts_per_rollout: a step needs prompts"
            )
        if self.overlong_buffer > self.max_tokens:
            raise ValueError(
                f"overlong_buffer = {self.overlong_buffer} exceeds max_tokens = {self.max_tokens}: "
                "the shortest answer would lose reward; give a part of max_tokens"
            )
        return self


@dataclass(slots=True)
class Sampled:
    """The groups of a rollout, and seconds by what they went on."""

    groups: list[Group]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """Of the weights that answered: the rollout that they were taken at."""
        return min((answer.version for group in self.groups for answer in group.answers), default=0)


class Rollouts:
    """A `Source` of what the policy itself writes.

    rule: rewards of a group -> advantages. keep_all: rows also hold what no advantage pulls at,
    for losses that look at it (a KL to the reference).
    """

    def __init__(
        self,
        module: Transformer,
        engine: Engine,
        encoder: ChatEncoder,
        prompts: Sequence[Prompt],
        config: RolloutConfig,
        *,
        rule: Advantages,
        steps: int,
        row_length: int,
        layout: Layout,
        run: Run,
        rubric: Rubric,
        keep_all: bool = False,
    ) -> None:
        self.module, self.engine, self.encoder = module, engine, encoder
        self.prompts, self.config, self.rule = prompts, config, rule
        self.row_length, self.layout, self.run, self.rubric = row_length, layout, run, rubric
        self.keep_all = keep_all
        self._rounds = -(-steps // config.updates_per_rollout)
        self.order = self._order(0)
        self._shares = Shares(run.path / "rollouts", config.updates_per_rollout, layout)
        self._rollout = -1
        self._groups: list[Group] = []
        self._updates: list[list[Batch]] = []
        self._metrics: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._saved: list[int] = []
        self._background = Background()
        self._flight: Future[Sampled] | None = None  # of the next rollout
        self._landed = -1  # a next rollout that is on disk, for a resume state took it along

    def _order(self, number: int) -> Order:
        """Which prompts each rollout asks: the first order, or another to fall back on."""
        asked = self.config.prompts_per_rollout * (1 + self.config.dynamic_sampling)
        rates = [prompt.pass_rate for prompt in self.prompts]
        seed = self.run.seed + (number << 32)
        return order(rates, self._rounds, asked, self.config.curriculum, seed)

    def batches(self, step: int) -> list[Batch]:
        """This process's rows of one optimizer step; see `Source`."""
        rollout, update = divmod(step, self.config.updates_per_rollout)
        if update or rollout != self._rollout:
            self._metrics, self._seconds = {}, {}
        if rollout != self._rollout:
            if update:
                self._groups = self._shares.read(rollout)
            else:
                self._groups = self._received(rollout, self._sampled(rollout))
            self._rollout = rollout
            self._updates = [self._rows(u) for u in range(self.config.updates_per_rollout)]
        return self._updates[update]

    def metrics(self) -> dict[str, float]:
        """What the rollout of the last `batches` was like; empty where that began none."""
        return self._metrics

    def timings(self) -> dict[str, float]:
        """Seconds of generating and judging for the last `batches`."""
        return self._seconds

    def state_dict(self) -> dict[str, Any]:
        """Rollouts follow from the step; what feeds several steps, or is in flight, is on disk."""
        self._saved = [*self._saved[-1:], self._rollout]
        self._shares.forget(self._saved[0])
        if self._flight is not None:
            self._landed = self._rollout + 1
            self._shares.keep(self._landed, self._flight.result().groups)
        world = self.layout.data_world
        return {"rollout": self._rollout, "landed": self._landed, "world": world}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved, self._landed = [state["rollout"]], state["landed"]
        for rollout in (state["rollout"], state["landed"]):
            self._shares.take_over(rollout, state["world"])

    def _sampled(self, rollout: int) -> Sampled:
        """What was answered for a rollout, now or ahead; sends the engine on to the next."""
        begun, flight, self._flight = time.monotonic(), self._flight, None
        ahead = self.config.staleness and rollout + 1 < len(self.order.batches)
        fresh = flight is None and rollout != self._landed
        found = flight.result() if flight else Sampled([] if fresh else self._shares.read(rollout))
        if flight:
            found.seconds["wait_seconds"] = time.monotonic() - begun
        if fresh or ahead:
            self.engine.sync(whole(self.module), rollout)
        if fresh:
            found = self._sample(rollout)
        self._complete(rollout, found)
        if ahead:
            self._flight = self._background.submit(functools.partial(self._sample, rollout + 1))
        elif self.module.device.type == "cuda":
            self.engine.sleep()
        return found

    def _complete(self, rollout: int, found: Sampled) -> None:
        """Adds what a step cannot do without; every process comes here, and no flight is on."""

    def _received(self, rollout: int, found: Sampled) -> list[Group]:
        """Measures what was sampled, and keeps what later steps and readers need of it."""
        groups, self._seconds = found.groups, found.seconds
        self._metrics = monitors.measured(groups, self.rubric.names, self.layout)
        if self.config.staleness:
            self._metrics["staleness"] = float(rollout - found.version)
        if self.config.updates_per_rollout > 1:
            self._remember(groups)
            self._shares.keep(rollout, groups)
        if rollout % self.config.samples_every == 0:
            monitors.keep_samples(groups, self.prompts, rollout, self.run)
        return groups

    def _sample(self, rollout: int, further: int = 0) -> Sampled:
        """Answers to this process's share of the prompts, judged and compared.

        further: how often it was asked before; other prompts come then, or others' answers to them.
        It may be called from another thread, so it talks to no other process.
        """
        drawn = self._order(further) if further else self.order
        own = self._shares.own(drawn.batches[rollout].tolist())
        wanted = -(-len(own) // (1 + self.config.dynamic_sampling))
        found = Sampled([])
        while own and len(found.groups) < wanted:
            part, own = own[:wanted], own[wanted:]
            fresh = self._answered(further << 24 | rollout, part, found.seconds)
            enough = not (own and self.config.dynamic_sampling)
            found.groups += [g for g in fresh if enough or has_signal(g)]
        found.groups = found.groups[:wanted]
        return found

    def _answered(
        self, rollout: int, numbers: Sequence[int], seconds: dict[str, float]
    ) -> list[Group]:
        """A group for each prompt, its answers judged and compared; adds to `seconds`."""
        prompts = [self.prompts[number] for number in numbers]
        ids = [self.encoder.prompt(one.messages, one.mode) for one in prompts]
        begun = time.monotonic()
        completions = self._generate(rollout, numbers, ids)
        generated = time.monotonic()
        answers = self._judge(prompts, ids, completions)
        for name, spent in (
            ("generate_seconds", generated - begun),
            ("judge_seconds", time.monotonic() - generated),
        ):
            seconds[name] = seconds.get(name, 0.0) + spent
        groups = [
            Group(number, prompt.mode, own, of_prompt)
            for number, prompt, own, of_prompt in zip(numbers, prompts, ids, answers, strict=True)
        ]
        for group in groups:
            values = of_group([answer.reward for answer in group.answers], self.rule)
            for answer, value in zip(group.answers, values, strict=True):
                answer.advantage = value
        return groups

    def _generate(
        self, rollout: int, numbers: Sequence[int], ids: list[list[int]]
    ) -> list[list[Completion]]:
        """`samples` completions of each prompt, at temperature 1: from the policy itself."""
        params = SamplingParams(
            max_tokens=self.config.max_tokens,
            n=self.config.samples,
            stop_token_ids=self.encoder.tokenizer.eos_ids,
            seed=self.run.seed,
        )
        keys = [(rollout << 32) | number for number in numbers]
        return self.engine.generate(ids, params, keys=keys)

    def _judge(
        self,
        prompts: Sequence[Prompt],
        ids: Sequence[Sequence[int]],
        completions: Sequence[Sequence[Completion]],
    ) -> list[list[Answer]]:
        """The answers to each prompt with what they are worth."""
        samples = judged_samples(self.encoder.tokenizer, prompts, ids, completions)
        judged = iter(zip(samples, self.rubric(samples), strict=True))
        return [
            [self._answer(prompt, one, *next(judged)) for one in of_prompt]
            for prompt, of_prompt in zip(prompts, completions, strict=True)
        ]

    def _answer(self, prompt: Prompt, one: Completion, sample: Sample, judged: Judged) -> Answer:
        return Answer(
            one.token_ids,
            one.logprobs,
            one.finish_reason,
            sample.completion,
            self._reward(judged, len(one.token_ids), sample.truncated),
            {name: outcome.score for name, outcome in judged.parts.items()},
            obeys(sample.completion, prompt.mode),
            version=one.version,
            unjudged="; ".join(
                f"{name}: {outcome.reason}"
                for name, outcome in judged.parts.items()
                if outcome.score is None
            ),
        )

    def _reward(self, judged: Judged, length: int, truncated: bool) -> float | None:
        if judged.reward is None or (truncated and self.config.overlong == "mask"):
            return None
        buffer = self.config.overlong_buffer
        over = length - (self.config.max_tokens - buffer)
        return judged.reward - (min(1.0, over / buffer) if buffer and over > 0 else 0.0)

    def _rows(self, update: int) -> list[Batch]:
        """The rows of one update, as many in every process."""
        groups = self._groups[update :: self.config.updates_per_rollout]
        counted, pulled = 0.0, 0.0
        for answer in (one for group in groups for one in group.answers):
            if answer.advantage is not None:
                weight = weight_of(answer, self.config.level)
                counted += weight
                pulled += weight if answer.advantage else 0.0
        sums = torch.tensor([counted, pulled], dtype=torch.float64, device=dist.device())
        counted, pulled = self.layout.sum(sums).tolist()
        if not counted:
            raise self._nothing_counts()
        # What nothing pulls at is not computed, and its weight is not lost: it scales the rest.
        skip = not self.keep_all and pulled > 0
        if skip:
            groups = [_pulled(group) for group in groups]
        scale = pulled / counted if skip else 1.0
        made = rows(groups, self.row_length, self.config.level, scale)
        return made + [row([]) for _ in range(self._most(len(made)) - len(made))]

    def _nothing_counts(self) -> FailureError:
        """Why a step has no answer to learn from; its answers are kept to be read."""
        monitors.keep_samples(self._groups, self.prompts, self._rollout, self.run)
        answers = [answer for group in self._groups for answer in group.answers]
        cut = sum(answer.truncated for answer in answers)
        if self.config.overlong == "mask" and cut:
            return FailureError(
                f"no answer of a step counts: {cut} of {len(answers)} are cut at max_tokens = "
                f'{self.config.max_tokens}, which overlong = "mask" leaves out; raise max_tokens, '
                'or take overlong = "keep"'
            )
        file = self.run.path / "samples" / f"{self._rollout:08}.jsonl"
        return FailureError(f"no answer of a step could be judged; the reasons are in {file}")

    def _most(self, count: int) -> int:
        """The most rows that any process has."""
        if dist.world() == 1:
            return count
        return int(dist.max(torch.tensor([count], device=dist.device())))

    @torch.no_grad()
    def _remember(self, groups: Sequence[Group]) -> None:
        """Notes the trainer's own log-probs of the answers, before any update on them."""
        packed = pack(groups, self.row_length)
        packed += [[] for _ in range(self._most(len(packed)) - len(packed))]
        for parts in packed:
            batch = row(parts).to(self.module.device)
            context = Context(batch.positions, batch.segments, prefix=batch.prefix)
            hidden = self.module(batch.tokens, context).flatten(0, 1)
            found = token_log_probs(hidden, self.module.head, batch.labels.flatten()).tolist()
            for answer, here in spans(parts):
                answer.old = found[here]


def has_signal(group: Group) -> bool:
    """Whether any answer of a group is worth more than another."""
    return any(answer.advantage for answer in group.answers)


def _pulled(group: Group) -> Group:
    chosen = [answer for answer in group.answers if answer.advantage]
    return Group(group.number, group.mode, group.ids, chosen)


def whole(module: Transformer) -> Transformer:
    """The module, or where it is spread over processes a whole copy of it for this one."""
    if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        return module
    state = module.state_dict()

    def tensor(key: str, _: torch.Size) -> Tensor:
        one = state[key]
        return one.full_tensor() if isinstance(one, DTensor) else one

    return holding(module.config, tensor)
