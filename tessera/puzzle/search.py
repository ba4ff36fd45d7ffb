"""The search: the best architectures under what serving them may cost (Puzzle §2.6).

Every choice of batches is an integer program (`program.py`). All minimise the same scores, so the
best of their optima is proved by the smallest of their bounds. A program whose linear relaxation is
worse than what another reached is not solved; of equals the faster architecture is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from tessera import dist
from tessera.export.engines import engines_of, refusals
from tessera.model.config import KINDS, ModelConfig
from tessera.model.source import load_config
from tessera.puzzle import candidates as baselines
from tessera.puzzle.candidates import Architecture, Candidates, Found, chosen_words
from tessera.puzzle.constraints import (
    BatchChoice,
    Budgets,
    Constraint,
    Given,
    batch_choices,
    check_budgets,
)
from tessera.puzzle.cost_table import Costs, Words, read_costs, share_of, unavailable
from tessera.puzzle.program import (
    Infeasible,
    Option,
    SearchError,
    Solution,
    TimedOut,
    divisible,
    relax,
    solve,
)
from tessera.puzzle.score import METRICS, ConditionalConfig, Rescorer
from tessera.puzzle.space import Space, Unit, offered, read_space
from tessera.runs.plan import Step
from tessera.runs.recipe import Config
from tessera.runs.run import Run, read_json, read_table

STEPS = (0.01, 0.1)  # of a bound, in shadow prices
_PROVED = 1e-6
_SMALL = 1e-9  # a relative change below this is the solver's rounding
Row = dict[str, Any]
Rows = Sequence[Mapping]
Near = tuple[Architecture, int]  # an architecture, how many places may hold another word
Least = Callable[[str, Mapping[str, float]], float | None]


@dataclass(frozen=True)
class Solver:
    """The integer program over every choice of batches."""

    candidates: Candidates
    choices: Sequence[BatchChoice]
    time_limit: float = 60.0  # of each program
    solutions: int = 1
    overlap: float = 0.8  # the share of places that two solutions may agree in
    cuts: set[Unit] = field(default_factory=set)  # what engines turn out to refuse while solving

    def architectures(self) -> list[Found]:
        """Best first; fewer than wanted where no more differ enough. Raises Infeasible, which says
        the nearest that could be met, and TimedOut."""
        found: list[Found] = []
        while len(found) < self.solutions:
            try:
                found.append(self.best([one.solution for one in found if one.solution]))
            except Infeasible:
                if found:
                    break
                raise Infeasible(self._explain()) from None
        return found

    def best(self, earlier: Sequence[Solution] = ()) -> Found:
        found: list[tuple[tuple[float, float], Found, Solution]] = []
        timed_out: list[TimedOut] = []
        bounds: list[float] = []
        relaxed: list[tuple[float, BatchChoice]] = []
        for choice in self.choices:
            try:
                several = len(self.choices) > 1
                bound = divisible(*self._program(choice))[0] if several else -math.inf
                relaxed.append((bound, choice))
            except Infeasible:
                continue
        for bound, choice in sorted(relaxed, key=lambda pair: pair[0]):
            if found and bound > min(order for order, _, _ in found)[0] + 1e-8:
                bounds.append(bound)
                continue
            try:
                solution, words = self._solve(choice, earlier)
            except TimedOut as error:
                timed_out.append(error)
                bounds.append(max(bound, error.bound))
            except Infeasible:
                continue
            else:
                order = round(solution.score, 9), choice.seconds_per_token(words)
                found.append((order, Found(words, choice), solution))
        if not found and timed_out:
            raise timed_out[0]
        if not found:
            raise Infeasible("no architecture meets the constraints")
        _, best, solution = min(found, key=lambda one: one[0])
        bound = min(bounds + [one.bound for _, _, one in found])
        seconds = sum(one.seconds for _, _, one in found)
        return replace(best, solution=replace(solution, bound=bound, seconds=seconds))

    def _program(
        self, choice: BatchChoice
    ) -> tuple[list[Option], dict[str, float], list[tuple[int, str, str]]]:
        limits = choice.bounds() | self.candidates.limits
        options = self.candidates.options(choice, self.cuts)
        return options, limits, self.candidates.forbidden(self.cuts)

    def _solve(
        self, choice: BatchChoice, earlier: Sequence[Solution]
    ) -> tuple[Solution, Architecture]:
        """The best architecture at these batches that the engines can load.

        One refusal is of no pair of words alone: in vLLM a run of empty layers may not end in a
        bare FFN. Forbidding the first empty layer breaks the run.
        """
        candidates = self.candidates
        while True:
            solution = solve(*self._program(choice), self.time_limit, earlier, self.overlap)
            words = chosen_words(solution, len(candidates.space.layers))
            config = candidates.parent.with_words(words)
            reasons = [why for engine in candidates.engines for why in refusals(config, engine)]
            if not reasons:
                return solution, words
            empty = [layer for layer, (attention, _) in enumerate(words) if attention == "noop"]
            if not empty:
                engines = ", ".join(candidates.engines)
                raise SearchError(f"{engines} cannot load any child here: {reasons[0]}")
            self.cuts.add(Unit.pair(empty[0], *words[empty[0]]))

    def _explain(self) -> str:
        slacks = [(self.slack(choice), choice) for choice in self.choices]
        possible = [
            (sum(slack[one.key] / one.bound for one in choice.constraints), slack, choice)
            for slack, choice in slacks
            if slack is not None
        ]
        if not possible:
            return (
                "no architecture meets the constraints: whatever they were, no two words that the "
                f"engines ({', '.join(self.candidates.engines) or 'none named'}) can load fit "
                "together. Offer more words in the space of the [bld] table"
            )
        _, slack, choice = min(possible, key=lambda one: one[0])
        where = f" (nearest at {choice})" if len(self.choices) > 1 else ""
        return explain(choice, slack, lambda key, rest: self._least(choice, key, rest), where)

    def slack(self, choice: BatchChoice) -> dict[str, float] | None:
        """Constraint's key -> by how much to loosen it, the sum of relative changes the least; None
        where no choice of words is possible, whatever the constraints."""
        scales = {one.key: one.bound for one in choice.constraints}
        options, _, forbidden = self._program(choice)
        limits, hard = choice.bounds(), self.candidates.limits
        try:
            return relax(options, limits, scales, hard, forbidden, self.time_limit)
        except SearchError:
            return None

    def _least(self, choice: BatchChoice, key: str, bounds: Mapping[str, float]) -> float | None:
        options, _, forbidden = self._program(choice)
        unit = max(abs(option.costs[key]) for option in options) or 1.0
        priced = [replace(option, score=option.costs[key] / unit) for option in options]
        limits = {**bounds, **self.candidates.limits}
        try:
            return solve(priced, limits, forbidden, self.time_limit).score * unit
        except SearchError:
            return None


def explain(choice: BatchChoice, slack: Mapping[str, float], least: Least, where: str = "") -> str:
    """What was asked, a line a constraint that binds, and the cheapest set of changes that helps.

    slack: constraint's key -> by how much it is loosened in that set. least(key, others): the
    smallest sum of a constraint's cost over words within the other bounds; None if there is none.
    """
    bounds = choice.bounds()
    lines, changes = [], []
    for one in choice.constraints:
        others = {key: most for key, most in bounds.items() if key != one.key}
        for given, when in (({}, "in this space"), (others, "with the others as asked")):
            low = least(one.key, given)
            if low is not None and low - bounds[one.key] > _SMALL * one.bound:
                amount = _rounded(one, one.bound + (low - bounds[one.key]))
                text = f"at least {amount} is needed"
                if one.name == "fits":
                    memory = one.amount.text(float(f"{one.amount.number:.3g}"))
                    text += f", of the {memory} that there are"
                text = f"at most {amount} can be reached" if one.inverse else text
                lines.append(f"  {one.key} = {_as_given(one)}: {text} {when}")
                break
        if (share := slack[one.key] / one.bound) > _SMALL:
            percent = 100 * (share / (1 + share) if one.inverse else share)
            change = f"{percent:,.0f}" if percent >= 10 else f"{percent:.2g}"
            sign = "in" if one.name == "fits" else "="
            amount = _rounded(one, one.bound + slack[one.key])
            more = "less" if one.inverse else "more"
            changes.append(f"{one.key} {sign} {amount} ({change} % {more})")
    rest = ", the others as asked" if len(changes) < len(choice.constraints) else ""
    reasons = "\n".join(lines) or "  each can be met alone, but not all of them together"
    return (
        f"no architecture meets the constraints{where}:\n{reasons}\n"
        f"The cheapest way out: {', '.join(changes)}{rest}\n"
        "Or offer cheaper words in the space of the [bld] table. One attention and one FFN always "
        "stay"
    )


def _rounded(one: Constraint, total: float) -> str:
    value = one.in_unit(total)
    if value <= 0:
        return one.amount.text(0.0)
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    steps = math.floor(value / step + _SMALL) if one.inverse else math.ceil(value / step - _SMALL)
    return one.amount.text(steps * step)


def _as_given(one: Constraint) -> str:
    return f'"{one.given}"' if isinstance(one.given, str) else f"{one.given:,.6g}"


def shadow_prices(solver: Solver, found: Found) -> list[Row]:
    """What a little more or less of each budget would change, one row a budget of the recipe.

    Every budget is loosened and tightened by one percent, and by ten where one changes nothing,
    and the search solved again. `gain` is what a budget looser by `looser_by` lowers the score by,
    `loss` what one tighter by `tighter_by` raises it by; None where an optimum was not proved, or
    nothing meets the tighter budget. `price` is the dual of the linear relaxation, score a unit.
    Steps and price are in the unit of the budget.
    """
    choice = found.choice
    _, dual = divisible(*replace(solver, cuts=set())._program(choice))
    totals = choice.totals(found.words)
    rows = []

    def step(one: Constraint, factor: float) -> float:
        return abs(one.in_unit(one.bound * factor) - one.in_unit(one.bound))

    def slope(one: Constraint) -> float:
        return one.unit / one.in_unit(one.bound) ** 2 if one.inverse else one.unit

    for budget in dict.fromkeys(one.budget for one in choice.constraints):
        bounds = [one for one in choice.constraints if one.budget == budget]
        tight = max(bounds, key=lambda one: one.total(totals) / one.bound)
        up, gain, _ = _change(solver, found, budget, 1)
        down, loss, possible = _change(solver, found, budget, -1)
        row = {
            "budget": budget,
            "asked": tight.given,
            "unit": tight.amount.unit,
            "used": tight.in_unit(tight.total(totals)),
            "looser_by": step(tight, 1 + up),
            "gain": None if gain is None else max(0.0, -gain),
            "tighter_by": step(tight, 1 - down),
            "loss": None if loss is None else max(0.0, loss),
            "tighter_possible": possible,
            "price": sum(dual[one.key] * slope(one) for one in bounds),
        }
        row["binds"] = any(row[side] is None or row[side] > _PROVED for side in ("gain", "loss"))
        rows.append(row | {"told": _price_line(row, tight)})
    return rows


def _change(
    solver: Solver, found: Found, budget: str, sign: int
) -> tuple[float, float | None, bool]:
    """(relative step, how the score changes if that is proved, whether anything meets it): the
    first step that matters, else the last."""
    own, step, change = found.solution, 0.0, None
    assert own is not None
    for step in STEPS:
        scaled = [choice.scaled(budget, 1 + sign * step) for choice in solver.choices]
        try:
            solution = replace(solver, choices=scaled, cuts=set()).best().solution
        except Infeasible:
            return step, None, False
        except TimedOut:
            return step, None, True
        assert solution is not None
        change = solution.score - own.score if max(own.gap, solution.gap) < _PROVED else None
        if change is None or abs(change) > _PROVED:
            break
    return step, change, True


def _price_line(row: Row, one: Constraint) -> str:
    more, less = ("less", "more") if one.inverse else ("more", "less")
    used, up, down = (
        one.amount.text(float(f"{row[key]:.3g}")).strip('"')
        for key in ("used", "looser_by", "tighter_by")
    )
    reached = "reached" if one.inverse else "used"
    head = f"{row['budget']} = {_as_given(one)} ({used} {reached})"
    if not row["binds"]:
        return f"{head}: does not bind; {up} {more} buys nothing, {down} {less} costs nothing"
    price = f"{row['price']:.2g} per {row['unit'] or 'unit'}"
    if row["gain"] is None:
        gain = f"was not solved in time (by the relaxation, {price})"
    elif row["gain"] > _PROVED:
        gain = f"would lower the score by {row['gain']:.3g}"
    else:
        gain = f"buys nothing (words are whole; on average {price})"
    if not row["tighter_possible"]:
        loss = "cannot be met"
    elif row["loss"] is None:
        loss = "was not solved in time"
    else:
        loss = f"would cost {row['loss']:.3g}" if row["loss"] > _PROVED else "costs nothing"
    return f"{head}: {up} {more} {gain}, {down} {less} {loss}"


Method = Literal["mip", "uniform", "dropped", "dropped-attention", "greedy"]


class ScenarioBudget(Config):
    weight: float = Field(default=1.0, gt=0)
    constraints: dict[str, Given] = {}  # each replaces the one of that name for all

    @field_validator("constraints", mode="before")
    @classmethod
    def _check(cls, value: Any) -> Any:
        if value and isinstance(value, dict):
            check_budgets(value)
        return value


class SearchConfig(Config):
    """What to minimise, what serving may cost, and by which method (`candidates.py` has those
    beside the integer program)."""

    scenarios: dict[str, ScenarioBudget] = {}  # of the cost stage, where one differs
    constraints: dict[str, Given] = Field(default={}, validate_default=True)
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
    def _check(cls, value: Any, info: ValidationInfo) -> Any:
        own = info.data.get("scenarios", {})
        if isinstance(value, dict) and (value or not any(o.constraints for o in own.values())):
            check_budgets(value)
        return value

    @field_validator("servable", mode="before")
    @classmethod
    def _engines(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        listed = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
        return engines_of(names) if listed else value

    def warnings(self, step: Step, steps: Sequence[Step]) -> list[str]:
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
    def budgets(self) -> Budgets:
        own = {name: one.constraints for name, one in self.scenarios.items() if one.constraints}
        return Budgets(self.constraints, own, {n: one.weight for n, one in self.scenarios.items()})


Read = tuple[SearchConfig, ModelConfig, Space, Rows, Costs]


def solver_of(
    config: SearchConfig,
    parent: ModelConfig,
    space: Space,
    scores: Rows,
    costs: Costs,
    share: float = 1.0,
    near: Near | None = None,
) -> Solver:
    """share: below 1, with limits that far on the way from the parent's cost to what was asked."""
    choices = batch_choices(config.budgets, costs, parent.words)
    if share < 1:
        choices = [choice.towards(share) for choice in choices]
    found = Candidates.of(parent, space, config.servable, scores, config.minimize, near)
    return Solver(found, choices, config.time_limit, config.solutions, config.overlap)


