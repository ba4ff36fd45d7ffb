"""What a recipe's trainings take on a cluster: memory by part, seconds of a step, the best layout.

memory   weights 4, gradients 4 and moments 8 bytes a trained parameter, split over shards;
         what FSDP gathers; activations of a microbatch; chunks of logits; an engine's weights
seconds  max(operations / achieved peak + elementwise bytes / bandwidth, sharding / link)
         + tensor-parallel exchanges + update; generating and judging are left out
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tessera import dist
from tessera.devices import GB, Device, DeviceError, find_device
from tessera.model.config import GQA, BlockConfig, Chain, ModelConfig, NoOp, SwiGLU, Variant, parse
from tessera.model.parallel import splits
from tessera.model.placement import ParallelConfig
from tessera.model.source import is_hub_id, load_config, model_config
from tessera.objectives.kd import KDConfig
from tessera.objectives.lm import CPTConfig, SFTConfig
from tessera.puzzle.bld import (
    BLDConfig,
    CoupleConfig,
    LocalConfig,
    Memory,
    largest_pairs,
    training_memory,
    unit_params,
    units_of,
)
from tessera.puzzle.frontier import FrontierConfig
from tessera.puzzle.library import union
from tessera.puzzle.parent import ArchitectureConfig, ParentConfig
from tessera.puzzle.race import RaceConfig
from tessera.puzzle.ranges import by_range, split_layers, units_cost
from tessera.puzzle.search import SearchConfig
from tessera.puzzle.space import Space, Unit, read_space
from tessera.rl.policy import PolicyConfig
from tessera.rl.preference import RPOConfig
from tessera.rl.rollouts import RolloutConfig
from tessera.runs.plan import Input, Stage, Step, maker, stage_of
from tessera.runs.recipe import Recipe, RecipeError, StageSpec, validate
from tessera.runs.run import is_done, read_json
from tessera.train.flops import Work, block_cost, kept, model_cost, working
from tessera.train.losses import PORTIONS
from tessera.train.optim import TrainConfig


def stage_memory(step: Step, steps: Sequence[Step]) -> Memory | None:
    """Of a stage that trains units. None for others, and while the parent is not known.

    `couple` is bounded by the largest pairs its searches could choose. Raises ConfigError where
    the words or layers asked for do not fit the parent.
    """
    config = step.config
    if not isinstance(config, LocalConfig) or (parent := _parent(step, steps)) is None:
        return None
    if isinstance(config, BLDConfig):
        _, keys = units_of(config, parent, step.name)
    else:
        assert isinstance(config, CoupleConfig)
        if (space := _library_space(step.inputs["library"], steps)) is None:
            return None
        keys = largest_pairs(config, space, parent, step.name)
    return training_memory(parent, keys, config, dist.world())


def _parent(step: Step, steps: Sequence[Step]) -> ModelConfig | None:
    """The parent's config, from its run or from the checkpoint that is to be imported."""
    path = step.inputs["parent"]
    assert isinstance(path, Path)
    planned = maker(path, steps)
    if planned is None or is_done(path):
        return load_config(path)
    imported = planned.files.get("path")
    return load_config(imported) if isinstance(imported, Path) else None


def _library_space(path: Input, steps: Sequence[Step]) -> Space | None:
    """The space of a library run, finished or planned."""
    assert isinstance(path, Path)
    if is_done(path):
        return read_space(path)
    step = maker(path, steps)
    assert step is not None
    if isinstance(step.config, BLDConfig):
        parent = _parent(step, steps)
        return None if parent is None else units_of(step.config, parent, step.name)[0]
    if "libraries" not in step.inputs:
        return _library_space(step.inputs["library"], steps)
    libraries = step.inputs["libraries"]
    assert isinstance(libraries, list)
    spaces = [_library_space(one, steps) for one in libraries]
    known = [space for space in spaces if space is not None]
    return union(known) if len(known) == len(spaces) else None


# What one GPU sends to another machine in one direction: a 400 Gb/s port each, as DGX H100 has.
NETWORK = 50 * GB
_CLUSTER = re.compile(r"(?:(\d+)x)?(?:(\d+)x)?([A-Za-z].*)")


