"""The quality-speed frontier of one library: every method at every speed, in one sweep.

Each point is an architecture that a method finds at a share of the parent's cost. It is assembled
and measured: its summed replace-one score, the held-out KL of the assembled model, that KL after a
short distillation on equal tokens for all where `train` is given, and the promised and, where asked
for, the measured speed. A `child` stage builds any of them:
[child] architecture = "frontier", point = "mip-1.5".

A finished search, distillation and timing is a file each: a killed sweep loses one at most.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tessera.data.documents import heldout
from tessera.model.checkpoint import load_model
from tessera.plot import Series, line_chart
from tessera.puzzle.compare import CompareConfig, quality, speeds
from tessera.puzzle.constraints import NAMES
from tessera.puzzle.cost_table import Scenario, read_costs
from tessera.puzzle.library import assemble
from tessera.puzzle.program import SearchError
from tessera.puzzle.race import HeatConfig, heat
from tessera.puzzle.search import SearchConfig, find
from tessera.puzzle.space import Unit
from tessera.runs.files import atomic_write
from tessera.runs.recipe import validate
from tessera.runs.run import Run, read_table
from tessera.table import nearest
from tessera.train.optim import DocumentTrainConfig

Method = Literal["mip", "uniform", "dropped", "dropped-attention"]
METHODS: tuple[Method, ...] = ("mip", "uniform", "dropped", "dropped-attention")
LOG_SPAN = 20  # KL of more than this ratio is drawn on a logarithmic axis
Row = dict[str, Any]


class FrontierConfig(BaseModel):
    """Which points to find, and what to measure of each.

    points: shares of the parent's `constraint`: 1.5 of its throughput, 0.7 of its bytes.
    search: more of a [search] table for every point, as { servable = ["vllm"] } or a `conditional`,
    whose architecture is then a method of its own. lrs: rates to distil at, the best one counts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    constraint: str = "throughput"
    points: tuple[float, ...] = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
    methods: tuple[Method, ...] = METHODS
    search: dict[str, Any] = {}
    train: DocumentTrainConfig | None = None
    lrs: tuple[float, ...] = ()
    cosine: float = Field(default=1.0, ge=0)
    tokens: int = Field(default=16_384, ge=1)
    measure: bool = False  # time each model in pairs with the parent
    rounds: int = Field(default=9, ge=3)

    @field_validator("constraint")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in NAMES:
            raise ValueError(f"{value!r} is no cost; {nearest(value, NAMES)}")
        return value

    @model_validator(mode="after")
    def _searches(self) -> FrontierConfig:
        for method in self.methods:
            for share in self.points:
                self.at(method, share)
        if not self.points or not self.methods:
            raise ValueError("nothing to sweep: give at least one of `points` and of `methods`")
        return self

    def at(self, method: Method, share: float) -> SearchConfig:
        """The search of one method at one share of the parent."""
        constraints = {**self.search.get("constraints", {}), self.constraint: f"{share}x"}
        table = {**self.search, "method": method, "constraints": constraints}
        return validate(SearchConfig, table, "search")


def resumable(file: Path, compute: Callable[[], Any]) -> Any:
    """What `compute` returns, as JSON values, from `file` where it was finished before."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(compute()))
    return json.loads(file.read_text())


def found_at(config: FrontierConfig, method: Method, share: float, inputs: dict) -> Row:
    """{found: a row of architectures.json by method}, or {reason} where there is none."""
    try:
        rows = find(config.at(method, share), inputs)
    except SearchError as error:
        return {"found": {}, "reason": str(error)}
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row["method"], row)
    return {"found": first, "reason": None}


def points_of(config: FrontierConfig, run: Run, inputs: dict) -> tuple[list[Row], list[Row]]:
    """(every architecture of the sweep with its name, a row for every one that was not found)."""
    found, missing = [], []
    for method in config.methods:
        for share in config.points:
            file = run.state_path / f"search-{method}-{share:g}.json"
            one = resumable(file, lambda m=method, s=share: found_at(config, m, s, inputs))
            for name, row in one["found"].items():
                found.append({"name": f"{name}-{share:g}", "point": share, **row})
            if one["reason"]:
                place = {"name": f"{method}-{share:g}", "method": method, "point": share}
                missing.append({**place, "meets": False, "reason": one["reason"]})
            run.say(f"{method} at {share:g}x {config.constraint}: {_told(one)}")
    return found, missing


def _told(one: Row) -> str:
    if one["reason"]:
        return f"not reached: {one['reason'].splitlines()[0]}"
    return f"{len(one['found'])} found"


def share_of(row: Row, column: str) -> float | None:
    """What an architecture is promised to cost, or to do, as a share of the parent's."""
    own, parent = row["predicted"].get(column), row["parent"].get(column)
    return own / parent if own and parent else None


def meets(row: Row, constraint: str) -> bool:
    """True for an architecture within its budget; the simple methods only come near it."""
    if "meets" in row:
        return row["meets"]
    share = share_of(row, constraint)
    assert share is not None
    slack = 1e-6 * row["point"]
    if constraint == "throughput":
        return share >= row["point"] - slack
    return share <= row["point"] + slack


def summed_score(words: Sequence[Sequence[str]], scores: Sequence[Mapping], metric: str) -> float:
    """The sum of an architecture's replace-one scores; a pair trained together is one of them."""
    table = {(r["layer"], r["kind"], r["word"]): float(r[metric]) for r in scores}
    total = 0.0
    for layer, pair in enumerate(words):
        whole = Unit.pair(layer, *pair)
        apart = [Unit(layer, kind, word) for kind, word in whole.parts]
        total += sum(table.get(key, 0.0) for key in ([whole] if whole in table else apart))
    return total