def tighten(
    rounds: int,
    rows: Rows,
    solve_at: Callable[[Rows, float], Words],
    rescore: Callable[[Words], Rows],
) -> list[Words]:
    """The architecture after each round r = 1 … R, under limits r/R of the way from the parent's
    cost, by scores measured anew around the one before: replace-one scores add up only while few
    words change. rows: around the parent. rescore(words): around that architecture."""
    found: list[Words] = []
    for number in range(1, rounds + 1):
        rows = rescore(found[-1]) if found else rows
        found.append(solve_at(rows, number / rounds))
    return found


def polish(
    rounds: int,
    words: Words,
    changes: int,
    solve_near: Callable[[Rows, Words, int], Words],
    measure: Callable[[Words], tuple[float, Rows]],
) -> Words:
    """An architecture that is measured no worse than `words`, by searches in a trust region: half
    as many changes are tried where the measured value did not fall.

    solve_near(rows, words, n): the best words under the limits with at most n other places.
    measure(words): what is minimised, measured, and the change each word makes to it.
    """
    own, rows = measure(words)
    for _ in range(rounds):
        near = solve_near(rows, words, changes)
        if list(near) == list(words):
            break
        found = measure(near)
        if found[0] < own:
            words, (own, rows) = near, found
        elif changes == 1:
            break
        else:
            changes //= 2
    return words