class ClusterError(ValueError):
    """No such cluster; the text says how one is written."""


@dataclass(frozen=True)
class Cluster:
    """`nodes` machines of `gpus` devices; network: bytes a second a device, one direction."""

    nodes: int
    gpus: int
    device: Device
    network: float = NETWORK

    @property
    def world(self) -> int:
        return self.nodes * self.gpus

    def link(self, ranks: int) -> float:
        """Bytes a second between `ranks` neighbours: the slower network where machines differ."""
        return self.device.link if ranks <= self.gpus else min(self.device.link, self.network)

    def __str__(self) -> str:
        return f"{self.nodes}x{self.gpus}x{self.device.name}"


def parse_cluster(text: str, network: float = NETWORK) -> Cluster:
    """`9x8xH100`: 9 machines of 8; `8xH100`: one machine; `H100`: one. Raises ClusterError."""
    match = _CLUSTER.fullmatch(text.strip())
    if match is None:
        raise ClusterError(
            f"{text!r} is no cluster; write machines x devices x name, as 9x8xH100, 8xH100 or H100"
        )
    first, second, name = match.groups()
    nodes, gpus = (int(first), int(second)) if second else (1, int(first or 1))
    if nodes < 1 or gpus < 1:
        raise ClusterError(f"{text!r} has no device; both numbers begin at 1")
    try:
        return Cluster(nodes, gpus, find_device(name), network)
    except DeviceError as error:
        raise ClusterError(str(error)) from None


def parent_of(recipe: Recipe, config: Path | None) -> ModelConfig:
    """The parent's config: given, read from its checkpoint, or built. Raises RecipeError."""
    if config is not None:
        return model_config(config)
    table = next((spec.table for spec in recipe.stages if spec.stage == "parent"), None)
    if table is None:
        raise RecipeError("this recipe has no [parent]; give --config CONFIG.JSON")
    if isinstance(path := table.get("path"), str):
        if is_hub_id(path):
            raise RecipeError(
                f"the checkpoint {path} is not on this machine; give --config its config.json"
            )
        return load_config(path)
    if not isinstance(table.get("architecture"), dict):
        raise RecipeError("[parent] names no path; say parent.path=MODEL, or give --config")
    shape = validate(ArchitectureConfig, table["architecture"], "parent.architecture")
    data = next((spec.table for spec in recipe.stages if spec.stage == "data"), {})
    wanted: Any = data.get("tokenizer")
    size = 259 if wanted == "byte" else wanted.get("bpe") if isinstance(wanted, dict) else None
    if not isinstance(size, int):
        raise RecipeError("the vocabulary is not known before the data; give --config CONFIG.JSON")
    return shape.model(size, None, ())


# Our own assumption: a question in its template. It counts once a group, so little hangs on it.
PROMPT = 256


@dataclass(frozen=True)
class Experience:
    """groups of a step, answers of a group that are learnt from, tokens of an answer and a prompt.

    engine: weights to generate with are held too. written: answers of a rollout, 0 from files.
    """

    groups: int
    answers: int
    length: int
    prompt: int
    engine: bool
    written: int

    @property
    def tokens(self) -> int:
        """Positions of a step."""
        return self.groups * (self.prompt - 1 + self.answers * self.length)

    def work(self, window: int | None) -> Work:
        """Of a step; window: the most tokens that one attends to."""

        def seen(length: int) -> int:  # pairs of a token with one that it attends to
            whole = min(length, window or length)
            return whole * (whole + 1) // 2 + (length - whole) * whole

        shared = seen(self.prompt - 1)
        answer = seen(self.prompt - 1 + self.length) - shared
        return Work(self.tokens, self.groups * (shared + self.answers * answer))

    def train(self, given: TrainConfig) -> TrainConfig:
        """The training as planned: its steps are as large as this, its documents as long."""
        longest = max(2, self.prompt - 1 + self.length)
        return given.model_copy(update={"tokens_per_step": self.tokens, "sequence_length": longest})


