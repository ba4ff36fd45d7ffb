"""Why no architecture meets the constraints, the nearest that could be met, the cheapest way out.

For each limit the least cost that any architecture has is found twice by the integer program
itself: alone, and under the other limits. The first that lies above what was asked is told in the
user's own words and units, rounded to the side that can be met. The cheapest way out loosens the
limits together, so that the sum of their relative changes is least.

The integer program over every case, and the best of what it finds (Puzzle §2.6).

A case is a choice of batches. All cases minimise the same scores, so their optima compare as they
are, and the proof of the best is the worst of all their bounds. A case whose linear relaxation is
worse than what another reached is not solved. Among equals the faster is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from tessera.export.engines import refusals
from tessera.model.config import ModelConfig
from tessera.puzzle.candidates import Architecture, Candidates, Cut, words_of
from tessera.puzzle.constraints import Case, Limit
from tessera.puzzle.program import (
    Infeasible,
    SearchError,
    Solution,
    TimedOut,
    divisible,
    relax,
    solve,
)

Least = Callable[[str, Mapping[str, float]], float | None]
_SMALL = 1e-9  # a relative change below this is the solver's rounding


def explain(case: Case, slack: Mapping[str, float], least: Least, where: str = "") -> str:
    """What was asked, one line a limit that binds, and the cheapest set of changes that helps.

    slack: limit's key -> how far it gives way in that set. least(key, others): the smallest sum
    of a limit's cost over the words of any architecture within the others; None if there is none.
    """
    room = case.room()
    lines = []
    for one in case.limits:
        others = {key: most for key, most in room.items() if key != one.key}
        for given, when in (({}, "in this space"), (others, "with the others as asked")):
            low = least(one.key, given)
            if low is not None and low - room[one.key] > _SMALL * one.most:
                reached = _reached(one, low + one.base(case.tables))
                lines.append(f"  {one.key} = {_asked(one)}: {reached} {when}")
                break
    told = "\n".join(lines) or "  each can be met alone, but not all of them together"
    return (
        f"no architecture meets the constraints{where}:\n{told}\n"
        f"{_way_out(case, slack)}\n"
        "Or offer cheaper words in the space of the [bld] table. One attention and one FFN always "
        "stay"
    )


def _way_out(case: Case, slack: Mapping[str, float]) -> str:
    """`The cheapest way out: latency = "34 ms" (13 % more), the others as asked`."""
    changes = []
    for one in case.limits:
        share = slack[one.key] / one.most
        if share > _SMALL:
            changes.append(f"{nearest(one, one.most + slack[one.key])} ({_change(one, share)})")
    rest = ", the others as asked" if len(changes) < len(case.limits) else ""
    return f"The cheapest way out: {', '.join(changes)}{rest}"


def _change(one: Limit, share: float) -> str:
    """`13 % more`; of a rate, by how much it falls."""
    percent = 100 * (share / (1 + share) if one.inverse else share)
    told = f"{percent:,.0f}" if percent >= 10 else f"{percent:.2g}"
    return f"{told} % {'less' if one.inverse else 'more'}"


def nearest(one: Limit, total: float) -> str:
    """The budget that just allows a total, as a recipe has it: `latency = "34 ms"`."""
    number = rounded(one.number(total), up=not one.inverse)
    if one.name == "fits":
        return f"{one.key} in {one.amount.told(number)}"
    return f"{one.key} = {one.amount.told(number)}"


def _reached(one: Limit, total: float) -> str:
    """`at most "1.32x" can be reached`, `at least 12,400 is needed`."""
    told = one.amount.told(rounded(one.number(total), up=not one.inverse))
    if one.name == "fits":
        there = one.amount.told(float(f"{one.amount.number:.3g}"))
        return f"at least {told} is needed, of the {there} that there are"
    return f"at most {told} can be reached" if one.inverse else f"at least {told} is needed"


def rounded(value: float, up: bool) -> float:
    """Three significant digits, to the side that can be met."""
    if value <= 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    steps = math.ceil(value / step - _SMALL) if up else math.floor(value / step + _SMALL)
    return steps * step


def _asked(one: Limit) -> str:
    return f'"{one.asked}"' if isinstance(one.asked, str) else f"{one.asked:,.6g}"


@dataclass(frozen=True)
class Found:
    """An architecture, the case that it is to be served in, and the solver's proof, if any."""

    words: Architecture
    case: Case
    solution: Solution | None = None
    meets: bool = True


@dataclass(frozen=True)
class Effort:
    """How long each program may take, and how many architectures that differ how much."""

    time_limit: float = 60.0
    solutions: int = 1
    overlap: float = 0.8


def search_cases(candidates: Candidates, cases: Sequence[Case], effort: Effort) -> list[Found]:
    """The best architectures, best first; fewer than wanted where no more differ enough.

    Raises Infeasible, which says the nearest that could be met, and TimedOut.
    """
    found: list[Found] = []
    cuts: set[Cut] = set()
    while len(found) < effort.solutions:
        try:
            found.append(best_of(candidates, cases, effort, cuts, [f.solution for f in found]))
        except Infeasible as error:
            if found:
                break
            raise Infeasible(_why(candidates, cases, effort, cuts) or str(error)) from None
    return found


