"""What a recipe's trainings take on a cluster: memory by part, seconds of a step, the best layout.

memory   weights 4, gradients 4 and moments 8 bytes a trained parameter, split over shards;
         what FSDP gathers; activations of a microbatch; chunks of logits; an engine's weights
seconds  max(operations / achieved peak + elementwise bytes / bandwidth, sharding / link)
         + tensor-parallel exchanges + update; generating and judging are left out
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from tessera.devices import CPU, GB, Device, DeviceError, find_device
from tessera.model.config import GQA, BlockConfig, Chain, ModelConfig, NoOp, SwiGLU, Variant, parse
from tessera.model.parallel import held_params, root_params, split_params
from tessera.model.placement import LayoutError, ParallelConfig
from tessera.puzzle.bld import (
    LocalConfig,
    Memory,
    training_memory,
    unit_params,
)
from tessera.puzzle.cost_table import Scenario
from tessera.puzzle.ranges import by_range, layer_ranges, units_cost
from tessera.puzzle.space import Unit
from tessera.rl.policy import GKDConfig
from tessera.rl.preference import RPOConfig
from tessera.rl.rollouts import RolloutConfig
from tessera.train.checkpoint import LEAST
from tessera.train.flops import Work, block_cost, kept, model_cost, working
from tessera.train.losses import PORTIONS
from tessera.train.optim import TrainConfig

# What one GPU sends to another machine in one direction: a 400 Gb/s port each, as DGX H100 has.
NETWORK = 50 * GB
_CLUSTER = re.compile(r"(?:(\d+)x)?(?:(\d+)x)?([A-Za-z].*)")


class Rates(Protocol):
    """Seconds that were measured (`here.py`), instead of a data sheet's."""

    resident: float  # bytes that a process holds before its stage begins

    def step(self, job: Job) -> StepTime: ...

    def forward(
        self, model: ModelConfig, tokens: int, length: int, dtype: str
    ) -> tuple[list[float], float]: ...

    def head_memory(self, tokens: int, length: int, dtype: str) -> float: ...

    def calibration(self, config: LocalConfig, importance: str, layers: int) -> float: ...

    def generation(
        self, model: ModelConfig, scenario: Scenario, dtype: str
    ) -> tuple[float, float]: ...

    def copied(self) -> float: ...

    def tokenised(self, tokenizer: Path) -> float: ...

    def peak(self, dtype: str) -> float: ...


class ClusterError(ValueError):
    """No such cluster; the text says how one is written."""


@dataclass(frozen=True)
class Cluster:
    """`nodes` machines of `gpus` devices; network: bytes a second a device, one direction. rates:
    of the machine at hand, where they were measured."""

    nodes: int
    gpus: int
    device: Device
    network: float = NETWORK
    rates: Rates | None = None

    @property
    def world(self) -> int:
        return self.nodes * self.gpus

    @property
    def on_cpu(self) -> bool:
        return self.device.name == CPU

    @property
    def reserve(self) -> float:
        """Bytes that a device keeps for what is no tensor of ours."""
        if self.on_cpu:
            return self.rates.resident if self.rates else 0.0
        return CONTEXT + SPLIT * self.device.memory

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


# Our own assumption: a question in its template. It counts once a group, so little hangs on it.
PROMPT = 128
# Share of `max_tokens` that an answer takes on average: 0.45 to 0.98 in the stages of smollm2-135m.
ANSWERED = 2 / 3