def measured_quality(row: Row, config: FrontierConfig, run: Run, inputs: dict) -> Row:
    """kl_before, and after distillation kl, lm_loss, agreement and the rate they were reached at.

    Without `train` they are those of the assembled model.
    """
    if config.train is None:
        batches = heldout(
            inputs["data"], sequence_length=256, microbatch_tokens=4096, tokens=config.tokens
        )
        parent = load_model(inputs["parent"], frozen=True)
        child = assemble(load_model(inputs["parent"]), inputs["library"] / "library", row["words"])
        own = quality(parent, child, batches)
        return {"kl_before": own["kl"], **own}
    ran = []
    for lr in config.lrs or (config.train.lr,):
        train = config.train.model_copy(update={"lr": lr})
        chosen = HeatConfig(train=train, cosine=config.cosine, tokens=config.tokens)
        path = run.path / "heats" / (row["name"] + f"-lr{lr:g}" * (len(config.lrs) > 1))
        ran.append({**heat(path, row["words"], chosen, run, inputs), "lr": lr})
    finite = [one for one in ran if one["kl"] is not None]
    return min(finite or ran, key=lambda one: one["kl"] or 0.0)


def measured_speed(row: Row, config: FrontierConfig, run: Run, inputs: dict) -> Row:
    """`speedup` over the parent, rounds taking turns; empty unless `measure`."""
    if not config.measure:
        return {}
    scenario = next(iter(read_costs(inputs["costs"]).scenarios.values()))
    timing = CompareConfig(scenario=Scenario(**scenario.model_dump()), rounds=config.rounds)
    child = assemble(load_model(inputs["parent"]), inputs["library"] / "library", row["words"])
    pair = {"parent": load_model(inputs["parent"], frozen=True)}
    pair["child"] = child.requires_grad_(False).eval()
    return {"speedup": speeds(pair, timing, row["name"], run.quiet)["child"]["speedup"]}


def table_row(row: Row, config: FrontierConfig, scores: Sequence[Mapping], own: Row) -> Row:
    """A row of `tables/frontier.jsonl`."""
    metric = str(config.search.get("minimize", "kl"))
    return {
        "name": row["name"],
        "method": row["method"],
        "point": row["point"],
        "share": share_of(row, config.constraint),
        "promised": share_of(row, "throughput"),
        "meets": meets(row, config.constraint),
        "parameters": share_of(row, "parameters"),
        "score": summed_score(row["words"], scores, metric),
        **own,
        "words": row["words"],
    }


def chart(rows: Sequence[Row], config: FrontierConfig, column: str, title: str) -> str | None:
    """KL against what is swept, a line for each method, as SVG; None where nothing is to draw.

    The x axis is the measured speed where it was measured.
    """
    timed = config.measure and config.constraint == "throughput"
    x = "speedup" if timed else "share"
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        if row.get(x) and (row.get(column) or 0) > 0:
            told = f"{row['name']}: {row[x]:.2f}x {config.constraint}, KL {row[column]:.4f}"
            lines.setdefault(row["method"], []).append((row[x], row[column], told))
    heights = [y for points in lines.values() for _, y, _ in points]
    if not heights:
        return None
    what = f"{'measured' if timed else 'promised'} {config.constraint}, times the parent's"
    return line_chart(
        [Series(name, sorted(set(points))) for name, points in lines.items()],
        title=title,
        x=what,
        y="held-out KL to the parent (nats a token)",
        log=max(heights) > LOG_SPAN * min(heights),
    )


def stage(config: FrontierConfig, run: Run, inputs: dict[str, Any]) -> None:
    """Stage `frontier`: `tables/frontier.jsonl`, `tables/architectures.json` and the charts."""
    found, missing = points_of(config, run, inputs)
    scores = read_table(inputs["scores"], "scores")
    measured: dict[str, Row] = {}  # methods and points often agree on an architecture
    rows: list[Row] = []
    for row in found:
        key = json.dumps(row["words"])
        if key not in measured:
            file = run.state_path / f"measured-{row['name']}.json"
            measured[key] = resumable(
                file,
                lambda one=row: {
                    **measured_quality(one, config, run, inputs),
                    **measured_speed(one, config, run, inputs),
                },
            )
        rows.append(table_row(row, config, scores, measured[key]))
        run.say(_quality_told(rows[-1]))
    order = {name: i for i, name in enumerate(dict.fromkeys(r["method"] for r in rows + missing))}
    rows = sorted(rows + missing, key=lambda row: (order[row["method"]], row["point"]))
    run.write_table("frontier", rows)
    run.write_json("architectures", found)
    _draw(rows, config, run)


def _quality_told(row: Row) -> str:
    told = f"{row['name']}: KL {row['kl_before']:.4f}"
    after = "not finite" if row["kl"] is None else f"{row['kl']:.4f}"
    return told if row["kl"] == row["kl_before"] else f"{told} -> {after}"


def _draw(rows: Sequence[Row], config: FrontierConfig, run: Run) -> None:
    """`frontier.svg`, and `frontier-before.svg` where the models were distilled, too."""
    title = "What speed costs" if config.constraint == "throughput" else "What size costs"
    charts = {"frontier": ("kl", f"{title}, assembled")}
    if config.train:
        tokens = config.train.steps * config.train.tokens_per_step
        charts = {
            "frontier": ("kl", f"{title}, after {tokens:,} tokens of distillation"),
            "frontier-before": ("kl_before", f"{title}, before distillation"),
        }
    for name, (column, text) in charts.items():
        svg = chart(rows, config, column, text)
        if svg:
            run.write_file(f"{name}.svg", svg)
            run.say(f"drawn in {run.path / f'{name}.svg'}")
