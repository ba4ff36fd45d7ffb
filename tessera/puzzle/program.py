"""The integer program: the best choice of one option a place (Puzzle §2.6).

    minimise   Σ_o score_o x_o
    subject to Σ_{o covers p} x_o = 1            every place (layer, kind) is covered once
               Σ_o cost_co x_o <= most_c         for each limit c
               x_a + x_f <= 1                    pairs that may not stand together
               Σ_o y_o x_o <= α·places           for each earlier solution y

An option covers one place, or both places of a layer (a pair trained together). Solved to proven
optimality by HiGHS; the gap is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import highspy
import numpy as np

from tessera.model.config import KINDS

Place = tuple[int, str]


class SearchError(ValueError):
    """A search that found nothing; the text says what to change."""


class Infeasible(SearchError):
    """No choice of options is within the limits; the text says by how much."""


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
        return abs(self.score - self.bound) / max(1e-12, abs(self.score))


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
    Raises Infeasible where there is none, SearchError where the time did not do to find one.
    """
    places = list(dict.fromkeys(place for option in options for place in option.places))
    solver = _program(options, places, limits, _pairs(options, forbidden))
    for solution in earlier:
        same = np.array([i for i, o in enumerate(options) if o in solution.options], dtype=int)
        weights = np.array([float(len(options[i].places)) for i in same])
        solver.addRow(0.0, np.floor(overlap * len(places)), len(same), same, weights)
    solver.setOptionValue("time_limit", time_limit)
    solver.setOptionValue("mip_rel_gap", 1e-9)
    solver.run()
    info = solver.getInfo()
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        if solver.getModelStatus() == highspy.HighsModelStatus.kTimeLimit:
            raise SearchError(f"no architecture found in {time_limit:g} s; raise search.time_limit")
        told = ", ".join(f"{name} <= {most:.6g}" for name, most in limits.items())
        raise Infeasible(f"no architecture meets all of {told}")
    values = np.array(solver.getSolution().col_value)
    chosen = tuple(o for o, value in zip(options, values, strict=True) if value > 0.5)
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
    places: Sequence[Place],
    limits: Mapping[str, float],
    pairs: Sequence[tuple[int, int]],
) -> highspy.Highs:
    solver = highspy.Highs()
    solver.silent()
    count = len(options)
    solver.addVars(count, np.zeros(count), np.ones(count))
    solver.changeColsCost(count, np.arange(count), np.array([o.score for o in options]))
    integer = np.full(count, highspy.HighsVarType.kInteger)
    solver.changeColsIntegrality(count, np.arange(count), integer)
    covering: dict[Place, list[int]] = {place: [] for place in places}
    for i, option in enumerate(options):
        for place in option.places:
            covering[place].append(i)
    for row in covering.values():
        solver.addRow(1.0, 1.0, len(row), np.array(row), np.ones(len(row)))
    for name, most in limits.items():
        costs = np.array([o.costs[name] for o in options])
        unit = max(1e-30, float(np.abs(costs).max()))  # rows near 1 keep HiGHS' tolerances honest
        solver.addRow(-highspy.kHighsInf, most / unit, count, np.arange(count), costs / unit)
    for pair in pairs:
        solver.addRow(0.0, 1.0, 2, np.array(pair), np.ones(2))
    return solver