def conditional_search(read: Read, inputs: Mapping, run: Run | None) -> Found:
    config, parent, space, scores, costs = read
    conditional = config.conditional
    assert conditional is not None
    for need in ("library", "data"):
        if inputs[need] is None:
            raise SearchError(f"search.conditional assembles what it scores: it needs a {need} run")
    if config.minimize not in METRICS:
        raise SearchError(
            f"search.conditional measures {', '.join(METRICS[:3])} anew, and no {config.minimize}; "
            "minimise one of those, or leave conditional out"
        )
    parent_run, library, data = (inputs[need] for need in ("parent", "library", "data"))
    rescorer = Rescorer(conditional, parent_run, library, data, space, run)
    found: dict[tuple, Found] = {}

    def solve_at(rows: Rows, share: float, near: Near | None = None) -> Architecture:
        solver = solver_of(config, parent, space, rows, costs, share, near)
        (one,) = dist.on_main(replace(solver, solutions=1).architectures)
        found[tuple(one.words)] = one
        return one.words

    def measure(words: Any) -> tuple[float, Rows]:
        own, rows = rescorer.measure(words)
        return own[config.minimize], rows

    def solve_near(rows: Rows, words: Words, most: int) -> Architecture:
        return solve_at(rows, 1.0, ([(a, f) for a, f in words], most))

    *_, words = tighten(conditional.rounds, scores, solve_at, lambda words: measure(words)[1])
    changes = max(1, round(conditional.changes * len(KINDS) * len(words)))
    words = polish(conditional.polish, words, changes, solve_near, measure)
    return replace(found[tuple(words)], solution=None)  # its score is of another table


