"""The integer program: the best choice of one option a place (Puzzle §2.6).

    minimise   Σ_o score_o x_o
    subject to Σ_{o covers p} x_o = 1            every place (layer, kind) is covered once
               Σ_o cost_co x_o <= most_c         for each limit c
               x_a + x_f <= 1                    pairs that may not stand together
               Σ_o y_o x_o <= α·places           for each earlier solution y

An option covers one place, or both places of a layer (a pair trained together). Solved to proven
optimality by HiGHS; the gap is reported. `relax` minimises Σ_c slack_c / scale_c instead, with
cost <= most + slack; `divisible` is the program without its integers.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import highspy
import numpy as np

from tessera.model.config import KINDS

Place = tuple[int, str]


class SearchError(ValueError):
    """A search that found nothing; the text says what to change."""


class Infeasible(SearchError):
    """No choice of options is within the limits; the text says by how much."""


class TimedOut(SearchError):
    """The time did not do to find anything; `bound` is what any score is at least."""

    def __init__(self, text: str, bound: float = -math.inf) -> None:
        super().__init__(text)
        self.bound = bound


@dataclass(frozen=True)
class Option:
    """What may stand in a layer: its score, and its cost under each limit's name.

    kind is "attention" or "ffn", or "block" for a pair of words (`gqa-2+swiglu-256`) that covers
    both places of the layer.
    """

    layer: int
    kind: str
    word: str
    score: float
    costs: Mapping[str, float]

    @property
    def key(self) -> tuple[int, str, str]:
        return self.layer, self.kind, self.word

    @property
    def places(self) -> tuple[Place, ...]:
        """The places it covers."""
        kinds = KINDS if self.kind == "block" else (self.kind,)
        return tuple((self.layer, kind) for kind in kinds)


@dataclass(frozen=True)
class Solution:
    """The chosen options in order, their summed score, and how well it is proved."""

    options: tuple[Option, ...]
    score: float
    bound: float
    seconds: float

    @property
    def gap(self) -> float:
        return abs(self.score - self.bound) / max(1e-9, abs(self.score))


def solve(
    options: Sequence[Option],
    limits: Mapping[str, float],
    forbidden: Sequence[tuple[int, str, str]] = (),
    time_limit: float = 60.0,
    earlier: Sequence[Solution] = (),
    overlap: float = 0.8,
) -> Solution:
    """The cheapest-scoring choice that covers every place once, within `limits`.

    limits: name -> the most that `costs[name]` of the chosen options may sum to.
    forbidden: (layer, attention word, FFN word) that may not be chosen as two options.
    earlier: solutions to differ from: at most `overlap` of the places may agree (Puzzle's α).
    Raises Infeasible where there is none, TimedOut where the time did not do to find one, and
    SearchError for a score that is no finite number.
    """
    places = _places(options)
    solver = _program(options, limits, forbidden)
    for solution in earlier:
        taken = {option.key for option in solution.options}
        same = np.array([i for i, o in enumerate(options) if o.key in taken], dtype=int)
        weights = np.array([float(len(options[i].places)) for i in same])
        solver.addRow(0.0, np.floor(overlap * len(places)), len(same), same, weights)
    values = _solved(solver, limits, time_limit)
    chosen = tuple(o for o, value in zip(options, values, strict=True) if value > 0.5)
    score = sum(o.score for o in chosen)
    bound = max(float(solver.getInfo().mip_dual_bound), _floor(options))
    return Solution(chosen, score, bound, solver.getRunTime())


def relax(
    options: Sequence[Option],
    limits: Mapping[str, float],
    scales: Mapping[str, float],
    hard: Mapping[str, float],
    forbidden: Sequence[tuple[int, str, str]] = (),
    time_limit: float = 60.0,
) -> dict[str, float]:
    """Name -> by how much each of `limits` must give way, Σ slack/scale the least that helps.

    `hard` are limits that do not give way. Raises Infeasible where even that does not help.
    """
    priceless = [replace(option, score=0.0) for option in options]
    solver = _program(priceless, {**limits, **hard}, forbidden)
    first = len(_places(options))
    for row, name in enumerate(limits, first):
        unit = _unit(options, name)
        slack = np.array([-scales[name] / unit])  # counted in scales, so that each costs 1
        solver.addCol(1.0, 0.0, highspy.kHighsInf, 1, np.array([row]), slack)
    values = _solved(solver, limits, time_limit)[len(options) :]
    return {
        name: max(0.0, value) * scales[name] for name, value in zip(limits, values, strict=True)
    }


def divisible(
    options: Sequence[Option],
    limits: Mapping[str, float],
    forbidden: Sequence[tuple[int, str, str]] = (),
) -> tuple[float, dict[str, float]]:
    """(the best score were words divisible, by how much one unit more of each limit lowers it).

    The linear relaxation: its score is a bound that no choice of words goes below, and its duals,
    never negative, are that bound's slopes. Raises Infeasible.
    """
    solver = _program(options, limits, forbidden)
    continuous = np.full(len(options), highspy.HighsVarType.kContinuous)
    solver.changeColsIntegrality(len(options), np.arange(len(options)), continuous)
    _solved(solver, limits, highspy.kHighsInf)
    duals = solver.getSolution().row_dual
    first = len(_places(options))
    prices = {
        name: max(0.0, -duals[row]) / _unit(options, name) for row, name in enumerate(limits, first)
    }
    return float(solver.getInfo().objective_function_value), prices


def _solved(solver: highspy.Highs, limits: Mapping[str, float], time_limit: float) -> np.ndarray:
    """The values of a program's columns. Raises Infeasible, TimedOut."""
    solver.setOptionValue("time_limit", time_limit)
    solver.setOptionValue("mip_rel_gap", 1e-9)
    solver.setOptionValue("mip_abs_gap", 1e-9)
    solver.run()
    info = solver.getInfo()
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        if solver.getModelStatus() == highspy.HighsModelStatus.kTimeLimit:
            told = f"no architecture found in {time_limit:g} s; raise search.time_limit"
            raise TimedOut(told, float(info.mip_dual_bound))
        told = ", ".join(f"{name} <= {most:.6g}" for name, most in limits.items())
        raise Infeasible(f"no architecture meets all of {told}")
    return np.array(solver.getSolution().col_value)


def _floor(options: Sequence[Option]) -> float:
    """What no choice scores below: HiGHS knows no bound at all where time ends at once."""
    least: dict[Place, float] = {}
    for option in options:
        for place in option.places:
            share = option.score / len(option.places)
            least[place] = min(share, least.get(place, share))
    return sum(least.values())


def _places(options: Sequence[Option]) -> list[Place]:
    return list(dict.fromkeys(place for option in options for place in option.places))


def _unit(options: Sequence[Option], name: str) -> float:
    """What a limit's row is divided by: rows near 1 keep HiGHS' tolerances honest."""
    return max(abs(option.costs[name]) for option in options) or 1.0


def _pairs(
    options: Sequence[Option], forbidden: Sequence[tuple[int, str, str]]
) -> list[tuple[int, int]]:
    index = {option.key: i for i, option in enumerate(options)}
    keys = [((layer, "attention", a), (layer, "ffn", f)) for layer, a, f in forbidden]
    return [(index[a], index[f]) for a, f in keys if a in index and f in index]


def _require_finite(options: Sequence[Option]) -> None:
    """HiGHS says that nothing is feasible where a score is NaN, and bounds nothing with -inf."""
    for option in options:
        if not math.isfinite(option.score):
            raise SearchError(
                f"layer {option.layer}, {option.kind} {option.word}: its score is {option.score}, "
                "and no sum with that can be compared; score it again, or take the word out of the "
                "space"
            )


@contextmanager
def _no_banner() -> Iterator[None]:
    """HiGHS greets on the process's own stdout, before a solver can be told to be silent."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _program(
    options: Sequence[Option],
    limits: Mapping[str, float],
    forbidden: Sequence[tuple[int, str, str]],
) -> highspy.Highs:
    """Rows in order: one a place, one a limit, one a pair that is forbidden.

    Raises SearchError for a score that is no finite number.
    """
    _require_finite(options)
    with _no_banner():
        solver = highspy.Highs()
    solver.silent()
    count = len(options)
    solver.addVars(count, np.zeros(count), np.ones(count))
    solver.changeColsCost(count, np.arange(count), np.array([o.score for o in options]))
    integer = np.full(count, highspy.HighsVarType.kInteger)
    solver.changeColsIntegrality(count, np.arange(count), integer)
    covering: dict[Place, list[int]] = {place: [] for place in _places(options)}
    for i, option in enumerate(options):
        for place in option.places:
            covering[place].append(i)
    for row in covering.values():
        solver.addRow(1.0, 1.0, len(row), np.array(row), np.ones(len(row)))
    for name, most in limits.items():
        costs = np.array([o.costs[name] for o in options])
        unit = _unit(options, name)
        solver.addRow(-highspy.kHighsInf, most / unit, count, np.arange(count), costs / unit)
    for pair in _pairs(options, forbidden):
        solver.addRow(0.0, 1.0, 2, np.array(pair), np.ones(2))
    return solver
