"""The integer program is brute force on random instances, pairs trained together included."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.puzzle.candidates import KEEP, Candidates
from tessera.puzzle.program import (
    Infeasible,
    Option,
    SearchError,
    TimedOut,
    divisible,
    relax,
    solve,
)
from tessera.puzzle.search import SearchConfig
from tests.searching import (
    LAYERS,
    PARENT,
    SPACE,
    candidates,
    choices_of,
    priced,
    scores,
    search,
    table,
)

DEPTH, WORDS = 3, ("a", "b", "c")


def _instance(seed: int) -> list[Option]:
    rng = np.random.default_rng(seed)
    return [
        Option(layer, kind, word, float(rng.uniform(0, 5)), {"s": s, "m": float(rng.uniform())})
        for layer in range(DEPTH)
        for kind in ("attention", "ffn")
        for word in WORDS
        for s in [float(rng.uniform(0.1, 1))]
    ]


def _brute_force(options, budgets, forbidden=()):
    places: dict = {}
    for option in options:
        places.setdefault((option.layer, option.kind), []).append(option)
    best = None
    for choice in itertools.product(*places.values()):
        words = {(o.layer, o.kind): o.word for o in choice}
        if any((words[i, "attention"], words[i, "ffn"]) == (a, f) for i, a, f in forbidden):
            continue
        if any(sum(o.costs[c] for o in choice) > b + 1e-12 for c, b in budgets.items()):
            continue
        score = sum(o.score for o in choice)
        best = score if best is None else min(best, score)
    return best


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(1.0, 4.0), st.floats(1.0, 5.0))
def test_search_is_brute_force(seed: int, seconds: float, memory: float):
    options, budgets = _instance(seed), {"s": seconds, "m": memory}
    forbidden = [(0, "a", "a"), (1, "b", "c"), (2, "c", "a")]
    best = _brute_force(options, budgets, forbidden)
    if best is None:
        with pytest.raises(Infeasible):
            solve(options, budgets, forbidden)
        return
    found = solve(options, budgets, forbidden)
    assert found.score == pytest.approx(best, abs=1e-9)
    assert found.gap < 1e-6
    words = {(o.layer, o.kind): o.word for o in found.options}
    assert not any((words[i, "attention"], words[i, "ffn"]) == (a, f) for i, a, f in forbidden)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(2.0, 3.5), st.floats(1.0, 2.0))
def test_a_looser_budget_never_scores_worse(seed: int, budget: float, looser: float):
    options = _instance(seed)
    try:
        tight = solve(options, {"s": budget}).score
    except Infeasible:
        return
    assert solve(options, {"s": budget * looser}).score <= tight + 1e-9


def test_solutions_differ_and_come_best_first():
    options = _instance(7)
    found = [solve(options, {"s": 3.0})]
    for _ in range(3):
        found.append(solve(options, {"s": 3.0}, earlier=found, overlap=0.7))
    scores = [solution.score for solution in found]
    assert scores == sorted(scores)
    for i, a in enumerate(found):
        for b in found[:i]:
            assert sum(x in b.options for x in a.options) <= 0.7 * 2 * DEPTH


def test_a_pair_covers_both_places_of_its_layer():
    (case,) = choices_of({"parameters": 5}, priced(table(1)))
    options = candidates(1).options(case)
    blocks = [o for o in options if o.kind == "block"]
    assert [o.places for o in blocks] == [
        ((o.layer, "attention"), (o.layer, "ffn")) for o in blocks
    ]
    cheap = [Option(o.layer, o.kind, o.word, -1.0 if o in blocks else 9.0, {}) for o in options]
    chosen = solve(cheap, {}).options
    assert [o.kind for o in chosen] == ["block"] * LAYERS


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_no_finite_number_is_refused_with_its_layer_and_word(score: float):
    (case,) = choices_of({"parameters": 20.5}, priced(table(1)))
    rows = scores(1)
    bad = next(row for row in rows if row["layer"] == 1 and row["kind"] == "ffn")
    bad["kl"] = score
    says = f"layer 1, ffn {bad['word']}.* {score}"
    config = SearchConfig(constraints={"parameters": 20.5})
    with pytest.raises(SearchError, match=says):
        search(config, PARENT, SPACE, rows, priced(table(1)))
    options = Candidates.of(PARENT, SPACE, (), rows, "kl").options(case)
    for ask in (solve, divisible):
        with pytest.raises(SearchError, match=says):
            ask(options, case.bounds() | KEEP)


def test_what_gives_way_is_the_limit_where_that_costs_least():
    """A word of 3 seconds or 3 bytes, 2 of each allowed, and a second is worth ten bytes."""
    options = [
        Option(0, "ffn", "slow", 0.0, {"seconds": 3.0, "bytes": 0.0, "left": 0.0}),
        Option(0, "ffn", "wide", 0.0, {"seconds": 0.0, "bytes": 3.0, "left": 0.0}),
    ]
    limits = {"seconds": 2.0, "bytes": 2.0}
    assert relax(options, limits, {"seconds": 1.0, "bytes": 10.0}, {}) == pytest.approx(
        {"seconds": 0.0, "bytes": 1.0}
    )
    with pytest.raises(Infeasible):
        relax(options, limits, limits, {"left": -1.0})


def test_however_short_the_time_a_gap_is_a_number():
    (case,) = choices_of({"parameters": 20.5}, priced(table(2)))
    for time_limit in (1e-9, 1e-3, 10.0):
        try:
            found = solve(candidates(2).options(case), case.bounds() | KEEP, (), time_limit)
        except TimedOut as error:
            assert "raise search.time_limit" in str(error)
        else:
            assert found.bound > -float("inf") and found.gap < float("inf")
