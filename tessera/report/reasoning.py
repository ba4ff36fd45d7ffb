"""Sections on what models can do: tasks with thinking on and off, reinforcement, their texts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from tessera.plot import Series
from tessera.report.blocks import Block, Figure, Samples, Table, Text
from tessera.report.chart import chart, legend
from tessera.report.runs import Row, Runs
from tessera.report.training import lines
from tessera.table import VIEWS

SHOWN = 4  # samples of each kind
LONGEST = 1200  # characters of a sample


def accuracy(runs: Runs) -> Iterator[Block]:
    """Each task's value against the tokens of an answer, a line from off to on."""
    evals = runs.having("eval")
    rows: list[Row] = [{"run": run.name} | row for run in evals for row in run.tables["eval"]]
    tasks: dict[str, dict[str, list[tuple[float, float, str]]]] = defaultdict(dict)
    for row in rows:
        if row.get("value") is None or row.get("tokens") is None:
            continue
        error = f" ± {row['stderr']:.3f}" if row.get("stderr") is not None else ""
        told = f"{row['run']}, {row['mode']}: {row['value']:.3f}{error}, {row['tokens']:.1f} tokens"
        place = (row["tokens"], row["value"], told)
        tasks[row["task"]].setdefault(row["run"], []).append(place)
    for task, found in tasks.items():
        series = [Series(name, sorted(points)) for name, points in found.items()]
        metric = next(row["metric"] for row in rows if row["task"] == task)
        svg = chart(series, x="tokens an answer", y=metric)
        note = "A line joins one model's answers with reasoning off and on."
        yield Figure(task, svg, note, legend(series))
    if rows:
        yield Table("eval", rows, VIEWS["eval"])


def reinforcement(runs: Runs) -> Iterator[Block]:
    """Reward and its parts, length, entropy, and the curriculum as planned and as it came."""
    for run in runs.all:
        keys = dict.fromkeys(key for row in run.metrics for key in row)
        rewards = [key for key in keys if key.startswith("reward")]
        if not rewards:
            continue
        for title, wanted in (
            ("reward and its parts", rewards),
            ("length of an answer, tokens", ["length"]),
            ("entropy, nats a token", ["entropy"]),
            ("shares of the answers", ["obedience", "truncated", "no_signal", "clipped"]),
        ):
            series = lines(run.metrics, wanted)
            if svg := chart(series, x="step", y=title):
                yield Figure(f"{run.name}: {title}", svg, "", legend(series))
    for run in runs.having("curriculum"):
        rows = run.tables["curriculum"]
        for step in sorted({row["step"] for row in rows}):
            part = [row for row in rows if row["step"] == step]
            series = [
                Series(kind, [(r["pass_rate"], r[kind], f"{r[kind]:.2f}") for r in part])
                for kind in ("planned", "actual")
            ]
            svg = chart(series, x="pass rate before training", y="share of the prompts")
            yield Figure(f"{run.name}: prompts from step {step}", svg, "", legend(series))
    for run in runs.having("pass_rates"):
        yield Table(f"{run.name}: pass rates before training", run.tables["pass_rates"])


def samples(runs: Runs) -> Iterator[Block]:
    """The same items answered by each model; then what a policy wrote first and last."""
    yield from _answers(runs)
    for run in runs.all:
        files = sorted((run.path / "samples").glob("*.jsonl"))
        if len(files) < 2:
            continue
        for word, file in (("first", files[0]), ("last", files[-1])):
            rows = run.lines(f"samples/{file.name}")[: 2 * SHOWN]
            yield Text(f"{run.name}: the {word} samples it kept (step {int(file.stem)}).")
            yield Samples(
                [
                    (r["prompt"], [(f"{r['kind']}, reward {r['reward']:.2f}", _cut(r["text"]))])
                    for r in rows
                ]
            )


def _answers(runs: Runs) -> Iterator[Block]:
    items: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for run in (one for one in runs.all if one.manifest.stage == "eval"):
        verdicts = {}
        for row in run.lines("verdicts.jsonl"):
            if "outcomes" in row:
                first = next(iter(row["outcomes"].values()), {})
                place = (row["task"], row["item"], row["mode"], row["sample"])
                verdicts[place] = first.get("verdict", "")
        for row in run.lines("records.jsonl"):
            if row.get("sample") or row.get("turn") or int(row["tokens"] or 0) == 0:
                continue
            place = (row["task"], row["item"])
            if place not in items and sum(task == row["task"] for task, _ in items) >= SHOWN // 2:
                continue
            verdict = verdicts.get((*place, row["mode"], 0), "")
            thought = f"{row['thought']}\n\n" if row.get("thought") else ""
            label = f"{run.name}, {row['mode']}{': ' + verdict if verdict else ''}"
            items[place].append((label, _cut(thought + row["text"])))
    if items:
        yield Text("The first items of each task, as every model answered them.")
        yield Samples([(f"{task}, item {item}", found) for (task, item), found in items.items()])


def _cut(text: str) -> str:
    left = len(text) - LONGEST
    return text if left <= 0 else f"{text[:LONGEST]}\n… and {left:,} more characters"
