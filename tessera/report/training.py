"""Sections on the stages: curves of each training, where runs came from, what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from tessera.plot import Series
from tessera.progress import clock
from tessera.report.blocks import Block, Figure, Table, Text
from tessera.report.chart import chart, legend
from tessera.report.runs import Row, RunData, Runs
from tessera.report.show import status
from tessera.table import Column, cell, count


def lines(rows: Sequence[Row], keys: Sequence[str]) -> list[Series]:
    """The keys' values over the steps, as far as they were logged."""
    found = []
    for key in keys:
        points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
        told = [(x, y, f"{key} {y:.4g} at step {x}") for x, y in points]
        if told:
            found.append(Series(key, told))
    return found


def curves(runs: Runs) -> Iterator[Block]:
    """Loss, held-out loss, speed and use of the machine of every training."""
    yield Text(
        "Loss in nats a token; long lines are averages of neighbouring steps. MFU is the share of "
        "the machine's peak that the model's arithmetic took: measured on a CPU, the data sheet's "
        "of a GPU."
    )
    for run in runs.all:
        keys = list(dict.fromkeys(key for row in run.metrics for key in row))
        told = [k for k in keys if k.startswith(("loss", "heldout")) or k in ("kl", "lm_loss")]
        log = not any(key.startswith("reward") for key in keys)  # a policy's loss has both signs
        series = lines(run.metrics, told)
        if svg := chart(series, x="step", y="loss", log=log):
            yield Figure(f"{run.name}: loss", svg, "", legend(series))
        for key, y in (("tokens_per_second", "tokens/s"), ("mfu", "MFU")):
            speed = lines(run.timings, [key])
            if svg := chart(speed, x="step", y=y):
                middle = median(p[1] for p in speed[0].points)
                yield Figure(f"{run.name}: {y}", svg, f"Median {cell(float(middle))}.")


def lineage(runs: Runs) -> Iterator[Block]:
    """Every run with its inputs, fingerprint, seed and settings."""
    yield Table("runs", [_origin(run) for run in runs.all])
    software = {tuple(sorted(run.manifest.versions.items())) for run in runs.all}
    for one in sorted(software):
        yield Text("Made with " + ", ".join(f"{name} {version}" for name, version in one) + ".")


def _origin(run: RunData) -> Row:
    manifest = run.manifest
    names = []
    for value in manifest.inputs.values():
        names += [one["path"] for one in (value if isinstance(value, list) else [value]) if one]
    row: Row = {"run": run.name, "stage": run.manifest.stage, "made from": ", ".join(names) or None}
    row |= {"status": status(manifest, run.path), "seed": str(manifest.seed)}
    return row | {"fingerprint": manifest.fingerprint[:12]}


def cost(runs: Runs) -> Iterator[Block]:
    """Time and tokens of every stage."""
    total = sum(run.manifest.seconds for run in runs.all)
    tokens = sum(run.tokens for run in runs.all)
    yield Text(
        f"{clock(total)} in all on the clock of the machine that ran it, {count(tokens)} tokens "
        "trained on (teacher and student of a distillation read the same tokens, counted once)."
    )
    rows = []
    for run in sorted(runs.all, key=lambda run: -run.manifest.seconds):
        spent = run.manifest.seconds
        row: Row = {"run": run.name, "seconds": spent, "share": spent / total if total else None}
        rows.append(row | {"cpu": run.manifest.cpu_seconds or None, "tokens": run.tokens or None})
    yield Table(
        "cost",
        rows,
        (
            Column("run", ("run",), cell),
            Column("seconds", ("time",), clock),
            Column("cpu", ("CPU",), clock),
            Column("share", ("share",), lambda value: f"{100 * value:.1f}%"),
            Column("tokens", ("tokens",), count),
        ),
    )