def experience(config: RolloutConfig) -> Experience:
    """Of a step of `grpo`, `rloo` or `rpo`; of files, pairs as long as `max_tokens` says."""
    groups, answers = -(-config.prompts_per_rollout // config.updates_per_rollout), config.samples
    written = config.prompts_per_rollout * config.samples * (1 + config.dynamic_sampling)
    if isinstance(config, RPOConfig):
        answers = 2
        if config.paths:
            groups, written = config.pairs_per_step, 0
    row = config.train.microbatch_tokens
    length = min(config.max_tokens, row)
    prompt = max(1, min(PROMPT, row - length + 1))
    engine = bool(written) and config.engine == "tessera"
    return Experience(groups, answers, length, prompt, engine, written)


BYTES = {"float32": 4, "bfloat16": 2}
# Our own assumption: nothing was run on a GPU yet. Half a gigabyte of context, NCCL's buffers, and
# a twentieth of the device that an allocator splits off.
CONTEXT, SPLIT = 2 * GB, 0.05


@dataclass(frozen=True)
class Layout:
    """A point of the search: `ParallelConfig` on a cluster."""

    replicate: int
    shard: int
    tensor: int
    gradient_checkpointing: bool

    @property
    def data(self) -> int:
        return self.replicate * self.shard

    def __str__(self) -> str:
        """As a recipe's `train.parallel` says it."""
        again = str(self.gradient_checkpointing).lower()
        return (
            f"{{ tensor = {self.tensor}, shard = {self.shard}, gradient_checkpointing = {again} }}"
        )


@dataclass(frozen=True)
class Parts:
    """Bytes on the fullest device."""

    weights: float = 0.0
    gradients: float = 0.0
    moments: float = 0.0
    teacher: float = 0.0
    gathered: float = 0.0
    activations: float = 0.0
    loss: float = 0.0
    engine: float = 0.0
    units_whole: float = 0.0
    reserve: float = 0.0

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def memory(job: Job, layout: Layout, device_memory: float, accelerator: bool = True) -> Parts:
    """The parts of a job. accelerator: False leaves the reserve out and takes a CPU's chunks."""
    parts = _units(job, layout) if job.student is None else _model(job, layout, accelerator)
    reserve = CONTEXT + SPLIT * device_memory if accelerator else 0.0
    return Parts(**{**asdict(parts), "reserve": reserve})


def split_params(config: ModelConfig, block: BlockConfig, ways: int) -> int:
    """Parameters of a block on one of `ways` tensor-parallel processes (`parallel.py`)."""
    total, norm = 0, config.hidden_size
    for kind, variant in (("attention", block.attention), ("ffn", block.ffn)):
        whole = config.subblock_params(kind, variant)
        split = splits(config, variant, ways)
        total += norm + -(-(whole - norm) // ways) if split else whole
    return total


def root_params(config: ModelConfig) -> int:
    """Embedding, last norm and head."""
    return config.num_params() - sum(
        config.subblock_params(kind, variant)
        for block in config.blocks
        for kind, variant in (("attention", block.attention), ("ffn", block.ffn))
    )


def held_params(config: ModelConfig, tensor: int) -> int:
    """Parameters of a model on one tensor-parallel process, before shards."""
    return root_params(config) + sum(split_params(config, b, tensor) for b in config.blocks)


def _model(job: Job, layout: Layout, accelerator: bool) -> Parts:
    student, train = job.student, job.train
    assert student is not None
    size, n = BYTES[train.dtype], train.microbatch_tokens
    held = held_params(student, layout.tensor) / layout.shard
    ways = layout.tensor
    blocks = [kept(student, b.attention, ways) + kept(student, b.ffn, ways) for b in student.blocks]
    inputs = student.hidden_size * sum(1 for numbers in blocks if numbers)
    numbers = inputs + max(blocks) if layout.gradient_checkpointing else sum(blocks)
    states = job.teacher.hidden_size * (len(job.teacher.blocks) + 1) if job.teacher else 0
    variants = [variant for block in student.blocks for variant in (block.attention, block.ffn)]
    numbers += working(student, variants, ways) + (states if job.states else 0)
    sharded = layout.data > 1 or train.dtype != "float32"
    teacher = gathered = 0.0
    if job.teacher:
        teacher = size * held_params(job.teacher, ways) / layout.shard
        teacher += _gathered(job.teacher, ways, size) if sharded else 0.0
    if sharded:  # with gradients, and a group that is reduced in float32
        block, root = _groups(student, ways)
        gathered = size * (3 * block + 2 * root) + 4 * max(block, root)
    return Parts(
        weights=4 * held,
        gradients=4 * held,
        moments=8 * held,
        teacher=teacher,
        gathered=gathered,
        activations=size * n * numbers,
        # A reference's log-probs are taken before the policy's: its logits are gone by then.
        loss=loss_bytes(student, n, size, bool(job.teacher and not job.experience), accelerator),
        engine=4 * student.num_params() if job.experience and job.experience.engine else 0.0,
    )


def _groups(config: ModelConfig, tensor: int) -> tuple[int, int]:
    """Parameters of the two groups that FSDP gathers: the largest block, and the root."""
    largest = max(split_params(config, block, tensor) for block in config.blocks)
    return largest, root_params(config)


def _gathered(config: ModelConfig, tensor: int, size: int) -> int:
    """Bytes of two blocks, one at work and one on its way, and of the root group."""
    block, root = _groups(config, tensor)
    return size * (2 * block + root)


def loss_bytes(config: ModelConfig, tokens: int, size: int, two: bool, accelerator: bool) -> float:
    """Hidden states and their gradient, and the chunks of logits of one model or two.

    Logits are made in the arithmetic's type and copied to float32; slopes are kept a slab.
    """
    portions = PORTIONS["cuda" if accelerator else "cpu"]
    rows = max(1, min(tokens, portions.chunk // config.vocab_size))
    slab = min(tokens, max(rows, portions.slab))
    logits = (4 + (size if size < 4 else 0)) * rows * config.vocab_size
    slopes = (4 + (size if size < 4 else 0)) * slab * config.vocab_size
    tile = 4 * min(portions.tile, rows * config.vocab_size) if two else 0
    hidden = 2 * size * tokens * config.hidden_size
    return hidden + logits * (2 if two else 1) + slopes + tile


def _units(job: Job, layout: Layout) -> Parts:
    """Block-wise distillation, as `training_memory` counts it."""
    found = _library(job, layout)
    return Parts(
        weights=found.states / 4,
        gradients=found.states / 4,
        moments=found.states / 2,
        teacher=found.parent,
        activations=found.activations,
        units_whole=found.gathered,
    )


def _library(job: Job, layout: Layout) -> Memory:
    return training_memory(job.config, job.units, _library_config(job, layout), layout.data)


def _library_config(job: Job, layout: Layout) -> LocalConfig:
    """`layout.shard` processes hold the layers between them."""
    assert job.local is not None
    parallel = ParallelConfig(shard=layout.shard)
    train = job.train.model_copy(update={"parallel": parallel})
    return job.local.model_copy(update={"train": train})


NAMES = {"bfloat16": "bf16", "float32": "fp32"}  # torch's, and the data sheets'
# Bytes a parameter: AdamW reads weight, gradient and two moments and writes three; clipping reads
# the gradient and writes it.
UPDATE = 4 * (4 + 3 + 2)
HEAD_PASSES = 6  # float32 passes over a model's logits: written, maximum, exponential, loss, slope


@dataclass(frozen=True)
class StepTime:
    """Seconds a step, by part, and what they are of the peak."""

    products: float
    passes: float
    sharding: float
    tensor: float
    update: float
    flops: float
    peak: float
    fill: float = 0.0

    @property
    def total(self) -> float:
        own = max(self.products + self.passes, self.sharding) + self.tensor + self.update
        return own + self.fill

    @property
    def mfu(self) -> float:
        return self.flops / self.total / self.peak


def microbatches(job: Job, layout: Layout) -> int:
    """Microbatches that each process runs a step: the last may be short on some."""
    train = job.train
    readers = layout.replicate if job.units else layout.data
    return math.ceil(train.tokens_per_step / train.microbatch_tokens / readers)


def step_time(job: Job, layout: Layout, cluster: Cluster) -> StepTime:
    """The roofline of one optimizer step."""
    if job.units:
        return _library_time(job, layout, cluster)
    device, train = cluster.device, job.train
    best = device.peak[NAMES[train.dtype]] * cluster.world
    flops = done = job.flops()
    if layout.gradient_checkpointing and job.student is not None:
        done += model_cost(job.student, head=False).forward(job.work())
    # Processes that get a microbatch less than the fullest wait for it.
    rows = train.tokens_per_step / train.microbatch_tokens
    waiting = microbatches(job, layout) * layout.data / rows
    rate = device.rate() * layout.data * layout.tensor
    return StepTime(
        products=waiting * done / (best * device.compute),
        passes=waiting * _passed(job, layout) / rate,
        sharding=_sharding(job, layout, cluster),
        tensor=_tensor(job, layout, cluster),
        update=UPDATE * _trained(job, layout) / layout.shard / device.rate(),
        flops=flops,
        peak=best,
    )


def _library_time(job: Job, layout: Layout, cluster: Cluster) -> StepTime:
    """Of the process whose layers take longest; its first microbatch has passed through the layers
    of all others before."""
    device, train, parent = cluster.device, job.train, job.config
    size, rounds = BYTES[train.dtype], microbatches(job, layout)
    local = _library_config(job, layout)
    ranges = split_layers(parent, job.units, local.train.parallel, layout.data)
    work = replace(job, train=train.model_copy(update={"tokens_per_step": train.microbatch_tokens}))
    blocks = [block_cost(parent, layer).forward(work.work()) for layer in range(len(parent.blocks))]
    own = by_range(job.units, ranges)
    flops = [
        sum(blocks[i] for i in layers) + units_cost(parent, units).forward(work.work()) / job.passes
        for layers, units in zip(ranges, own, strict=True)
    ]
    most = max(range(len(ranges)), key=lambda number: flops[number])
    words = [parse(word) for unit in own[most] for _, word in unit.parts]
    numbers = sum(_numbers(parent, word) for word in words) / job.passes
    trained = sum(unit_params(parent, *unit[1:]) for unit in own[most]) / job.passes
    share, peak = 1 / layout.replicate, device.peak[NAMES[train.dtype]]
    rate, link = peak * device.compute, cluster.link(cluster.world)
    return StepTime(
        products=rounds * flops[most] / rate,
        passes=rounds * 3 * numbers * size * train.microbatch_tokens / device.rate(),
        sharding=rounds * (1 - share) * (size + 4) * trained / link,
        tensor=0.0,
        update=UPDATE * trained * share / device.rate(),
        flops=job.flops(),
        peak=peak * cluster.world,
        fill=(sum(blocks) - sum(blocks[i] for i in ranges[most])) / rate,
    )


def _trained(job: Job, layout: Layout) -> float:
    """Parameters trained on one tensor-parallel process, before shards."""
    assert job.student is not None
    return held_params(job.student, layout.tensor)


def _passed(job: Job, layout: Layout) -> float:
    """Bytes that elementwise kernels of a step read and write, on all devices together."""
    size, tokens = BYTES[job.train.dtype], job.train.tokens_per_step
    passes = 4 if layout.gradient_checkpointing else 3  # forward, and twice that backward
    total = 0.0
    for model, times in ((job.student, passes), (job.teacher, 1)):
        if model is not None:
            blocks = model.blocks
            numbers = sum(_numbers(model, b.attention) + _numbers(model, b.ffn) for b in blocks)
            total += times * numbers * size
            total += 4 * HEAD_PASSES * model.vocab_size
    return total * tokens


def _numbers(config: ModelConfig, variant: Variant) -> float:
    """Numbers a token that a subblock's elementwise passes read and write, forward."""
    around = 5 * config.hidden_size  # norm in and out; residual and delta in, their sum out
    match variant:
        case NoOp():
            return 0.0
        case GQA(num_key_value_heads=kv):
            return around + 2 * (config.num_attention_heads + 2 * kv) * config.head_dim
        case SwiGLU(intermediate_size=width):
            return around + 3 * width
        case Chain():
            return around + 2 * variant.inner(config.hidden_size)


def _sharding(job: Job, layout: Layout, cluster: Cluster) -> float:
    """Seconds of all-gathers, reduce-scatters and, with replicas, all-reduces, of one process."""
    size, rounds = BYTES[job.train.dtype], microbatches(job, layout)
    trained, shard = _trained(job, layout), layout.shard
    share, link = (shard - 1) / shard, cluster.link(shard * layout.tensor)
    moved = (2 * size + 4) * trained * share / link
    if job.teacher is not None:
        moved += size * held_params(job.teacher, layout.tensor) * share / link
    if layout.replicate > 1:
        copies = (layout.replicate - 1) / layout.replicate
        moved += 2 * copies * 4 * trained / shard / cluster.link(cluster.world)
    return rounds * moved


def _tensor(job: Job, layout: Layout, cluster: Cluster) -> float:
    """Seconds of all-reduces in tensor-parallel subblocks: two a layer forward, two backward."""
    ways = layout.tensor
    if ways == 1 or job.student is None:
        return 0.0
    size, rows = BYTES[job.train.dtype], job.train.microbatch_tokens
    link, hop = cluster.link(ways), cluster.device.hop

    def exchange(config: ModelConfig) -> float:
        return 2 * hop + 2 * (ways - 1) / ways * rows * config.hidden_size * size / link

    times = 4 + (2 if layout.gradient_checkpointing else 0)
    total = times * len(job.student.blocks) * exchange(job.student)
    if job.teacher is not None:
        total += 2 * len(job.teacher.blocks) * exchange(job.teacher)
    return microbatches(job, layout) * total


@dataclass(frozen=True)
class Job:
    """A training of `student` (with a frozen `teacher`, perhaps), or of units of the teacher.

    states: the teacher's residual streams are kept for a loss on them. heats: steps of each
    training of a race. experience: what a policy writes itself; `teacher` is its reference. local:
    the settings of `units`; passes: how often their data is gone through, some layers each.
    """

    name: str
    train: TrainConfig
    student: ModelConfig | None = None
    teacher: ModelConfig | None = None
    states: bool = False
    units: tuple[Unit, ...] = ()
    local: LocalConfig | None = None
    passes: int = 1
    heats: tuple[int, ...] = ()
    experience: Experience | None = None

    @property
    def config(self) -> ModelConfig:
        """The larger of the models."""
        found = self.teacher or self.student
        assert found is not None
        return found

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        return sum(self.heats) or self.passes * self.train.steps

    @property
    def tokens(self) -> int:
        """Positions of the whole training."""
        return self.steps * self.train.tokens_per_step

    def work(self) -> Work:
        """Of a step, whose documents are as long as the longest there may be."""
        if self.experience is not None:
            return self.experience.work(self.config.sliding_window)
        tokens, length = self.train.tokens_per_step, self.train.sequence_length
        window = min(length, self.config.sliding_window or length)
        return Work(tokens, round(tokens * (window - window * (window - 1) / (2 * length))))

    def flops(self) -> float:
        """Operations of a step."""
        work, parent = self.work(), self.config
        if self.student is not None:
            read = model_cost(self.teacher).forward(work) if self.teacher else 0
            return model_cost(self.student).training(work) + read
        # Of one pass: the parent's blocks, and a share of the units.
        blocks = model_cost(parent, head=False).forward(work)
        return blocks + units_cost(parent, self.units).forward(work) / self.passes


def jobs(
    recipe: Recipe,
    stages: Mapping[str, Stage],
    parent: ModelConfig,
    child: ModelConfig | None = None,
) -> list[Job]:
    """The trainings of a recipe, in order; child: what the search finds, where that is known."""
    found = []
    for spec in recipe.stages:
        imported = spec.stage == "parent" and "train" not in spec.table
        if stage_of(spec, stages).name in TRAINS and not imported:
            found.append(_job(spec, recipe, stages, parent, child or parent))
    return found


def _job(
    spec: StageSpec,
    recipe: Recipe,
    stages: Mapping[str, Stage],
    parent: ModelConfig,
    child: ModelConfig,
) -> Job:
    match config := stages[spec.stage].validate(spec):
        case ParentConfig(train=TrainConfig() as train):
            return Job(spec.name, train, student=parent)
        case BLDConfig():
            keys = tuple(units_of(config, parent, spec.name)[1])
            return Job(spec.name, config.train, None, parent, units=keys, local=config)
        case RaceConfig():
            names = spec.table.get("searches", [])
            candidates = sum(_found(str(name), recipe, stages) for name in names) or 1
            heats = tuple(config.heats(candidates))
            return Job(spec.name, config.train, child, parent, config.cosine > 0, heats=heats)
        case KDConfig():
            return Job(spec.name, config.train, child, parent, config.cosine > 0)
        case CPTConfig() | SFTConfig():
            return Job(spec.name, config.train, student=child)
        case PolicyConfig() | RPOConfig():
            own = experience(config)
            reference = child if isinstance(config, RPOConfig) or config.kl else None
            return Job(spec.name, own.train(config.train), child, reference, experience=own)
    raise AssertionError(f"{spec.stage} is no training")


TRAINS = ("parent", "bld", "race", "kd", "cpt", "sft", "grpo", "rloo", "rpo")


def _found(name: str, recipe: Recipe, stages: Mapping[str, Stage]) -> int:
    """How many architectures a search has at most: what it is asked for, or has found."""
    search = next((one for one in recipe.stages if one.name == name), None)
    if search is None:
        return len(read_json(Path(name), "architectures")) if is_done(Path(name)) else 1
    match stages[search.stage].validate(search):
        case SearchConfig(method="mip") as config:
            return config.solutions + (config.conditional is not None)
        case FrontierConfig() as config:
            return len(config.methods) * len(config.points)
        case _:
            return 1


DAY = 86_400


@dataclass(frozen=True)
class Plan:
    """One training on one cluster. `fits` is False for the layout that comes nearest."""

    job: Job
    cluster: Cluster
    layout: Layout
    parts: Parts
    time: StepTime
    advice: str = ""

    @property
    def fits(self) -> bool:
        return self.parts.total <= self.cluster.device.memory

    @property
    def tokens_a_day(self) -> float:
        return self.job.train.tokens_per_step / self.time.total * DAY

    @property
    def gpu_hours(self) -> float:
        return self.job.steps * self.time.total * self.cluster.world / 3600

    def as_json(self) -> dict[str, Any]:
        """Bytes, seconds, counts."""
        return {
            "name": self.job.name,
            "cluster": str(self.cluster),
            "fits": self.fits,
            "layout": asdict(self.layout),
            "microbatches": microbatches(self.job, self.layout),
            "memory": {**asdict(self.parts), "total": self.parts.total},
            "device_memory": self.cluster.device.memory,
            "step_seconds": {**asdict(self.time), "total": self.time.total},
            "mfu": self.time.mfu,
            "tokens": self.job.tokens,
            "tokens_a_day": self.tokens_a_day,
            "gpu_hours": self.gpu_hours,
            "advice": self.advice,
        }


def layouts(job: Job, cluster: Cluster) -> Iterator[Layout]:
    """All ways to spread a job; units are not split by tensor parallelism nor run again."""
    whole = job.student is not None
    heads = job.config.num_attention_heads
    for tensor in _divisors(cluster.gpus) if whole else [1]:
        if heads % tensor:
            continue
        data = cluster.world // tensor
        for shard in _divisors(data):
            if job.units and shard > len(job.config.blocks):
                continue
            for again in (False, True) if whole else (False,):
                yield Layout(data // shard, shard, tensor, again)


def best(job: Job, cluster: Cluster) -> Plan:
    """The fastest plan that fits; else the smallest, with what would make it fit."""
    found = [_planned(job, cluster, layout) for layout in layouts(job, cluster)]
    fitting = [plan for plan in found if plan.fits]
    if fitting:
        return min(fitting, key=lambda plan: (plan.time.total, plan.layout.tensor))
    nearest = min(found, key=lambda plan: plan.parts.total)
    return replace(nearest, advice=_advice(nearest))


def _planned(job: Job, cluster: Cluster, layout: Layout) -> Plan:
    if job.units:
        job = replace(job, passes=_library(job, layout).passes)
    parts = memory(job, layout, cluster.device.memory)
    return Plan(job, cluster, layout, parts, step_time(job, layout, cluster))


def _fitting(job: Job, cluster: Cluster) -> bool:
    return any(
        memory(job, layout, cluster.device.memory).total <= cluster.device.memory
        for layout in layouts(job, cluster)
    )


def _advice(plan: Plan) -> str:
    """Shorter microbatches, more machines, fewer layers at once: the first of each that fits."""
    job, cluster = plan.job, plan.cluster
    parts = asdict(plan.parts)
    largest = max(parts, key=lambda part: parts[part])
    found = [f"the largest part is {largest.replace('_', ' ')}"]
    train, tokens = job.train, job.train.microbatch_tokens // 2
    while tokens >= train.sequence_length:
        shorter = replace(job, train=train.model_copy(update={"microbatch_tokens": tokens}))
        if _fitting(shorter, cluster):
            found.append(f"train.microbatch_tokens = {tokens} fits")
            break
        tokens //= 2
    if job.states and _fitting(replace(job, states=False), cluster):
        found.append("cosine = 0 fits")
    for nodes in (cluster.nodes * 2**i for i in range(1, 9)):
        if _fitting(job, replace(cluster, nodes=nodes)):
            found.append(f"{nodes}x{cluster.gpus}x{cluster.device.name} fits")
            break
    if job.local is not None:
        at_once = len({layer for layer, _, _ in job.units})
        while at_once > 1:
            at_once //= 2
            local = job.local.model_copy(update={"layers_at_once": at_once})
            if _fitting(replace(job, local=local), cluster):
                found.append(f"layers_at_once = {at_once} fits")
                break
    return "; ".join(found)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def render_plan(plan: Plan, price: float | None = None) -> str:
    """A paragraph: layout, memory by part, a step, the whole training. price: of a GPU-hour."""
    job, layout, time = plan.job, plan.layout, plan.time
    parts = {name.replace("_", " "): value for name, value in asdict(plan.parts).items() if value}
    names = ("products", "passes", "sharding", "tensor", "update", "fill")
    step = [f"{name} {value:.2g}" for name in names if (value := getattr(time, name))]
    capacity = plan.cluster.device.memory
    verdict = "fits" if plan.fits else "does not fit"
    lines = [
        f"[{job.name}]  {verdict} {plan.cluster}: {plan.parts.total / GB:.1f} of "
        f"{capacity / GB:.0f} GB a GPU",
        f"  memory    {', '.join(f'{name} {value / GB:.2g}' for name, value in parts.items())}",
    ]
    if plan.advice:
        lines.append(f"  advice    {plan.advice}")
    lines += [
        f"  layout    {job.name}.train.parallel = {layout}"
        + (f", {layout.replicate} replicas" if layout.replicate > 1 else "")
        + f", {microbatches(job, layout)} microbatches a process and step",
        f"  step      {time.total:.3g} s ({', '.join(step)}; sharding runs beside products and "
        f"passes), MFU {time.mfu:.0%}",
        f"  training  {_count(job.tokens)} tokens, {_count(plan.tokens_a_day)} a day: "
        f"{job.steps * time.total / DAY:.2g} days, {plan.gpu_hours:,.0f} GPU-hours"
        + (f", {price * plan.gpu_hours:,.0f} at {price:g} a GPU-hour" if price else ""),
    ]
    if job.heats:
        lines.append(f"  heats     {len(job.heats)}, of {job.heats[0]} to {job.heats[-1]} steps")
    if job.experience is not None and job.experience.written:
        own = job.experience
        lines.append(
            f"  left out  generating and judging {own.written:,} answers a rollout, "
            f"each of at most {own.length:,} tokens"
        )
    return "\n".join(lines)


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:,.0f}"
