"""The search: the best architectures under what serving them may cost (Puzzle §2.6).

What the user's constraints mean is in `constraints.py`, the batches to choose from in `cases.py`,
the words in `candidates.py`, the integer program in `program.py`, and over all batches in
`sweep.py`; `baselines.py` has the simple methods, `conditional.py` scores that follow what is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from tessera.export.engines import engines_of
from tessera.model.config import KINDS, ModelConfig
from tessera.model.source import load_config
from tessera.puzzle import baselines
from tessera.puzzle.candidates import Architecture, Candidates
from tessera.puzzle.conditional import ConditionalConfig, Rescorer, Words, polish, tighten
from tessera.puzzle.constraints import Case, Demand, cases, check
from tessera.puzzle.cost_table import Costs, read_costs, unavailable
from tessera.puzzle.prices import shadow_prices
from tessera.puzzle.program import SearchError
from tessera.puzzle.promises import promised, told
from tessera.puzzle.score import METRICS
from tessera.puzzle.space import Space, offered, read_space
from tessera.puzzle.sweep import Effort, Found, search_cases
from tessera.runs.plan import Step
from tessera.runs.run import Run, read_json, read_table

Method = Literal["mip", "uniform", "dropped", "dropped-attention", "greedy"]


class ScenarioBudget(BaseModel):
    """One scenario's weight where scenarios are mixed, and budgets of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: float = Field(default=1.0, gt=0)
    constraints: dict[str, float | str] = {}  # each replaces the one of that name for all

    @field_validator("constraints", mode="before")
    @classmethod
    def _understood(cls, value: Any) -> Any:
        if value and isinstance(value, dict):
            check(value)
        return value