def architecture_row(method: str, found: Found, several: bool) -> Row:
    """A row of `architectures.json`: words, and every cost column of the architecture and its
    parent in the scenario that weighs most. With `several` batches to choose from, or several
    scenarios, `scenarios` has the same numbers of each."""
    choice, solution, served = found.choice, found.solution, {}
    for name, table in choice.tables.items():
        reference = choice.reference[name] or table
        served[name] = {
            "predicted": table.total(found.words),
            "parent": reference.total(choice.parent),
            "scenario": table.scenario.model_dump(),
            "parent_batch": reference.scenario.batch,
        }
    first = served[max(choice.weights, key=choice.weights.__getitem__)]
    row = {"method": method, "words": found.words, "predicted": first["predicted"]}
    row |= {"score": solution.score, "gap": solution.gap} if solution else {}
    row |= {"meets": found.meets, "parent": first["parent"], "scenario": first["scenario"]}
    return row | ({"scenarios": served} if several or len(served) > 1 else {})


def summary(row: Row, found: Found) -> str:
    """`1.29x throughput, 0.94x parameters promised; score 0.3189; optimal, proved: gap 0; 1 s`."""
    served = row.get("scenarios", {"": row})
    parts = []
    for name, one in served.items():
        columns = {c: share_of(one, c) for c in ("throughput", "parameters", "bytes")}
        shares = ", ".join(f"{share:.2f}x {c}" for c, share in columns.items() if share)
        parts.append(f"{name}: {shares}" if len(served) > 1 else shares)
    line = f"{'; '.join(parts)} promised"
    if "scenarios" in row:
        parents = (f"{name} {one['parent_batch']}".strip() for name, one in served.items())
        line += f", at {found.choice} (the parent's: {', '.join(parents)})"
    if not found.meets:
        line += "; it does NOT meet the constraints, and is the nearest there is"
    return line + (f"; {optimality(found.solution)}" if found.solution else "")


