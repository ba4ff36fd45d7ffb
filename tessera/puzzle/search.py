"""The integer program: the best architecture under what serving it may cost (Puzzle §2.6).

    minimise   Σ_ij score_ij x_ij
    subject to Σ_j x_ij = 1                         one word for each layer and kind
               base_c + Σ_ij cost_cij x_ij <= budget_c      for each constrained cost c
               x_ia + x_if <= 1                     pairs the serving engine cannot load
               Σ_ij y_ij x_ij <= α·places           for each earlier solution y

Solved to proven optimality by HiGHS; the gap is reported. Throughput becomes linear by
multiplying out: batch·new / seconds >= T  is  seconds <= batch·new / T.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import highspy
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from tessera.model.config import KINDS, ModelConfig
from tessera.model.servable import ENGINES, known, refusals
from tessera.model.weights import load_config
from tessera.puzzle.baselines import Architecture, dropped_layers, uniform_width
from tessera.puzzle.constraints import NAMES, CostTable, Scenario, budgets, check
from tessera.puzzle.infeasible import explain
from tessera.puzzle.space import Space, forbidden_pairs
from tessera.run import Run, read_json, read_table


class SearchError(ValueError):
    """A search that found nothing; the text says what to change."""


class Infeasible(SearchError):
    """No architecture of the space meets the constraints; the text says by how much."""


@dataclass(frozen=True)
class Option:
    """One word at one place: its score and its costs by column."""

    layer: int
    kind: str
    word: str
    score: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Solution:
    """The chosen options in order, their summed score, and how well it is proved."""

    options: tuple[Option, ...]
    score: float
    bound: float
    seconds: float

    @property
    def gap(self) -> float:
        return abs(self.score - self.bound) / max(1e-12, abs(self.score))


def solve(
    options: Sequence[Option],
    budgets: Mapping[str, float],
    forbidden: Sequence[tuple[int, str, str]] = (),
    time_limit: float = 60.0,
    earlier: Sequence[Solution] = (),
    overlap: float = 0.8,
) -> Solution:
    """The cheapest-scoring choice of one option a (layer, kind) within `budgets`.

    budgets: cost column -> most that the chosen options may sum to (base already subtracted).
    forbidden: (layer, attention word, FFN word) that may not stand together.
    earlier: solutions to differ from: at most `overlap` of the places may agree (Puzzle's α).
    Raises Infeasible where there is none, SearchError where the time did not do to find one.
    """
    places = {(o.layer, o.kind): None for o in options}
    rows = [[i for i, o in enumerate(options) if (o.layer, o.kind) == p] for p in places]
    solver = _program(options, rows, budgets, _pairs(options, forbidden))
    for solution in earlier:
        same = np.array([i for i, o in enumerate(options) if o in solution.options])
        solver.addRow(0.0, np.floor(overlap * len(rows)), len(same), same, np.ones(len(same)))
    solver.setOptionValue("time_limit", time_limit)
    solver.setOptionValue("mip_rel_gap", 1e-9)
    solver.run()
    info = solver.getInfo()
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        if solver.getModelStatus() == highspy.HighsModelStatus.kTimeLimit:
            raise SearchError(f"no architecture found in {time_limit:g} s; raise search.time_limit")
        told = ", ".join(f"{column} <= {budget:.6g}" for column, budget in budgets.items())
        raise Infeasible(f"no architecture meets all of {told}")
    values = np.array(solver.getSolution().col_value)
    chosen = tuple(options[max(row, key=lambda i: values[i])] for row in rows)
    score = sum(o.score for o in chosen)
    return Solution(chosen, score, float(info.mip_dual_bound), solver.getRunTime())


def _pairs(
    options: Sequence[Option], forbidden: Sequence[tuple[int, str, str]]
) -> list[tuple[int, int]]:
    index = {(o.layer, o.kind, o.word): i for i, o in enumerate(options)}
    keys = [((layer, "attention", a), (layer, "ffn", f)) for layer, a, f in forbidden]
    return [(index[a], index[f]) for a, f in keys if a in index and f in index]


def _program(
    options: Sequence[Option],
    rows: Sequence[Sequence[int]],
    budgets: Mapping[str, float],
    pairs: Sequence[tuple[int, int]],
) -> highspy.Highs:
    solver = highspy.Highs()
    solver.silent()
    count = len(options)
    solver.addVars(count, np.zeros(count), np.ones(count))
    solver.changeColsCost(count, np.arange(count), np.array([o.score for o in options]))
    integer = np.full(count, highspy.HighsVarType.kInteger)
    solver.changeColsIntegrality(count, np.arange(count), integer)
    for row in rows:
        solver.addRow(1.0, 1.0, len(row), np.array(row), np.ones(len(row)))
    for column, budget in budgets.items():
        costs = np.array([o.costs[column] for o in options])
        unit = max(1e-30, float(np.abs(costs).max()))  # rows near 1 keep HiGHS' tolerances honest
        solver.addRow(-highspy.kHighsInf, budget / unit, count, np.arange(count), costs / unit)
    for pair in pairs:
        solver.addRow(0.0, 1.0, 2, np.array(pair), np.ones(2))
    return solver


class SearchConfig(BaseModel):
    """What to minimise, and what serving may cost.

    `method`: the integer program, or one of the two baselines it is compared with, at the same
    budget: one FFN width everywhere, or whole layers dropped by block influence.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    constraints: dict[str, float | str]
    minimize: Literal["kl", "lm_loss"] = "kl"
    servable: tuple[str, ...] = ()  # engines that must load the child: "vllm", "llama.cpp", …
    method: Literal["mip", "uniform", "dropped"] = "mip"
    time_limit: float = Field(default=60.0, gt=0)
    solutions: int = Field(default=1, ge=1)  # how many diverse ones, for a race to choose from
    overlap: float = Field(default=0.8, gt=0, lt=1)  # share of places two of them may agree in

    @field_validator("constraints")
    @classmethod
    def _understood(cls, value: dict[str, float | str]) -> dict[str, float | str]:
        check(value)
        return value

    @field_validator("servable")
    @classmethod
    def _engines(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(known(engine, ENGINES, "engine") for engine in value)


def options_of(
    space: Space, scores: Sequence[Mapping], costs: CostTable, metric: str
) -> list[Option]:
    """Every word at every place; the parent's own words score 0."""
    table = {(r["layer"], r["kind"], r["word"]): r[metric] for r in scores}
    found = []
    for layer in range(len(space.layers)):
        for kind in KINDS:
            for i, word in enumerate(space.words(layer, kind)):
                score = 0.0 if i == 0 else float(table[layer, kind, word])
                found.append(Option(layer, kind, word, score, costs.words[kind, word]))
    return found


def search(
    config: SearchConfig,
    parent: ModelConfig,
    space: Space,
    scores: Sequence[Mapping],
    costs: CostTable,
) -> list[tuple[Architecture, Solution]]:
    """The best architectures, best first: words, and the solver's proof.

    Fewer than `config.solutions` where the space holds no more that differ enough.
    """
    limits = budgets(config.constraints, costs, parent.words)
    pairs = forbidden_pairs(space, parent, config.servable)
    forbidden = [(layer, a, f) for layer, found in enumerate(pairs) for a, f in found]
    options = options_of(space, scores, costs, config.minimize)
    found: list[tuple[Architecture, Solution]] = []
    while len(found) < config.solutions:
        earlier = [solution for _, solution in found]
        try:
            solution = solve(options, limits, forbidden, config.time_limit, earlier, config.overlap)
        except Infeasible:
            if found:
                break
            least = functools.partial(_least, options, forbidden, config.time_limit)
            told = explain(config.constraints, limits, costs, parent.words, least)
            raise Infeasible(told) from None
        chosen = {(o.layer, o.kind): o.word for o in solution.options}
        words = [(chosen[i, "attention"], chosen[i, "ffn"]) for i in range(len(space.layers))]
        refused = _first_refused(parent.with_words(words), config.servable)
        if refused is None:
            found.append((words, solution))
        else:
            forbidden.append((refused, *words[refused]))
    return found


def _least(
    options: Sequence[Option],
    forbidden: Sequence[tuple[int, str, str]],
    time_limit: float,
    column: str,
    budgets: Mapping[str, float],
) -> float | None:
    """The smallest sum of a column within the budgets; None where nothing is within them."""
    unit = max(1e-30, *(option.costs[column] for option in options))
    priced = [replace(option, score=option.costs[column] / unit) for option in options]
    try:
        return solve(priced, budgets, forbidden, time_limit).score * unit
    except SearchError:
        return None


def _first_refused(config: ModelConfig, engines: Sequence[str]) -> int | None:
    """Where to cut an architecture that an engine refuses as a whole, though no pair alone.

    The one such rule known: in vLLM a run of empty layers may not end in a bare FFN, since the
    residual starts in the first attention. Forbidding the first empty layer breaks the run.
    """
    reasons = [reason for engine in engines for reason in refusals(config, engine)]
    if not reasons:
        return None
    empty = [layer for layer, words in enumerate(config.words) if words[0] == "noop"]
    if not empty:
        raise Infeasible(f"{', '.join(engines)} cannot load any child here: {reasons[0]}")
    return empty[0]


def _told(own: Mapping[str, float], parent: Mapping[str, float], solution: Solution | None) -> str:
    """`1.29x throughput, 0.94x parameters promised; score 0.3189, gap 0.0e+00, 0.02 s`."""
    shares = {name: own[name] / parent[name] for name in NAMES if parent.get(name)}
    wanted = [f"{shares[k]:.2f}x {k}" for k in ("throughput", "parameters", "bytes") if k in shares]
    told = f"{', '.join(wanted)} promised"
    if solution is None:
        return told
    return f"{told}; score {solution.score:.4f}, gap {solution.gap:.1e}, {solution.seconds:.2f} s"


def stage(config: SearchConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `search`: write `tables/architecture.json`, the child's words and what is promised."""
    parent = load_config(inputs["parent"])
    layers = read_json(inputs["scores"], "space")
    space = Space(tuple((tuple(a), tuple(f)) for a, f in layers))
    scores = read_table(inputs["scores"], "scores")
    scenario = Scenario(**read_json(inputs["costs"], "scenario"))
    costs = CostTable.from_rows(read_table(inputs["costs"], "costs"), scenario)
    if config.method == "mip":
        found = search(config, parent, space, scores, costs)
    elif config.method == "uniform":
        found = [(uniform_width(config.constraints, parent, space, costs), None)]
    else:
        influence = read_json(inputs["scores"], "block_influence")
        found = [(dropped_layers(config.constraints, parent, influence, costs), None)]
    for words, solution in found:
        run.say(_told(costs.total(words), costs.total(parent.words), solution))
    common = {"parent": costs.total(parent.words), "scenario": scenario.model_dump()}
    results = [
        {
            "method": config.method,
            "words": words,
            "predicted": costs.total(words),
            **({"score": solution.score, "gap": solution.gap} if solution else {}),
            **common,
        }
        for words, solution in found
    ]
    run.write_json("architecture", results[0])
    run.write_json("architectures", results)
