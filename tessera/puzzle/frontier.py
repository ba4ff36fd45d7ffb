"""The quality-speed frontier of one library: every method at every speed, in one sweep.

Each point is the architecture that a method finds at a share of the parent's cost, assembled and
measured, distilled where `train` is given. Each finished search, distillation and timing is a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from tessera import dist
from tessera.model.checkpoint import open_model
from tessera.model.placed import PlacedConfig
from tessera.model.placement import Placement
from tessera.model.transformer import Transformer
from tessera.puzzle.compare import CompareConfig, quality, speeds
from tessera.puzzle.constraints import NAMES
from tessera.puzzle.cost_table import read_costs, share_of
from tessera.puzzle.library import assemble
from tessera.puzzle.program import SearchError
from tessera.puzzle.race import HeatConfig, heat
from tessera.puzzle.score import HeldoutConfig
from tessera.puzzle.search import SearchConfig, find
from tessera.runs.files import resumable
from tessera.runs.recipe import validate
from tessera.runs.run import Run
from tessera.table import nearest
from tessera.train.optim import DocumentTrainConfig

Method = Literal["mip", "uniform", "dropped", "dropped-attention"]
Row = dict[str, Any]


class FrontierConfig(PlacedConfig):
    """points: shares of the parent's `constraint`. search: more of a [search] table for every one,
    as { servable = ["vllm"] } or a `conditional`, which is then a method of its own. lrs: rates to
    distil at, of which the best counts."""

    constraint: str = "throughput"
    points: tuple[float, ...] = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
    methods: tuple[Method, ...] = get_args(Method)
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
    def _check(self) -> FrontierConfig:
        for method in self.methods:
            for share in self.points:
                self.at(method, share)
        if not self.points or not self.methods:
            raise ValueError("nothing to sweep: give at least one of `points` and of `methods`")
        return self

    def at(self, method: Method, share: float) -> SearchConfig:
        constraints = {**self.search.get("constraints", {}), self.constraint: f"{share}x"}
        table = {**self.search, "method": method, "constraints": constraints}
        return validate(SearchConfig, table, "search")


def sweep(
    config: FrontierConfig, run: Run, inputs: dict
) -> tuple[list[tuple[Row, float]], list[Row]]:
    """(every architecture of the sweep with its name, and its summed score; a row for each point
    where there is none)."""

    def search(method: Method, share: float) -> Row:
        try:
            rows, solver, _ = find(config.at(method, share), inputs, run=run)
        except SearchError as error:
            return {"found": {}, "reason": str(error)}
        first: dict[str, tuple[Row, float]] = {}
        for row in rows:
            first.setdefault(row["method"], (row, solver.candidates.total(row["words"])))
        return {"found": first, "reason": None}

    found, missing = [], []
    for method in config.methods:
        for share in config.points:
            file = run.state_path / f"search-{method}-{share:g}.json"
            one = _together(file, lambda m=method, s=share: search(m, s))
            for name, (row, score) in one["found"].items():
                found.append(({"name": f"{name}-{share:g}", "point": share, **row}, score))
            result = f"{len(one['found'])} found"
            if one["reason"]:
                place = {"name": f"{method}-{share:g}", "method": method, "point": share}
                missing.append({**place, "meets": False, "reason": one["reason"]})
                result = f"not reached: {one['reason'].splitlines()[0]}"
            run.say(f"{method} at {share:g}x {config.constraint}: {result}")
    return found, missing


def _together(file: Path, compute: Callable[[], Row]) -> Row:
    """`resumable`, by all processes of a job: the main one's result, in each of them."""
    found = None if dist.on_main(file.exists) else compute()
    return dist.on_main(lambda: resumable(file, lambda: found))


def _pair(row: Row, placement: Placement, inputs: dict) -> dict[str, Transformer]:
    """The parent, and an architecture of its library."""
    parent = open_model(inputs["parent"])
    child = assemble(parent, inputs["library"] / "library", row["words"])
    both = {"parent": parent, "child": child}
    return {name: placement.load(one, frozen=True) for name, one in both.items()}


def measured_quality(row: Row, config: FrontierConfig, run: Run, inputs: dict) -> Row:
    """kl_before, and after distillation kl, lm_loss, agreement and the rate they were reached at;
    without `train` those of the assembled model."""
    if config.train is None:
        batches = HeldoutConfig(tokens=config.tokens).heldout(inputs["data"])
        placement = config.placement(inputs["parent"], inputs["parent"])  # which bounds a child
        pair = _pair(row, placement, inputs)
        own = quality(pair["parent"], pair["child"], batches, placement.layout)
        return {"kl_before": own["kl"], **own}
    ran = []
    for lr in config.lrs or (config.train.lr,):
        train = config.train.model_copy(update={"lr": lr})
        chosen = HeatConfig(train=train, cosine=config.cosine, tokens=config.tokens)
        path = run.path / "heats" / (row["name"] + f"-lr{lr:g}" * (len(config.lrs) > 1))
        ran.append({**heat(path, row["words"], chosen, run, inputs), "lr": lr})
    finite = [one for one in ran if one["kl"] is not None]
    return min(finite or ran, key=lambda one: one["kl"] or 0.0)


def measured(row: Row, config: FrontierConfig, run: Run, inputs: dict) -> Row:
    """`measured_quality` and, with `measure`, the `speedup` over the parent."""
    found = measured_quality(row, config, run, inputs)
    if not config.measure:
        return found
    scenario = next(iter(read_costs(inputs["costs"]).scenarios.values()))
    timing = CompareConfig(scenario=scenario, rounds=config.rounds)
    placement = config.placement(inputs["parent"], inputs["parent"])
    if placement.layout.data_rank:
        return found  # one tensor group measures alone
    timed = speeds(_pair(row, placement, inputs), timing, row["name"], run.quiet)
    return found | {"speedup": timed["child"]["speedup"]}


def stage(config: FrontierConfig, run: Run, inputs: dict[str, Any]) -> None:
    """Stage `frontier`: write `tables/frontier.jsonl` and `tables/architectures.json`."""
    found, missing = sweep(config, run, inputs)
    known: dict[str, Row] = {}  # methods and points often agree on an architecture
    rows: list[Row] = []
    for row, score in found:
        key = json.dumps(row["words"])
        if key not in known:
            file = run.state_path / f"measured-{row['name']}.json"
            known[key] = _together(file, lambda one=row: measured(one, config, run, inputs))
        own = known[key]
        rows.append(
            {
                **{column: row[column] for column in ("name", "method", "point")},
                "share": share_of(row, config.constraint),
                "promised": share_of(row, "throughput"),
                "meets": row["meets"],
                "parameters": share_of(row, "parameters"),
                "score": score,
                **own,
                "words": row["words"],
            }
        )
        line = f"{row['name']}: KL {own['kl_before']:.4f}"
        if own["kl"] != own["kl_before"]:
            line += " -> " + ("not finite" if own["kl"] is None else f"{own['kl']:.4f}")
        run.say(line)
    order = {name: i for i, name in enumerate(dict.fromkeys(r["method"] for r in rows + missing))}
    rows = sorted(rows + missing, key=lambda row: (order[row["method"]], row["point"]))
    run.write_table("frontier", rows)
    run.write_json("architectures", [row for row, _ in found])
