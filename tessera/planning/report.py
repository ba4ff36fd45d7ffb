"""Plans as a person reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from tessera.devices import GB
from tessera.planning.layout import DAY, Plan
from tessera.planning.step import microbatches


def told(plans: Sequence[Plan], price: float | None = None) -> str:
    """A paragraph a training: layout, memory by part, a step, the whole. price: a GPU-hour's."""
    return "\n\n".join(_one(plan, price) for plan in plans)


def _one(plan: Plan, price: float | None) -> str:
    job, layout = plan.job, plan.layout
    capacity = plan.cluster.device.memory
    verdict = "fits" if plan.fits else "does not fit"
    lines = [
        f"[{job.name}]  {verdict} {plan.cluster}: {plan.parts.total / GB:.1f} of "
        f"{capacity / GB:.0f} GB a GPU",
        f"  memory    {_parts(plan)}",
    ]
    if plan.advice:
        lines.append(f"  advice    {plan.advice}")
    lines += [
        f"  layout    {job.name}.train.parallel = {layout.told()}"
        + (f", {layout.replicate} replicas" if layout.replicate > 1 else "")
        + f", {microbatches(job, layout)} microbatches a process and step",
        f"  step      {_seconds(plan)}, MFU {plan.time.mfu:.0%}",
        f"  training  {_count(job.tokens)} tokens, {_count(plan.tokens_a_day)} a day: "
        f"{plan.seconds / DAY:.2g} days, {plan.gpu_hours:,.0f} GPU-hours"
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


def _parts(plan: Plan) -> str:
    parts = {name.replace("_", " "): value for name, value in asdict(plan.parts).items() if value}
    return ", ".join(f"{name} {value / GB:.2g}" for name, value in parts.items())


def _seconds(plan: Plan) -> str:
    time = plan.time
    names = ("products", "passes", "sharding", "tensor", "update")
    parts = {name: getattr(time, name) for name in names}
    listed = ", ".join(f"{name} {value:.2g}" for name, value in parts.items() if value)
    return f"{time.total:.3g} s ({listed}; sharding runs beside products and passes)"


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:,.0f}"
