"""This machine as a cluster whose seconds are measured: short pieces of the stages' own work.

    train      one microbatch through one subblock, or the head, by the Trainer     a token
    forward    the same without a gradient                                          a token
    units      one microbatch of all that a layer of a library trains               a layer
    engine     a prefill and some decode steps of a few layers                      a token, a step

A stage is the sum of its parts, scaled by operations where a word is not the parent's own. Each
piece is measured once and kept in a file, by machine, torch, threads, arithmetic and shapes.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tessera
from tessera import dist
from tessera.data.batch import Batch
from tessera.data.tokenizer import load_tokenizer
from tessera.devices import CPU, Device
from tessera.generate.engine import SamplingParams
from tessera.generate.torch_engine import TorchEngine
from tessera.model.config import BlockConfig, ModelConfig, NoOp, Variant, parse_kind
from tessera.model.cpu import multiply
from tessera.model.layers import Subblock
from tessera.model.placement import DTYPES, ParallelConfig
from tessera.model.source import load_config
from tessera.model.transformer import Block, Transformer
from tessera.objectives.kd import KD, KDConfig
from tessera.objectives.lm import LM
from tessera.planning.stages import Line, Planner, parent_of
from tessera.planning.training import Cluster, Job, Rates, StepTime
from tessera.progress import Progress
from tessera.puzzle.bld import BLD, LocalConfig
from tessera.puzzle.cost_table import Scenario
from tessera.puzzle.library import BlockLibrary
from tessera.puzzle.ranges import units_cost
from tessera.puzzle.score import Target
from tessera.puzzle.space import Unit
from tessera.puzzle.surgery import ParentStatistics, collect_statistics
from tessera.runs.files import WriteError, atomic_write, fingerprint
from tessera.runs.plan import Stage, with_defaults
from tessera.runs.recipe import Recipe, RecipeError
from tessera.runs.run import Run, begin_peak, is_done, release_memory, resident_memory
from tessera.train.engine import Objective, Trainer, context_of
from tessera.train.flops import Work, subblock_cost
from tessera.train.optim import TrainConfig

FEW = 64  # of a vocabulary whose head costs nothing beside a layer
ROWS = 1024  # tokens through a head at a time, and of a prefill
DEPTH = 4  # layers of an engine that is timed
NEW = 6  # tokens that each row of it decodes
UNKNOWN = [1e-3, 2e-3]  # what a piece stands for until it is measured
NONE = BlockConfig(NoOp(), NoOp())
HEAD = "head"
WARM = 1e8  # bytes that libraries keep once they have computed
COMPUTING = ("model", "train", "objectives", "generate", "puzzle")


class Measured(Rates):
    """Seconds of work on this machine, of models with the parent's shapes.

    What is asked for and not known yet is noted in `missing`; `measure` fills it in.
    """

    def __init__(self, parent: ModelConfig, file: Path | None = None) -> None:
        self.parent, self.file = parent, file or cache_file()
        self.missing: dict[str, Callable[[], list[float]]] = {}
        self.resident = _resident()
        self.words: dict[str, Variant] = {}  # the largest of each kind
        for kind, variant in (one for block in parent.blocks for one in block):
            size = parent.subblock_params(kind, variant)
            if size > parent.subblock_params(kind, self.words.get(kind, NoOp())):
                self.words[kind] = variant
        shape = [str(replace(parent, blocks=())), *map(str, self.words.values())]
        self.about = [*_machine(), *shape]
        self.kept: dict[str, list[float]] = {}
        with suppress(OSError, ValueError):
            self.kept = json.loads(self.file.read_text())

    def _of(self, what: str, measure: Callable[[], list[float]], *about: Any) -> list[float]:
        name = json.dumps([what, *about, *self.about], default=str)
        if name not in self.kept:
            self.missing[name] = measure
        return self.kept.get(name, UNKNOWN)

    def measure(self, quiet: bool = False) -> None:
        """Measures what is missing, and keeps it in the file unless the machine is busy."""
        busy = os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1)
        with Progress("measuring this machine", len(self.missing), "pieces", quiet=quiet) as bar:
            for name, piece in self.missing.items():
                self.kept[name] = piece()
                if busy:
                    bar.advance()
                    continue
                with suppress(OSError, WriteError):  # it is measured again the next time
                    self.file.parent.mkdir(parents=True, exist_ok=True)
                    atomic_write(self.file, json.dumps(self.kept, indent=0))
                bar.advance()
        self.missing.clear()

    # What the planner asks

    def step(self, job: Job) -> StepTime:
        """One optimizer step."""
        train, work = job.train, job.work()
        rounds = math.ceil(train.tokens_per_step / train.microbatch_tokens)
        peak = self.peak(train.dtype)
        if job.units:
            each, update = self._units(job)
            return StepTime(rounds * each, 0, 0, 0, 0, update, job.flops(), peak)
        assert job.student is not None
        student, teacher = job.student, job.teacher
        kd = teacher is not None and job.experience is None
        seconds = work.tokens * self._train(HEAD, train, kd, job.states)
        for kind, own in self.words.items():
            ways = _operations(student, kind, work)
            whole = 3.0
            if kd:
                assert teacher is not None
                ways, whole = ways * 3 + _operations(teacher, kind, work), 4.0
                ways /= 3
            share = 3 * ways / (whole * subblock_cost(self.parent, own).forward(work))
            seconds += work.tokens * self._train(kind, train, kd, job.states) * share
        if teacher is not None and not kd:  # a reference's log-probs
            length = min(train.sequence_length, train.microbatch_tokens)
            layers, head = self.forward(teacher, train.microbatch_tokens, length, train.dtype)
            seconds += work.tokens / train.microbatch_tokens * (sum(layers) + head)
        each, update = self._overhead(train)
        size = student.num_params()
        return StepTime(
            seconds + rounds * each * size, 0, 0, 0, 0, update * size, job.flops(), peak
        )

    def forward(
        self, model: ModelConfig, tokens: int, length: int, dtype: str
    ) -> tuple[list[float], float]:
        """Seconds of each layer and of the head, of a microbatch."""
        work, length = _work(tokens, length, model), min(length, tokens)
        rows = min(tokens, ROWS * 4)

        def alone(kind: str, variant: Variant) -> float:
            if kind not in self.words:
                return 0.0
            best = self._of("forward", partial(self._forward, kind, rows, length, dtype),
                            kind, rows, length, dtype)  # fmt: skip
            own = subblock_cost(self.parent, self.words[kind]).forward(work)
            return best[0] * tokens / rows * subblock_cost(model, variant).forward(work) / own

        few, head = min(tokens, 2 * ROWS), self._head(tokens, length, dtype)
        layers = [sum(alone(kind, variant) for kind, variant in block) for block in model.blocks]
        return layers, head[0] * tokens / few

    def head_memory(self, tokens: int, length: int, dtype: str) -> float:
        """Bytes that the head takes without a gradient, copies that libraries make included."""
        return self._head(tokens, length, dtype)[1]

    def _head(self, tokens: int, length: int, dtype: str) -> list[float]:
        about = HEAD, min(tokens, 2 * ROWS), min(length, tokens), dtype
        return self._of("head", partial(self._forward, *about), *about)

    def calibration(self, config: LocalConfig, importance: str, layers: int) -> float:
        """Seconds of what a library's training knows of the parent's layers before."""
        train = config.train
        rows = min(config.calibration_tokens, train.microbatch_tokens)
        length = min(train.sequence_length, rows)

        def of(kind: str) -> float:
            piece = partial(self._calibration, kind, rows, length, train.dtype)
            return self._of("calibration", piece, kind, rows, length, train.dtype)[0]

        every, whole = len(self.parent.blocks), config.calibration_tokens / rows
        others = (every - layers) * of("independent") if layers < every else 0.0
        return whole * (layers * of(importance) + others)

    def generation(self, model: ModelConfig, scenario: Scenario, dtype: str) -> tuple[float, float]:
        """Seconds of a prefill and of one decode step."""
        context = 64 * math.ceil((scenario.prompt + scenario.new / 2) / 64)
        context = max(1, min(context, model.max_position_embeddings - NEW - 1))
        about = scenario.batch, min(scenario.prompt, context), context, dtype

        def of(kind: str) -> list[float]:
            return self._of("engine", partial(self._engine, kind, *about), kind, *about)

        whole, nothing = of(HEAD), of("")
        found = [whole[0], whole[1]]
        for kind, own in self.words.items():
            cost = subblock_cost(self.parent, own).token
            share = sum(
                subblock_cost(model, variant).token / cost
                for block in model.blocks
                for k, variant in block
                if k == kind
            )
            for i, (with_, without) in enumerate(zip(of(kind), nothing, strict=True)):
                found[i] += share * max(0.0, with_ - without) / DEPTH
        return scenario.batch * scenario.prompt * found[0], found[1]

    def copied(self) -> float:
        """Bytes a second, written and read."""
        return self._of("copy", self._copy)[0]

    def tokenised(self, tokenizer: Path) -> float:
        """Bytes of text a second."""
        return self._of("tokenise", partial(_tokenise, tokenizer), str(tokenizer.resolve()))[0]

    def peak(self, dtype: str) -> float:
        """Operations a second of a product of the model's own shape."""
        return self._of("product", partial(self._product, dtype), dtype)[0]

    # Trainings, in parts

    def _overhead(self, train: TrainConfig) -> tuple[float, float]:
        """Seconds a parameter: of a microbatch (casting, adding gradients up), of an update."""
        one, two = self._of("update", partial(self._update, train), train.dtype, train.optimizer)
        size = replace(self.parent, blocks=()).num_params()
        each = max(0.0, two - one)
        return each / size, max(0.0, one - each) / size

    def _train(self, kind: str, train: TrainConfig, kd: bool, states: bool) -> float:
        """Seconds a token, without the overhead."""
        rows = min(train.microbatch_tokens, ROWS if kind == HEAD else 4 * ROWS)
        length = min(train.sequence_length, rows)
        again = train.parallel.gradient_checkpointing
        about = kind, rows, length, train.dtype, kd, states, again
        seconds = self._of("train", partial(self._training, train, *about), *about)[0]
        each, update = self._overhead(train)
        size = self._model(kind).num_params()
        return max(0.05 * seconds, seconds - (each + update) * size) / rows

    def _units(self, job: Job) -> tuple[float, float]:
        """Seconds of one pass of a microbatch, and of the updates, a mean over the passes."""
        layers: dict[int, list[Unit]] = defaultdict(list)
        for unit in job.units:
            layers[unit.layer].append(unit)
        first = max(layers.values(), key=len)
        train, parent = job.train, self.parent
        rows = min(train.microbatch_tokens, 4 * ROWS)
        length = min(train.sequence_length, rows)
        words = [unit[1:] for unit in first]
        about = words, rows, length, train.dtype, train.optimizer
        one, two = self._of("units", partial(self._library, train, words, rows, length), *about)
        each, work = max(0.5 * one, two - one), _work(rows, length, parent)
        times = units_cost(parent, job.units).forward(work)
        times /= units_cost(parent, first).forward(work) * job.passes
        walked, _ = self.forward(parent, train.microbatch_tokens, length, train.dtype)
        # All before the last of a pass run; those that train are counted with their units.
        depths = sum(
            sorted(layers)[-1 - i * len(layers) // job.passes] + 1 for i in range(job.passes)
        )
        bare = max(0.0, depths - len(layers)) / job.passes
        whole = train.microbatch_tokens / rows
        return times * whole * each + bare * walked[0], times * max(0.0, one - each)

    # The pieces

    def _model(self, kind: str, times: int = 1) -> ModelConfig:
        """Some layers of one subblock and hardly a vocabulary, or the vocabulary alone."""
        if kind == HEAD:
            return replace(self.parent, blocks=(NONE,))
        block = replace(NONE, **{kind: self.words[kind]}) if kind else NONE
        return replace(self.parent, vocab_size=FEW, blocks=(block,) * times)

    def _trained(self, config: ModelConfig, train: TrainConfig) -> Transformer:
        module = Transformer(config).init_weights(0).to(dist.device())
        return _alone(train).placement.transformer(module)

    def _frozen(self, config: ModelConfig, dtype: str) -> Transformer:
        module = Transformer(config).init_weights(0).to(dist.device(), DTYPES[dtype])
        return module.requires_grad_(False).eval()

    def _training(
        self, train: TrainConfig, kind: str, rows: int, length: int, *about: Any
    ) -> list[float]:
        _, kd, states, _ = about
        config = self._model(kind)
        module = self._trained(config, train)
        objective: Objective = LM()
        if kd:
            own = KDConfig(train=train, cosine=float(states))
            objective = KD(self._frozen(config, train.dtype), own)
        with _trainer(module, objective, _alone(train)) as step:
            return [_least(lambda: step([_batch(config, rows, length)]))]

    def _update(self, train: TrainConfig) -> list[float]:
        config = self._model(HEAD)
        few = _batch(config, 16, 16)
        module = self._trained(config, train)
        with _trainer(module, LM(), _alone(train)) as step:
            return [_least(lambda: step([few])), _least(lambda: step([few, few]))]

    def _library(
        self, train: TrainConfig, words: Sequence[tuple[str, str]], rows: int, length: int
    ) -> list[float]:
        whole = BlockConfig(*(self.words.get(kind, NoOp()) for kind in ("attention", "ffn")))  # type: ignore[arg-type]
        config = replace(self.parent, vocab_size=FEW, blocks=(whole,))
        library = BlockLibrary()
        for kind, word in words:
            library[str(Unit(0, kind, word))] = _unit(config, kind, word).to(dist.device())
        _alone(train).placement.units(library.values())
        parent = self._frozen(config, train.dtype)
        known = ParentStatistics([None], {}, [1.0], [0.0])
        batch = _batch(config, rows, length)
        with _trainer(library, BLD(parent, known), _alone(train)) as step:
            return [_least(lambda: step([batch])), _least(lambda: step([batch, batch]), 1)]

    @torch.no_grad()
    def _forward(self, kind: str, rows: int, length: int, dtype: str) -> list[float]:
        config = self._model(kind)
        module, batch = self._frozen(config, dtype), _batch(config, rows, length)
        if kind == HEAD:
            release_memory()
            begin_peak()
            before = resident_memory()
            target, x = Target.of(module, batch), module.embed_tokens(batch.tokens)
            seconds = _least(lambda: target.measure(module, x))
            return [seconds, float(max(0, resident_memory(peak=True) - before))]
        return [_least(lambda: module(batch.tokens, context_of(batch)))]

    def _calibration(self, importance: Any, rows: int, length: int, dtype: str) -> list[float]:
        whole = BlockConfig(*(self.words.get(kind, NoOp()) for kind in ("attention", "ffn")))  # type: ignore[arg-type]
        config = replace(self.parent, vocab_size=FEW, blocks=(whole,))
        module, batch = self._frozen(config, dtype), _batch(config, rows, length)
        return [_least(lambda: collect_statistics(module, [batch], importance), 1)]

    def _engine(self, kind: str, batch: int, prompt: int, context: int, dtype: str) -> list[float]:
        config = self._model(kind, DEPTH)
        engine = TorchEngine(self._frozen(config, dtype), max_batch_size=batch)
        prompts = [[1] * prompt] * min(batch, max(1, ROWS // prompt))
        many = SamplingParams(max_tokens=NEW, n=batch, temperature=0.0)

        def read() -> float:
            engine.reset_stats()
            engine.generate(prompts, SamplingParams(max_tokens=1, temperature=0.0))
            return engine.stats.prefill_seconds / (len(prompts) * prompt)

        def decode() -> float:
            engine.reset_stats()
            engine.generate([[1] * context], many)
            return engine.stats.decode_seconds / max(1, engine.stats.decode_steps)

        found = [min(read() for _ in range(3)), min(decode() for _ in range(2))]
        engine.close()
        return found

    def _product(self, dtype: str) -> list[float]:
        hidden, rows = self.parent.hidden_size, 4 * ROWS
        ffn = self.words.get("ffn")
        wide = getattr(ffn, "intermediate_size", 4 * hidden)
        options = {"dtype": DTYPES[dtype], "device": dist.device()}
        x, weight = torch.randn(rows, hidden, **options), torch.randn(wide, hidden, **options)
        return [2 * rows * hidden * wide / _least(lambda: multiply(x, weight), 5)]

    def _copy(self) -> list[float]:
        data = os.urandom(2**20) * 64
        with tempfile.TemporaryDirectory(
            dir=self.file.parent if self.file.parent.exists() else None
        ) as place:
            begun = time.perf_counter()
            atomic_write(Path(place) / "data", data)
            (Path(place) / "data").read_bytes()
            return [len(data) / (time.perf_counter() - begun)]


def estimate(
    recipe: Recipe,
    stages: Mapping[str, Stage],
    runs: Path,
    *,
    smallest: float = 0.0,
    quiet: bool = False,
) -> list[Line]:
    """A line for every stage, of this machine as it is. smallest: parameters of a parent for which
    what is not known yet is measured.

    Raises RecipeError where the parent is not here, and where something is not known.
    """
    recipe, home = with_defaults(recipe, stages), runs / recipe.name
    if dist.world() > 1:
        raise RecipeError("times are measured in one process; `tessera plan` tells those of more")
    rates = Measured(_parent(recipe, home))
    planner = Planner(recipe, stages, this_machine(rates), rates.parent, None, home)
    lines = planner.lines()
    while rates.missing:
        if rates.parent.num_params() < smallest:
            raise RecipeError("`tessera check` has not measured this machine for it")
        rates.measure(quiet)
        lines = planner.lines()
    return lines


def _parent(recipe: Recipe, home: Path) -> ModelConfig:
    """Of its run, of its checkpoint, or of the first model that a stage names."""
    for spec in recipe.stages:
        if spec.stage == "parent":
            done = is_done(home / spec.name)
            return load_config(home / spec.name) if done else parent_of(recipe, None)
    given = (
        spec.table.get(need) for spec in recipe.stages for need in ("parent", "teacher", "model")
    )
    path = next((one for one in given if isinstance(one, str) and Path(one).exists()), None)
    return parent_of(recipe, None) if path is None else load_config(path)


def this_machine(rates: Measured) -> Cluster:
    """The devices of this job, one a process, with what was measured of them."""
    kind = dist.device().type
    memory = dist.device_memory() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    peak = {"fp32": 1.0, "bf16": 1.0}  # `rates` knows
    device = Device(CPU if kind == dist.HOST else kind, float(memory), 1.0, peak, math.inf)
    return Cluster(1, dist.world(), device, rates=rates)


def _alone(train: TrainConfig) -> TrainConfig:
    """In one process, where nothing is divided."""
    own = train.parallel
    parallel = ParallelConfig(
        gradient_checkpointing=own.gradient_checkpointing, offload=own.offload
    )
    return train.model_copy(update={"parallel": parallel, "report_to": (), "state": None})


def cache_file() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "tessera" / "rates.json"


@functools.cache
def _resident() -> float:
    """Of this process before its first stage: what a later one finds more is mostly free to use."""
    return resident_memory() + WARM


def _machine() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    device = dist.device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = [_code(), torch.__version__]
    threads = str(torch.get_num_threads())
    return [platform.node(), platform.machine(), capability, name, threads, *versions]


def _code() -> str:
    """Of the packages that compute: another version of them has other rates."""
    home = Path(tessera.__file__).parent
    files = (path for name in COMPUTING for path in sorted((home / name).rglob("*.py")))
    return fingerprint([file.read_text(encoding="utf-8") for file in files])[:12]


def _unit(config: ModelConfig, kind: str, word: str) -> nn.Module:
    if kind == "block":
        (_, attention), (_, ffn) = Unit(0, kind, word).parts
        return Block(config, BlockConfig.of(attention, ffn))
    return Subblock(config, parse_kind(kind, word))


def _work(tokens: int, length: int, model: ModelConfig) -> Work:
    window = min(length, model.sliding_window or length)
    return Work(tokens, round(tokens * (window - window * (window - 1) / (2 * length))))


def _operations(model: ModelConfig, kind: str, work: Work) -> float:
    own = (variant for block in model.blocks for k, variant in block if k == kind)
    return float(sum(subblock_cost(model, variant).forward(work) for variant in own))


def _batch(config: ModelConfig, rows: int, length: int) -> Batch:
    """One row of `rows` random tokens, in documents of `length`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, rows + 1), generator=generator)
    at = torch.arange(rows)[None]
    weight = torch.ones(1, rows)
    found = Batch(ids[:, :-1].clone(), ids[:, 1:].clone(), weight, at % length, at // length)
    return found.to(dist.device())


def _seconds(call: Callable[[], object]) -> float:
    accelerator = dist.device().type != dist.HOST
    begun = _now()
    call()
    if accelerator:
        torch.accelerator.synchronize()
    return _now() - begun


def _now() -> float:
    """Of one thread its own seconds, which leave out what else runs on the machine."""
    alone = dist.device().type == dist.HOST and torch.get_num_threads() == 1
    return time.thread_time() if alone else time.perf_counter()


def _least(call: Callable[[], object], times: int = 2) -> float:
    """The least seconds of some calls, after one that warms up."""
    call()
    return min(_seconds(call) for _ in range(times))


class _Given:
    """A source of the microbatches that it is given."""

    def __init__(self) -> None:
        self.now: list[Batch] = []

    def batches(self, step: int) -> list[Batch]:
        return self.now

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@contextmanager
def _trainer(
    module: nn.Module, objective: Objective, train: TrainConfig
) -> Iterator[Callable[[list[Batch]], object]]:
    """A step of training on some microbatches, as a stage makes it."""
    source = _Given()
    with (
        tempfile.TemporaryDirectory() as place,
        Run.open(
            Path(place) / "run", stage="measure", config={}, inputs={}, seed=0, quiet=True
        ) as run,
    ):
        trainer = Trainer(module, objective, source, train, run)
        module.train()

        def step(batches: list[Batch]) -> object:
            source.now = batches
            return trainer.train_step(0)

        yield step


def _tokenise(tokenizer: Path) -> list[float]:
    text = " ".join(f"The {i}th word of this text is number {i * 7919}." for i in range(4000))
    known = load_tokenizer(tokenizer)
    return [len(text) / _least(lambda: known.encode(text), 1)]
