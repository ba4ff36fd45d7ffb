"""Seconds of an optimizer step on a cluster, from data sheets: a roofline.

    products         operations / (peak x share that software reaches)
    passes           elementwise reads and writes / bandwidth
    sharding         gathered weights and reduced gradients over the slower of the links they cross
    tensor           four exchanges of activations a layer; nothing hides them
    update           what AdamW reads and writes of each parameter held

Sharding overlaps with products and passes; the longer counts (FSDP2 fetches the next block while
one runs). Not modelled: stragglers, loading data, kernels too small to fill a device. Shares and
links are those of `devices.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tessera.model.config import GQA, Chain, ModelConfig, NoOp, SwiGLU, Variant, parse
from tessera.planning.cluster import Cluster
from tessera.planning.memory import BYTES, Layout, held_params
from tessera.planning.work import Job
from tessera.puzzle.memory import unit_params
from tessera.train.flops import model_cost

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

    @property
    def total(self) -> float:
        return max(self.products + self.passes, self.sharding) + self.tensor + self.update

    @property
    def mfu(self) -> float:
        return self.flops / self.total / self.peak


def microbatches(job: Job, layout: Layout) -> int:
    """Microbatches that each process runs a step: the last may be short on some."""
    train = job.train
    return math.ceil(train.tokens_per_step / train.microbatch_tokens / layout.data)


def step_time(job: Job, layout: Layout, cluster: Cluster) -> StepTime:
    """The roofline of one optimizer step."""
    device, train = cluster.device, job.train
    best = device.peak[NAMES[train.dtype]] * cluster.world
    flops = job.flops()
    done = flops + (_recomputed(job) if layout.gradient_checkpointing else 0)
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


def _recomputed(job: Job) -> float:
    if job.student is None:
        return 0.0
    return model_cost(job.student, head=False).forward(job.work())


def _trained(job: Job, layout: Layout) -> float:
    """Parameters trained on one tensor-parallel process, before shards."""
    if job.student is not None:
        return held_params(job.student, layout.tensor)
    return sum(unit_params(job.config, kind, word) for _, kind, word in job.units) / job.passes


def _passed(job: Job, layout: Layout) -> float:
    """Bytes that elementwise kernels of a step read and write, on all devices together."""
    size, tokens = BYTES[job.train.dtype], job.train.tokens_per_step
    again = 1 if layout.gradient_checkpointing else 0
    total = 0.0
    if job.student is not None:  # forward, and twice that backward
        total += (3 + again) * _model_numbers(job.student) * size
        total += 4 * HEAD_PASSES * job.student.vocab_size
    if job.teacher is not None:
        total += _model_numbers(job.teacher) * size
        total += 4 * HEAD_PASSES * job.teacher.vocab_size if job.student is not None else 0
    for _, _, word in job.units:
        total += 3 * _numbers(job.config, parse(word)) * size / job.passes
    return total * tokens


def _model_numbers(config: ModelConfig) -> float:
    return sum(_numbers(config, b.attention) + _numbers(config, b.ffn) for b in config.blocks)


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
    again = 2 if job.student is not None else 0  # forward and backward; units stay gathered
    moved = (again * size + 4) * trained * share / link
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
