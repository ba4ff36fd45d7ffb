"""The integer program is brute force on small instances, and explains what it cannot do."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.puzzle.search import Infeasible, Option, solve

LAYERS, WORDS = 3, ("a", "b", "c")


def _instance(seed: int) -> list[Option]:
    rng = np.random.default_rng(seed)
    return [
        Option(layer, kind, word, float(rng.uniform(0, 5)), {"s": s, "m": float(rng.uniform())})
        for layer in range(LAYERS)
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


def test_an_impossible_budget_names_the_constraint_and_the_least_possible():
    with pytest.raises(Infeasible, match=r"s cannot get below \d.*0.01 is asked"):
        solve(_instance(0), {"s": 0.01})