def optimality(solution: Solution) -> str:
    score = f"score {solution.score:.4f}"
    if solution.gap < _PROVED:
        return f"{score}; optimal, proved: gap 0; {solution.seconds:.2f} s"
    return (
        f"{score}; gap {100 * solution.gap:.2g} % after {solution.seconds:.0f} s; "
        "raise search.time_limit to prove more"
    )


def find(
    config: SearchConfig,
    inputs: Mapping,
    say: Callable[[str], None] = lambda _: None,
    run: Run | None = None,
) -> tuple[list[Row], Solver, Found]:
    """(rows of `tables/architectures.json`, best first; the solver; what the first row is of).
    Every process calls it: the main one solves, all of them score for a conditional search.
    inputs: paths of the runs parent, scores, costs, and library and data or None. run: whose state
    keeps what a conditional search has measured."""
    read = (
        config,
        load_config(inputs["parent"]),
        read_space(inputs["scores"]).without(unavailable(inputs["costs"])),
        read_table(inputs["scores"], "scores"),
        read_costs(inputs["costs"]),
    )
    solver = solver_of(*read)
    candidates, choices = solver.candidates, solver.choices
    if config.method == "mip":
        found = [("mip", one) for one in dist.on_main(solver.architectures)]
        if config.conditional:
            found.append(("conditional", conditional_search(read, inputs, run)))
    else:
        methods: dict[str, Callable[..., Found]] = {
            "uniform": baselines.uniform,
            "greedy": baselines.greedy,
            "dropped-attention": baselines.dropped_attention,
            "dropped": baselines.dropped_layers,
        }
        given = [read_json(inputs["scores"], "block_influence")] * (config.method == "dropped")
        method = partial(methods[config.method], candidates, choices, *given)
        found = [(config.method, dist.on_main(method))]
    rows = []
    for method, one in found:
        rows.append(architecture_row(method, one, len(choices) > 1))
        say(summary(rows[-1], one))
    return rows, solver, found[0][1]


def stage(config: SearchConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `search`: write `tables/architecture.json`, the child's words and what is promised."""
    rows, solver, best = find(config, inputs, run.say, run)
    run.write_json("architecture", rows[0])
    run.write_json("architectures", rows)
    if best.solution is not None and config.prices and dist.is_main():
        prices = shadow_prices(solver, best)
        for row in prices:
            run.say(row["told"])
        run.write_table("prices", prices)
