"""Sections on what Puzzle made: the child's mosaic, the frontier, promises against measurements."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from tessera.model.lineage import model_config, origin
from tessera.plot import Series
from tessera.report.blocks import Block, Figure, Table, Text
from tessera.report.chart import chart, legend
from tessera.report.explain import explain, headline
from tessera.report.mosaic import mosaic
from tessera.report.runs import Runs
from tessera.table import VIEWS, count, size


def architecture(runs: Runs) -> Iterator[Block]:
    """Each child against its parent, and what was taken."""
    drawn: set[tuple[tuple[str, str], ...]] = set()
    losses: list[Block] = []
    for run in (one for one in runs.all if one.manifest.stage == "child"):
        parent = origin(run.path)
        if run.manifest.status != "done" or parent is None:
            continue
        before, after = model_config(parent), model_config(run.path)
        if tuple(after.words) in drawn:
            continue
        drawn.add(tuple(after.words))
        counts = (after.num_params(), before.num_params())
        held = (after.kv_bytes_per_token(4), before.kv_bytes_per_token(4))
        note = (
            f"{count(counts[0])} of {count(counts[1])} parameters, "
            f"{size(held[0])} of {size(held[1])} KV cache a token (float32). "
            "Filled: kept; outlined: what the parent has there."
        )
        yield Figure(run.name, mosaic(after, before), note)
        if found := explain(run.path):
            losses.append(Text(f"{run.name}: {headline(found)}"))
            name = f"{run.name}, layer by layer"
            losses.append(Table(name, found["layers"], VIEWS["taken"], folded=True))
    yield from losses


def frontier(runs: Runs) -> Iterator[Block]:
    """Harm against speed, for the integer program and for simpler methods."""
    for run in runs.having("frontier"):
        rows = run.tables["frontier"]
        measured = all(row.get("speedup") is not None for row in rows)
        key, word = ("speedup", "measured") if measured else ("promised", "promised")
        methods: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
        for row in rows:
            if row.get(key) is not None and row.get("kl") is not None:
                told = f"{row['method']}: {row[key]:.2f}x, KL {row['kl']:.3f}"
                methods[row["method"]].append((row[key], row["kl"], told))
        series = [Series(name, sorted(set(points))) for name, points in methods.items()]
        x = f"generation speed, times the parent's ({word})"
        healed = any(row.get("lr") for row in rows)
        state = "after each was distilled" if healed else "as assembled, before any distillation"
        note = f"Lower and further right is better. KL in nats a token, {state}; speed is {word}."
        if any(not row.get("meets", True) for row in rows):
            note += " A method that cannot reach a speed stands at the most it reaches."
        svg = chart(series, x=x, y="KL to the parent", log=True)
        yield Figure("Frontier", svg, note, legend(series))
        bare = [{k: v for k, v in row.items() if k != "words"} for row in rows]
        yield Table(f"{run.name}: all points", bare, VIEWS["frontier"], folded=True)


def speed(runs: Runs) -> Iterator[Block]:
    """What the cost table promised, against the clock."""
    for run in runs.having("calibration"):
        rows = run.tables["calibration"]
        pairs = [(1e3 * r["promised_seconds"], 1e3 * r["measured_seconds"]) for r in rows]
        points = [(p, m, f"promised {p:.1f} ms, took {m:.1f} ms") for p, m in pairs]
        x, y = "promised, ms a batch", "measured, ms a batch"
        svg = chart([Series("model", points)], x=x, y=y, joined=False, diagonal=True)
        worst = max(abs(p / m - 1) for p, m in pairs)
        note = (
            f"{len(rows)} whole models timed against the sum of their blocks' costs; on the dashed "
            f"line promise and clock agree. The furthest off: {100 * worst:.0f}%."
        )
        yield Figure("Promised against measured", svg, note)
    for run in runs.having("compare"):
        yield Table(run.name, run.tables["compare"], VIEWS["compare"])