@dataclass(frozen=True)
class Experience:
    """groups of a step, answers of a group that are learnt from, tokens of an answer and a prompt.

    length: of an answer on average. engine: processes that hold weights to answer with together, 0
    where vLLM or files do; it sleeps while the policy trains, but where it answers `ahead`.
    written: answers of a rollout, 0 from files. distilled: the teacher's logits stand beside the
    policy's.
    """

    groups: int
    answers: int
    length: int
    prompt: int
    engine: int
    written: int
    ahead: bool
    distilled: bool = False

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
    """Of a step of `grpo`, `rloo`, `gkd` or `rpo`; of files, pairs as long as answers would be."""
    groups, answers = -(-config.prompts_per_rollout // config.updates_per_rollout), config.samples
    written = config.prompts_per_rollout * config.samples * (1 + config.dynamic_sampling)
    if isinstance(config, RPOConfig):
        answers = 2
        if config.paths:
            groups, written = config.pairs_per_step, 0
    row = config.train.microbatch_tokens
    length = min(math.ceil(ANSWERED * config.max_tokens), row)
    prompt = max(1, min(PROMPT, row - length + 1))
    engine = int(bool(written) and config.engine == "tessera")
    ahead, distilled = bool(config.staleness), isinstance(config, GKDConfig)
    return Experience(groups, answers, length, prompt, engine, written, ahead, distilled)


BYTES = {"float32": 4, "bfloat16": 2}
MOMENTS = {"adamw": 8, "adamw-8bit": 2.03}  # bytes a parameter; a float32 scale for 256 numbers
# Our own assumption: nothing was run on a GPU yet. Half a gigabyte of context, NCCL's buffers, and
# a twentieth of the device that an allocator splits off.
CONTEXT, SPLIT = 2 * GB, 0.05


@dataclass(frozen=True)
class Layout:
    """`ParallelConfig` on a cluster."""

    replicate: int
    shard: int
    tensor: int
    gradient_checkpointing: bool | str
    context: int = 1
    offload: bool = False
    pipeline: int = 1

    @property
    def config(self) -> ParallelConfig:
        own = {k: n for k, n in asdict(self).items() if k in ParallelConfig.model_fields}
        return ParallelConfig.model_construct(**own)

    @property
    def data(self) -> int:
        return self.replicate * self.shard

    @property
    def rows(self) -> int:
        """Groups of processes that read different rows."""
        return self.data // self.context

    def __str__(self) -> str:
        """As a recipe's `train.parallel` says it."""
        plain = asdict(Layout(1, self.data, 1, False)) | {"replicate": self.replicate}
        said = {key: n for key, n in asdict(self).items() if n != plain[key]}
        inside = ", ".join(f"{key} = {json.dumps(n)}" for key, n in said.items())
        return f"{{ {inside} }}" if inside else "{}"


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
    cache: float = 0.0
    states: float = 0.0
    units_whole: float = 0.0
    beside: float = 0.0
    state: float = 0.0
    reserve: float = 0.0

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def memory(job: Job, layout: Layout, device_memory: float, accelerator: bool = True) -> Parts:
    """The parts of a job. accelerator: False leaves the reserve out and takes a CPU's chunks."""
    parts = _units(job, layout) if job.student is None else _model(job, layout, accelerator)
    reserve = CONTEXT + SPLIT * device_memory if accelerator else 0.0
    return Parts(**{**asdict(parts), "reserve": reserve})


def _model(job: Job, layout: Layout, accelerator: bool) -> Parts:
    student, train = job.student, job.train
    assert student is not None
    size, n = BYTES[train.dtype], train.microbatch_tokens // layout.context
    held = held_params(student, layout.tensor) / layout.shard / layout.pipeline
    ways = layout.tensor
    blocks = [kept(student, b.attention, ways) + kept(student, b.ffn, ways) for b in student.blocks]
    numbers = sum(blocks)
    if layout.gradient_checkpointing == "selective":
        numbers = sum(_selective(student, block, ways) for block in student.blocks)
    elif layout.gradient_checkpointing:
        numbers = student.hidden_size / ways * sum(1 for own in blocks if own)
    numbers += max(blocks) if layout.gradient_checkpointing else 0
    # The cosine compares the teacher's residual streams with the student's, whole tokens of both.
    states = student.hidden_size * (len(student.blocks) + 1) * (1 if ways == 1 else 2)
    variants = [variant for block in student.blocks for variant in (block.attention, block.ffn)]
    numbers += working(student, variants, ways) + (states if job.states else 0)
    sharded = layout.data > 1 or train.dtype != "float32"
    teacher = gathered = 0.0
    own = job.experience
    engine = own.engine if own and own.ahead else 0
    if job.teacher:
        teacher = size * held_params(job.teacher, ways) / layout.shard
        teacher += _gathered(job.teacher, ways, size) if sharded else 0.0
    if sharded:  # with gradients, and a group that is reduced in float32
        block, root = _groups(student, ways)
        gathered = size * (3 * block + 2 * root) + 4 * max(block, root)
    here = 0.0 if layout.offload else held
    return Parts(
        weights=4 * here,
        gradients=4 * here,
        moments=MOMENTS[train.optimizer] * here,
        teacher=0.0 if layout.offload else teacher,
        gathered=gathered,
        activations=size * n * numbers,
        # A reference's log-probs are taken before the policy's: its logits are gone by then.
        loss=loss_bytes(
            student, n, size, bool(job.teacher and (own is None or own.distilled)), accelerator
        ),
        engine=size * held_params(student, engine) if engine else 0.0,
    )


def _selective(config: ModelConfig, block: BlockConfig, ways: int) -> float:
    """Numbers a token that a selective checkpoint keeps: of q k v o gate up down what k, o and up
    gave, what attention gave, and the input."""
    found = config.hidden_size / ways
    if isinstance(block.attention, GQA):
        heads = config.num_attention_heads + block.attention.num_key_value_heads
        found += (heads * config.head_dim + config.hidden_size) / ways
    if isinstance(block.ffn, SwiGLU):
        found += block.ffn.intermediate_size / ways
    return found


@functools.cache
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
AGAIN = {False: 0.0, True: 1.0, "selective": 0.4}  # share of the forward that is run again
# Our own assumptions: bytes a second of a machine's memory, and of one device's bus to it.
HOST_MEMORY, BUS = 300 * GB, 50 * GB
HEAD_PASSES = 6  # float32 passes over a model's logits: written, maximum, exponential, loss, slope


@dataclass(frozen=True)
class StepTime:
    """Seconds a step, by part, and what they are of the peak."""

    products: float
    passes: float
    sharding: float
    tensor: float
    context: float
    update: float
    flops: float
    peak: float
    fill: float = 0.0

    @property
    def total(self) -> float:
        here = max(self.products + self.passes, self.sharding)
        return here + self.tensor + self.context + self.update + self.fill

    @property
    def mfu(self) -> float:
        return self.flops / self.total / self.peak


def microbatches(job: Job, layout: Layout) -> int:
    """Microbatches that each process runs a step: the last may be short on some."""
    train = job.train
    readers = layout.replicate if job.units else layout.rows
    return math.ceil(train.tokens_per_step / train.microbatch_tokens / readers)


def step_time(job: Job, layout: Layout, cluster: Cluster) -> StepTime:
    """The roofline of one optimizer step, or what was measured."""
    if cluster.rates is not None:
        return cluster.rates.step(job)
    if job.units:
        return _library_time(job, layout, cluster)
    device, train = cluster.device, job.train
    best = device.peak[NAMES[train.dtype]] * cluster.world
    flops = done = job.flops()
    if job.student is not None and (again := AGAIN[layout.gradient_checkpointing]):
        layers, work = model_cost(job.student, head=False), job.work()
        done += again * layers.forward(replace(work, pairs=work.pairs if again == 1 else 0))
    # Processes that get a microbatch less than the fullest wait for it.
    rows = train.tokens_per_step / train.microbatch_tokens
    waiting = microbatches(job, layout) * layout.rows / rows
    waiting *= 1 + (layout.pipeline - 1) / microbatches(job, layout)  # the first to the last stage
    rate = device.rate() * cluster.world
    return StepTime(
        products=waiting * done / (best * device.training),
        passes=waiting * _passed(job, layout) / rate,
        sharding=_sharding(job, layout, cluster),
        tensor=_tensor(job, layout, cluster),
        context=_context(job, layout, cluster),
        update=_update(job, layout, cluster),
        flops=flops,
        peak=best,
    )


def _context(job: Job, layout: Layout, cluster: Cluster) -> float:
    """Seconds of the keys and values that processes of a row exchange: once forward, twice back."""
    if layout.context == 1 or job.student is None:
        return 0.0
    size, ways = BYTES[job.train.dtype], layout.tensor
    others = job.train.microbatch_tokens * (1 - 1 / layout.context)
    heads = sum(getattr(b.attention, "num_key_value_heads", 0) for b in job.student.blocks)
    times = 3 if layout.gradient_checkpointing is not True else 4
    moved = times * size * others * 2 * heads * job.student.head_dim / ways
    return microbatches(job, layout) * moved / cluster.link(layout.context * ways)


def _update(job: Job, layout: Layout, cluster: Cluster) -> float:
    """Seconds of AdamW; offloaded, of the CPUs of a machine and the bus to its devices."""
    trained = _trained(job, layout) / layout.shard
    if not layout.offload:
        return UPDATE * trained / cluster.device.rate()
    return UPDATE * trained * cluster.gpus / HOST_MEMORY + 8 * trained / BUS


def _library_time(job: Job, layout: Layout, cluster: Cluster) -> StepTime:
    """Of the process whose layers take longest; its first microbatch has passed through the layers
    of all others before."""
    device, train, parent = cluster.device, job.train, job.config
    size, rounds = BYTES[train.dtype], microbatches(job, layout)
    local = _library_config(job, layout)
    ranges = layer_ranges(parent, job.units, local.train.parallel, layout.data)
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
    rate, link = peak * device.training, cluster.link(cluster.world)
    return StepTime(
        products=rounds * flops[most] / rate,
        passes=rounds * 3 * numbers * size * train.microbatch_tokens / device.rate(),
        sharding=rounds * (1 - share) * (size + 4) * trained / link,
        tensor=0.0,
        context=0.0,
        update=UPDATE * trained * share / device.rate(),
        flops=job.flops(),
        peak=peak * cluster.world,
        fill=(sum(blocks) - sum(blocks[i] for i in ranges[most])) / rate,
    )


def _trained(job: Job, layout: Layout) -> float:
    """Parameters trained on one tensor-parallel process, before shards."""
    assert job.student is not None
    return held_params(job.student, layout.tensor) / layout.pipeline


def _passed(job: Job, layout: Layout) -> float:
    """Bytes that elementwise kernels of a step read and write, on all devices together."""
    size, tokens = BYTES[job.train.dtype], job.train.tokens_per_step
    passes = 3 + (layout.gradient_checkpointing is not False)  # forward, and twice that backward
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
    size, rows = BYTES[job.train.dtype], job.train.microbatch_tokens // layout.context
    link, hop = cluster.link(ways), cluster.device.hop

    def exchange(config: ModelConfig) -> float:
        return 2 * hop + 2 * (ways - 1) / ways * rows * config.hidden_size * size / link

    times = 4 + (2 if layout.gradient_checkpointing is True else 0)
    total = times * len(job.student.blocks) * exchange(job.student)
    if job.teacher is not None:
        total += 2 * len(job.teacher.blocks) * exchange(job.teacher)
    return microbatches(job, layout) * total / layout.pipeline


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


@dataclass(frozen=True)
class Plan:
    """One training in one layout."""

    job: Job
    cluster: Cluster
    layout: Layout
    parts: Parts
    time: StepTime

    @property
    def fits(self) -> bool:
        return self.parts.total <= self.cluster.device.memory

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return self.job.steps * self.time.total


def planned(job: Job, cluster: Cluster, layout: Layout) -> Plan:
    if job.units:
        job = replace(job, passes=_library(job, layout).passes)
    parts = memory(job, layout, cluster.device.memory, not cluster.on_cpu)
    parts, time = replace(parts, reserve=cluster.reserve), step_time(job, layout, cluster)
    if cluster.on_cpu and job.steps * time.total > LEAST:  # a state is copied while it is written
        parts = replace(parts, state=parts.weights + parts.moments)
    return Plan(job, cluster, layout, parts, time)


def layout_of(job: Job, cluster: Cluster) -> Layout:
    """A recipe's own. Raises LayoutError where it does not divide the cluster's devices."""
    config, world = job.train.parallel, cluster.world
    if job.units:
        ranges = len(layer_ranges(job.config, job.units, config, world))
        return Layout(world // ranges, ranges, 1, False)
    data, rest = divmod(world, config.tensor * config.pipeline)
    shard, context = config.shard or data, config.context
    if rest or not data or data % shard or shard % context:
        given = f"tensor = {config.tensor}, shard = {config.shard}, context = {context}"
        given += f", pipeline = {config.pipeline}"
        raise LayoutError(f"train.parallel: {given} do not divide {world} devices")
    own = config.gradient_checkpointing, context, config.offload, config.pipeline
    return Layout(data // shard, shard, config.tensor, *own)


def layouts(job: Job, cluster: Cluster) -> Iterator[Layout]:
    """Ways to spread a job: the state over all devices or over those of a machine; the layers of a
    library over all numbers of processes."""
    if job.units:
        for ranges in _divisors(cluster.world):
            if ranges <= len(job.config.blocks):
                yield Layout(cluster.world // ranges, ranges, 1, False)
        return
    for tensor in _divisors(cluster.gpus):
        if job.config.num_attention_heads % tensor:
            continue
        data = cluster.world // tensor
        for shard in {data, cluster.gpus // tensor}:
            for again in AGAIN:
                for context in (1, 2, 4, 8):
                    if shard % context == 0:
                        yield Layout(data // shard, shard, tensor, again, context)


def best(job: Job, cluster: Cluster, held: float = 0.0) -> Plan:
    """The fastest plan that leaves room for `held` bytes more; the smallest where none does."""
    room = cluster.device.memory
    totals = {layout: memory(job, layout, room).total for layout in layouts(job, cluster)}
    if min(totals.values()) + held > room:
        return planned(job, cluster, min(totals, key=totals.__getitem__))
    found = [planned(job, cluster, layout) for layout, n in totals.items() if n + held <= room]
    return min(found, key=lambda plan: (plan.seconds, plan.layout.tensor))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