def best_of(
    candidates: Candidates,
    cases: Sequence[Case],
    effort: Effort,
    cuts: set[Cut],
    earlier: Sequence[Solution | None] = (),
) -> Found:
    """The best architecture over all cases that differs from `earlier`.

    cuts: what engines turned out to refuse, added to. Raises Infeasible where no case has one.
    """
    found: list[Found] = []
    timed_out: list[TimedOut] = []
    bounds: list[float] = []
    for bound, case in _hopeful(candidates, cases, cuts):
        if found and bound > min(map(_order, found))[0] + 1e-8:
            bounds.append(bound)
            continue
        try:
            found.append(_best(candidates, case, effort, cuts, [s for s in earlier if s]))
        except TimedOut as error:
            timed_out.append(error)
            bounds.append(max(bound, error.bound))
        except Infeasible:
            continue
    if not found and timed_out:
        raise timed_out[0]
    if not found:
        raise Infeasible("no architecture meets the constraints")
    best = min(found, key=_order)
    assert best.solution is not None
    bounds += [one.solution.bound for one in found if one.solution]
    seconds = sum(one.solution.seconds for one in found if one.solution)
    return replace(best, solution=replace(best.solution, bound=min(bounds), seconds=seconds))


def _hopeful(
    candidates: Candidates, cases: Sequence[Case], cuts: Collection[Cut]
) -> list[tuple[float, Case]]:
    """(a bound on its score, case), the best bound first, those without any answer left out.

    The bound is the linear relaxation's: cheap, and so close that most cases need no answer.
    """
    if len(cases) == 1:
        return [(-float("inf"), cases[0])]
    found = []
    for case in cases:
        options, forbidden = candidates.options(case, cuts), candidates.forbidden(cuts)
        try:
            found.append((divisible(options, case.room() | candidates.limits, forbidden)[0], case))
        except Infeasible:
            continue
    return sorted(found, key=lambda pair: pair[0])


def _order(found: Found) -> tuple[float, float]:
    assert found.solution is not None
    return round(found.solution.score, 9), found.case.seconds_per_token(found.words)


def _best(
    candidates: Candidates, case: Case, effort: Effort, cuts: set[Cut], earlier: Sequence[Solution]
) -> Found:
    """The best architecture of a case that the engines can load."""
    limits = case.room() | candidates.limits
    while True:
        solution = solve(
            candidates.options(case, cuts),
            limits,
            candidates.forbidden(cuts),
            effort.time_limit,
            earlier,
            effort.overlap,
        )
        words = words_of(solution, len(candidates.space.layers))
        config = candidates.parent.with_words(words)
        refused = _first_refused(config, candidates.engines)
        if refused is None:
            return Found(words, case, solution)
        cuts.add((refused, *words[refused]))


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
        raise SearchError(f"{', '.join(engines)} cannot load any child here: {reasons[0]}")
    return empty[0]


def _why(candidates: Candidates, cases: Sequence[Case], effort: Effort, cuts: set[Cut]) -> str:
    """Why no case has an answer, told of the one that is nearest to having one."""
    nearest = [(relaxation(candidates, case, effort, cuts), case) for case in cases]
    possible = [(slack, case) for slack, case in nearest if slack is not None]
    if not possible:
        return (
            "no architecture meets the constraints: whatever they were, no two words that the "
            f"engines ({', '.join(candidates.engines) or 'none named'}) can load fit together. "
            "Offer more words in the space of the [bld] table"
        )
    slack, case = min(possible, key=lambda pair: sum(_relative(*pair).values()))

    def least(key: str, others: Mapping[str, float]) -> float | None:
        return _least(candidates, case, effort, cuts, key, others)

    where = f" (nearest at {case})" if len(cases) > 1 else ""
    return explain(case, slack, least, where)


def _relative(slack: Mapping[str, float], case: Case) -> dict[str, float]:
    return {one.key: slack[one.key] / one.most for one in case.limits}


def relaxation(
    candidates: Candidates, case: Case, effort: Effort, cuts: Collection[Cut] = ()
) -> dict[str, float] | None:
    """Limit's key -> how far it must give way, the sum of relative changes the least that helps.

    None where no choice of words is possible, whatever the limits.
    """
    scales = {one.key: one.most for one in case.limits}
    options, forbidden = candidates.options(case, cuts), candidates.forbidden(cuts)
    try:
        return relax(options, case.room(), scales, candidates.limits, forbidden, effort.time_limit)
    except SearchError:
        return None


def _least(
    candidates: Candidates,
    case: Case,
    effort: Effort,
    cuts: set[Cut],
    key: str,
    room: Mapping[str, float],
) -> float | None:
    """The smallest sum of a limit's cost within `room` for others; None where nothing is.

    An architecture that keeps no attention, or no FFN, is none.
    """
    options = candidates.options(case, cuts)
    unit = max(abs(option.costs[key]) for option in options) or 1.0
    priced = [replace(option, score=option.costs[key] / unit) for option in options]
    try:
        found = solve(
            priced, {**room, **candidates.limits}, candidates.forbidden(cuts), effort.time_limit
        )
    except SearchError:
        return None
    return found.score * unit
