"""The sections of a report: functions from the runs of a recipe to what a page shows of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

from tessera.model.config import FFN, GQA, Attention, Chain, ModelConfig, SwiGLU
from tessera.model.source import ancestors, model_config, origin
from tessera.report.charts import Series, chart
from tessera.report.explain import explain, headline
from tessera.report.show import largest, status
from tessera.runs.files import RunError
from tessera.runs.plan import flat
from tessera.runs.run import (
    Manifest,
    read_json,
    read_manifest,
    read_metrics,
    read_table,
    read_timings,
    runs_in,
    whole_lines,
)
from tessera.table import VIEWS, Column, cell, clock, count, size

Row = dict[str, Any]


@dataclass(frozen=True)
class RunData:
    """One run; what it lacks reads as empty, and so does what is damaged, which is told of in
    `problems`."""

    path: Path
    manifest: Manifest
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.manifest.name

    @cached_property
    def metrics(self) -> list[Row]:
        return self._whole(read_metrics)

    @cached_property
    def timings(self) -> list[Row]:
        return self._whole(read_timings)

    @cached_property
    def tables(self) -> dict[str, list[Row]]:
        found = {}
        for file in sorted((self.path / "tables").glob("*.jsonl")):
            found[file.stem] = self._whole(lambda path, name=file.stem: read_table(path, name))
        return found

    def _whole(self, read: Callable[[Path], list[Row]]) -> list[Row]:
        try:
            return read(self.path)
        except RunError as error:
            self.problems.append(str(error))
            return []

    @property
    def tokens(self) -> float:
        """Tokens that its steps went through."""
        rows = [r for r in self.timings if r.get("seconds") and r.get("tokens_per_second")]
        return sum(row["seconds"] * row["tokens_per_second"] for row in rows)

    def lines(self, name: str) -> list[Row]:
        """A file of JSON lines beside the tables; a torn last line is none."""
        return self._whole(lambda path: whole_lines(path / name)[0])


@dataclass(frozen=True)
class Runs:
    """The runs of a recipe in the order they began, or those one run was made from."""

    path: Path
    all: tuple[RunData, ...]
    problems: list[str] = field(default_factory=list)  # what is damaged, and so left out

    def having(self, table: str) -> list[RunData]:
        """The runs that hold a table of this name."""
        return [run for run in self.all if run.tables.get(table)]

    def find(self, name: str) -> RunData | None:
        return next((run for run in self.all if run.name == name), None)


def read_runs(path: Path) -> Runs:
    """Raises RunError where there is neither a run nor a directory of runs."""
    if (path / "run.json").is_file():
        found = [one for one in ancestors(path) if (one / "run.json").is_file()]
    else:
        found = runs_in(path)
    if not found:
        raise RunError(f"{path} holds no runs; give a recipe's runs (runs/NAME) or one of them")
    runs, problems = [], []
    for one in found:
        try:
            runs.append(RunData(one, read_manifest(one), problems))
        except RunError as error:
            problems.append(str(error))
    if not runs:
        raise RunError(problems[0])
    return Runs(path, tuple(sorted(runs, key=lambda run: run.manifest.started)), problems)


@dataclass(frozen=True)
class Text:
    kind: ClassVar = "text"
    text: str


@dataclass(frozen=True)
class Table:
    """`view` says how known keys are shown, the others follow; folded: a click away."""

    kind: ClassVar = "table"
    name: str
    rows: Sequence[Row]
    view: Sequence[Column] = ()
    folded: bool = False


@dataclass(frozen=True)
class Figure:
    """A chart: SVG of `charts.py` and a note."""

    kind: ClassVar = "figure"
    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class Mosaic:
    """A row a layer, of attention and FFN (word, size now, size before), in percent of the most."""

    kind: ClassVar = "mosaic"
    title: str
    layers: Sequence[Sequence[tuple[str, float, float]]]
    note: str = ""


@dataclass(frozen=True)
class Samples:
    """Texts that models wrote, under the question: (question, [(label, text)])."""

    kind: ClassVar = "samples"
    items: Sequence[tuple[str, Sequence[tuple[str, str]]]]


Block = Text | Table | Figure | Mosaic | Samples


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


def lines(rows: Sequence[Row], keys: Sequence[str]) -> list[Series]:
    """The keys' values over the steps, as far as they were logged."""
    every = {key: [(r["step"], r[key]) for r in rows if r.get(key) is not None] for key in keys}
    return [Series(key, points) for key, points in every.items() if points]


def curves(runs: Runs) -> Iterator[Block]:
    """Loss, held-out loss, speed and use of the machine of every training."""
    yield Text(
        "Loss in nats a token; long lines are averages of neighbouring steps. MFU is the share of "
        "the machine's peak that the model's arithmetic took: measured on a CPU, the data sheet's "
        "of a GPU."
    )
    for run in runs.all:
        keys = list(dict.fromkeys(key for row in run.metrics for key in row))
        losses = [k for k in keys if k.startswith(("loss", "heldout")) or k in ("kl", "lm_loss")]
        log = not any(key.startswith("reward") for key in keys)  # a policy's loss has both signs
        if svg := chart(lines(run.metrics, losses), x="step", y="loss", log=log):
            yield Figure(f"{run.name}: loss", svg)
        for key, y in (("tokens_per_second", "tokens/s"), ("mfu", "MFU")):
            speed = lines(run.timings, [key])
            if svg := chart(speed, x="step", y=y):
                middle = median(p[1] for p in speed[0].points)
                yield Figure(f"{run.name}: {y}", svg, f"Median {cell(float(middle))}.")