class SearchConfig(BaseModel):
    """What to minimise, and what serving may cost.

    `method`: the integer program, or one of the baselines it is compared with, at the same budget:
    one pair of words everywhere, whole layers dropped by block influence, attention dropped by the
    score of its removal, or the best block each layer's share of the budget buys.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scenarios: dict[str, ScenarioBudget] = {}  # of the cost stage, where one differs
    constraints: dict[str, float | str] = Field(default={}, validate_default=True)
    minimize: str = "kl"  # a column of scores.jsonl where lower is better
    servable: tuple[str, ...] = ()  # engines that must load the child, or a preset such as "any"
    method: Method = "mip"
    conditional: ConditionalConfig | None = None  # one more architecture, by scores that follow it
    time_limit: float = Field(default=60.0, gt=0)
    solutions: int = Field(default=1, ge=1)  # how many diverse ones, for a race to choose from
    overlap: float = Field(default=0.8, gt=0, lt=1)  # share of places two of them may agree in
    prices: bool = True  # solve again at budgets one percent looser and tighter

    @field_validator("constraints", mode="before")
    @classmethod
    def _understood(cls, value: Any, info: ValidationInfo) -> Any:
        own = info.data.get("scenarios", {})
        if isinstance(value, dict) and (value or not any(o.constraints for o in own.values())):
            check(value)
        return value

    @field_validator("servable", mode="before")
    @classmethod
    def _engines(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        listed = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
        return engines_of(names) if listed else value

    def warnings(self, step: Step, steps: Sequence[Step]) -> list[str]:
        """A sentence where layers are to be dropped and the space is known to offer no noop."""
        kinds = {"dropped": KINDS, "dropped-attention": KINDS[:1]}.get(self.method, ())
        words = offered(step.inputs["scores"], steps) if kinds else None
        missing = [kind for kind in kinds if words is not None and "noop" not in words[kind]]
        if not missing:
            return []
        return [
            f'method = "{self.method}" removes layers, and the space offers no noop for '
            f"the {' nor for the '.join(missing)}: add it to space.{missing[-1]} of the [bld] table"
        ]

    @property
    def demand(self) -> Demand:
        own = {name: one.constraints for name, one in self.scenarios.items() if one.constraints}
        return Demand(self.constraints, own, {n: one.weight for n, one in self.scenarios.items()})

    @property
    def effort(self) -> Effort:
        return Effort(self.time_limit, self.solutions, self.overlap)


def search(
    config: SearchConfig,
    parent: ModelConfig,
    space: Space,
    scores: Sequence[Mapping],
    costs: Costs,
    share: float = 1.0,
    near: tuple[Architecture, int] | None = None,
) -> list[Found]:
    """The best architectures of the integer program, best first.

    Fewer than `config.solutions` where the space holds no more that differ enough. `share` below 1
    holds them only to limits that far on the way from the parent's own cost to what was asked.
    near: an architecture, and how many places may hold another word.
    """
    candidates = Candidates.of(parent, space, config.servable, scores, config.minimize)
    candidates = replace(candidates, near=near)
    choices = cases(config.demand, costs, parent.words)
    if share < 1:
        choices = [case.towards(parent.words, share) for case in choices]
    return search_cases(candidates, choices, config.effort)


@dataclass(frozen=True)
class Problem:
    """What a search stage reads, understood."""

    config: SearchConfig
    parent: ModelConfig
    space: Space
    scores: Sequence[Mapping]
    costs: Costs
    candidates: Candidates
    cases: Sequence[Case]

    @classmethod
    def read(cls, config: SearchConfig, inputs: Mapping) -> Problem:
        """inputs: paths of the runs parent, scores and costs."""
        parent = load_config(inputs["parent"])
        space = read_space(inputs["scores"]).without(unavailable(inputs["costs"]))
        scores = read_table(inputs["scores"], "scores")
        costs = read_costs(inputs["costs"])
        candidates = Candidates.of(parent, space, config.servable, scores, config.minimize)
        choices = cases(config.demand, costs, parent.words)
        return cls(config, parent, space, scores, costs, candidates, choices)


def conditional_search(problem: Problem, inputs: Mapping) -> Found:
    """One architecture, by scores measured anew around what each step of it left."""
    config = problem.config
    assert config.conditional is not None
    for need in ("library", "data"):
        if inputs[need] is None:
            raise SearchError(f"search.conditional assembles what it scores: it needs a {need} run")
    if config.minimize not in METRICS:
        raise SearchError(
            f"search.conditional measures {', '.join(METRICS[:3])} anew, and no {config.minimize}; "
            "minimise one of those, or leave conditional out"
        )
    rescore = Rescorer(
        config.conditional, inputs["parent"], inputs["library"], inputs["data"], problem.space
    )
    single = config.model_copy(update={"solutions": 1})
    found: dict[tuple, Found] = {}

    def solve_at(rows: Sequence[Mapping], share: float, **near: Any) -> Architecture:
        args = single, problem.parent, problem.space, rows, problem.costs, share
        one = search(*args, **near)[0]
        found[tuple(one.words)] = one
        return one.words

    def solve_near(rows: Sequence[Mapping], words: Words, changes: int) -> Architecture:
        return solve_at(rows, 1.0, near=(list(words), changes))

    def measure(words: Words) -> tuple[float, Sequence[Mapping]]:
        own, rows = rescore.measure(words)
        return own[config.minimize], rows

    conditional = config.conditional
    *_, words = tighten(conditional.rounds, problem.scores, solve_at, rescore)
    changes = max(1, round(conditional.changes * len(KINDS) * len(words)))
    words = polish(conditional.polish, words, changes, solve_near, measure)
    return replace(found[tuple(words)], solution=None)  # its score is of another table


def _architectures(problem: Problem, inputs: Mapping) -> list[tuple[str, Found]]:
    """(method, architecture), best first."""
    config, candidates, choices = problem.config, problem.candidates, problem.cases
    if config.method == "mip":
        found = [("mip", one) for one in search_cases(candidates, choices, config.effort)]
        if config.conditional:
            found.append(("conditional", conditional_search(problem, inputs)))
        return found
    if config.method == "uniform":
        one = baselines.uniform(candidates, choices)
    elif config.method == "greedy":
        one = baselines.greedy(candidates, choices)
    elif config.method == "dropped-attention":
        damage = baselines.removal_scores(candidates)
        one = baselines.dropped_attention(candidates, choices, damage)
    else:
        influence = read_json(inputs["scores"], "block_influence")
        one = baselines.dropped_layers(candidates, choices, influence)
    return [(config.method, one)]


def find(
    config: SearchConfig, inputs: Mapping, say: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Every architecture that a search gives, best first, as rows of `tables/architectures.json`.

    inputs: paths of the runs parent, scores, costs, and library and data or None. A row has
    method, words, predicted and parent (every cost column, summed), scenario, and whether it
    meets the constraints; score and gap where the integer program gave it; and `scenarios`, the
    same for each of several or where the batch was chosen.
    """
    return _find(Problem.read(config, inputs), inputs, say)[0]


def _find(
    problem: Problem, inputs: Mapping, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], Found]:
    found = _architectures(problem, inputs)
    rows = []
    for method, one in found:
        rows.append(promised(method, one, problem.parent.words, len(problem.cases) > 1))
        say(told(rows[-1], one))
    return rows, found[0][1]


def stage(config: SearchConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `search`: write `tables/architecture.json`, the child's words and what is promised."""
    problem = Problem.read(config, inputs)
    rows, best = _find(problem, inputs, run.say)
    run.write_json("architecture", rows[0])
    run.write_json("architectures", rows)
    if best.solution is not None and config.prices:
        prices = shadow_prices(problem.candidates, problem.cases, best, config.effort)
        for row in prices:
            run.say(row["told"])
        run.write_table("prices", prices)
