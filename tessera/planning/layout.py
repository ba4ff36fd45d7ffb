"""The fastest layout of a training that fits a cluster, or what would make one fit.

Every way to write the world as replicate x shard x tensor, tensor inside a machine, with gradient
checkpointing and without, is priced by `memory.py` and `step.py`: a few dozen, so all are tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from tessera.planning.cluster import Cluster
from tessera.planning.memory import Layout, Parts, memory
from tessera.planning.step import StepTime, microbatches, step_time
from tessera.planning.work import Job

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
    def seconds(self) -> float:
        """Of the whole training."""
        return self.job.steps * self.time.total

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.cluster.world / 3600

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
            for again in (False, True) if whole else (False,):
                yield Layout(data // shard, shard, tensor, again)


def best(job: Job, cluster: Cluster) -> Plan:
    """The fastest plan that fits; else the smallest, with what would make it fit."""
    found = [_priced(job, cluster, layout) for layout in layouts(job, cluster)]
    fitting = [plan for plan in found if plan.fits]
    if fitting:
        return min(fitting, key=lambda plan: (plan.time.total, plan.layout.tensor))
    nearest = min(found, key=lambda plan: plan.parts.total)
    return replace(nearest, advice=_advice(nearest))


def _priced(job: Job, cluster: Cluster, layout: Layout) -> Plan:
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
    if job.units:
        layers = len({layer for layer, _, _ in job.units})
        at_once = -(-layers // job.passes)
        while at_once > 1:
            at_once //= 2
            if _fitting(replace(job, passes=-(-layers // at_once)), cluster):
                found.append(f"layers_at_once = {at_once} fits")
                break
    return "; ".join(found)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