def lineage(runs: Runs) -> Iterator[Block]:
    """Every run with its inputs, fingerprint and seed."""
    rows = [
        {
            "run": run.name,
            "stage": run.manifest.stage,
            "made from": ", ".join(one["path"] for one in flat(run.manifest.inputs)) or None,
            "status": status(run.manifest, run.path),
            "seed": str(run.manifest.seed),
            "fingerprint": run.manifest.fingerprint[:12],
        }
        for run in runs.all
    ]
    yield from map(Text, dict.fromkeys(runs.problems))
    yield Table("runs", rows)
    software = {tuple(sorted(run.manifest.versions.items())) for run in runs.all}
    for one in sorted(software):
        yield Text("Made with " + ", ".join(f"{name} {version}" for name, version in one) + ".")


def cost(runs: Runs) -> Iterator[Block]:
    """Time and tokens of every stage."""
    total = sum(run.manifest.seconds for run in runs.all)
    tokens = sum(run.tokens for run in runs.all)
    yield Text(
        f"{clock(total)} in all on the clock of the machine that ran it, {count(tokens)} tokens "
        "trained on (teacher and student of a distillation read the same tokens, counted once)."
    )
    rows = [
        {
            "run": run.name,
            "seconds": run.manifest.seconds,
            "share": run.manifest.seconds / total if total else None,
            "cpu": run.manifest.cpu_seconds or None,
            "tokens": run.tokens or None,
        }
        for run in sorted(runs.all, key=lambda run: -run.manifest.seconds)
    ]
    yield Table("cost", rows, VIEWS["cost"])


SHOWN = 4  # samples of each kind
LONGEST = 1200  # characters of a sample


def accuracy(runs: Runs) -> Iterator[Block]:
    """Each task's value against the tokens of an answer, a line from off to on."""
    evals = runs.having("eval")
    rows: list[Row] = [{"run": run.name} | row for run in evals for row in run.tables["eval"]]
    tasks: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(dict)
    for row in rows:
        if row.get("value") is not None and row.get("tokens") is not None:
            place = (row["tokens"], row["value"])
            tasks[row["task"]].setdefault(row["run"], []).append(place)
    for task, found in tasks.items():
        series = [Series(name, sorted(points)) for name, points in found.items()]
        metric = next(row["metric"] for row in rows if row["task"] == task)
        svg = chart(series, x="tokens an answer", y=metric)
        note = "A line joins one model's answers with reasoning off and on."
        yield Figure(task, svg, note)
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
            if svg := chart(lines(run.metrics, wanted), x="step", y=title):
                yield Figure(f"{run.name}: {title}", svg)
    for run in runs.having("curriculum"):
        rows = run.tables["curriculum"]
        for step in sorted({row["step"] for row in rows}):
            part = [row for row in rows if row["step"] == step]
            series = [
                Series(kind, [(r["pass_rate"], r[kind]) for r in part])
                for kind in ("planned", "actual")
            ]
            svg = chart(series, x="pass rate before training", y="share of the prompts")
            yield Figure(f"{run.name}: prompts from step {step}", svg)
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
            yield Samples([(r["prompt"], [(_worth(r), _cut(r["text"]))]) for r in rows])


def _worth(row: Mapping[str, Any]) -> str:
    """Of a kept sample; without a reward where none was asked for, or it could not be judged."""
    return row["kind"] if row["reward"] is None else f"{row['kind']}, reward {row['reward']:.2f}"


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
        yield Mosaic(run.name, bars(after, before), note)
        if found := explain(run.path):
            losses.append(Text(f"{run.name}: {headline(found)}"))
            name = f"{run.name}, layer by layer"
            losses.append(Table(name, found["layers"], VIEWS["taken"], folded=True))
    yield from losses


def bars(config: ModelConfig, parent: ModelConfig) -> list[list[tuple[str, float, float]]]:
    """The layers of a Mosaic: KV heads in percent of the parent's most, FFN width of its widest."""
    heads, widest = largest([*config.blocks, *parent.blocks])

    def percent(variant: Attention | FFN) -> float:
        match variant:
            case GQA(size):
                return round(100 * size / heads, 1)
            case SwiGLU(size):
                return round(100 * size / widest, 1)
            case Chain():
                return 4.0
            case _:
                return 0.0

    rows = []
    for layer, block in enumerate(config.blocks):
        own = parent.blocks[layer] if layer < len(parent.blocks) else block
        attention, ffn = block.words
        rows.append(
            [
                (attention, percent(block.attention), percent(own.attention)),
                (ffn, percent(block.ffn), percent(own.ffn)),
            ]
        )
    return rows


def frontier(runs: Runs) -> Iterator[Block]:
    """Harm against speed, or against what was constrained, for the program and simpler methods."""
    for run in runs.having("frontier"):
        rows = run.tables["frontier"]
        found = [row for row in rows if row.get("words")]
        timed = (key for key in ("speedup", "promised") if all(row.get(key) for row in found))
        key = next(timed, "share")
        what = "speed" if key != "share" else run.manifest.config.get("constraint", "cost")
        word = "measured" if key == "speedup" else "promised"
        better = "right" if what == "speed" else "left"
        note = f"Lower and further {better} is better. KL in nats a token; {what} is {word}."
        if any(not row.get("meets", True) for row in rows):
            note += f" A method that cannot reach a {what} stands at the most it reaches."
        states = {"kl": "as assembled, before any distillation"}
        if any(row.get("lr") for row in rows):
            states = {"kl": "after each was distilled", "kl_before": "before distillation"}
        for column, state in states.items():
            methods: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for row in found:
                if row.get(key) and row.get(column):
                    methods[row["method"]].append((row[key], row[column]))
            series = [Series(name, sorted(set(points))) for name, points in methods.items()]
            x = f"{what}, times the parent's ({word})"
            svg = chart(series, x=x, y="KL to the parent", log=True)
            yield Figure(f"Frontier, {state}", svg, note)
        bare = [{k: v for k, v in row.items() if k != "words"} for row in rows]
        yield Table(f"{run.name}: all points", bare, VIEWS["frontier"], folded=True)


def speed(runs: Runs) -> Iterator[Block]:
    """What the cost table promised, against the clock."""
    for run in runs.having("calibration"):
        rows = run.tables["calibration"]
        pairs = [(1e3 * r["promised_seconds"], 1e3 * r["measured_seconds"]) for r in rows]
        x, y = "promised, ms a batch", "measured, ms a batch"
        svg = chart([Series("model", pairs)], x=x, y=y, joined=False, diagonal=True)
        worst = max(abs(p / m - 1) for p, m in pairs)
        note = (
            f"{len(rows)} whole models timed against the sum of their blocks' costs; on the dashed "
            f"line promise and clock agree. The furthest off: {100 * worst:.0f}%."
        )
        yield Figure("Promised against measured", svg, note)
    for run in runs.having("compare"):
        yield Table(run.name, run.tables["compare"], VIEWS["compare"])


def summary(runs: Runs) -> Iterator[Block]:
    """Speed and closeness of what was compared, the last evaluations, exports, and the cost."""
    rows = [*_speeds(runs), *_answer_findings(runs), *_exports(runs)]
    if rows:
        spent = sum(run.manifest.seconds for run in runs.all)
        cpu = sum(run.manifest.cpu_seconds for run in runs.all)
        duration = clock(spent) + (f", {clock(cpu)} of CPU" if cpu else "")
        rows.append({"finding": "time", "value": duration, "of": f"{len(runs.all)} runs"})
        yield Table("summary", rows)


def _speeds(runs: Runs) -> Iterator[Row]:
    """Each compared model against the first, as it was measured and as it was promised."""
    for run in runs.having("compare"):
        first, *others = run.tables["compare"]
        for row in others:
            value = f"{row['speedup']:.2f}x"
            if row.get("promised"):
                value += f" (promised {row['promised']:.2f}x)"
            value += f", {row['agreement']:.1%} of its next tokens"
            yield {"finding": f"speed against {first['model']}", "value": value, "of": row["model"]}


def _answer_findings(runs: Runs) -> Iterator[Row]:
    """What the last model that was asked each task in chats said, with the error of each share."""
    evaluations = [
        run
        for run in runs.having("eval")
        if any(row.get("mode") in ("on", "off", "none") for row in run.tables["eval"])
    ]
    last = {row["task"]: run for run in evaluations for row in run.tables["eval"]}
    for run in evaluations:
        for row in run.tables["eval"]:
            if row.get("value") is None or last[row["task"]] is not run:
                continue
            error = f" ± {row['stderr']:.3f}" if row.get("stderr") is not None else ""
            value = f"{row['value']:.3f}{error}"
            if row.get("tokens") is not None:
                value += f", {row['tokens']:.1f} tokens"
            if row.get("obedience") is not None:
                value += f", the switch obeyed by {row['obedience']:.1%}"
            mode = f", thinking {row['mode']}" if row["mode"] in ("on", "off") else ""
            yield {"finding": f"{row['task']}{mode}", "value": value, "of": run.name}


def _exports(runs: Runs) -> Iterator[Row]:
    """Whether the files of an export compute what the model does."""
    for run in runs.all:
        if (run.path / "tables" / "export.json").is_file():
            export = read_json(run.path, "export")
            parity = export.get("parity") or {}
            checked = f"{parity.get('tokens_equal')} of {parity.get('tokens')} greedy tokens equal"
            value = f"{export['format']}, {checked if parity else 'not checked'}"
            yield {"finding": "export", "value": value, "of": run.name}
