"""The integer program is brute force on small instances, and explains what it cannot do."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.export.engines import refusals
from tessera.puzzle.cost import CostConfig, cost_rows
from tessera.puzzle.cost_table import Costs, CostTable, Scenario
from tessera.puzzle.program import Infeasible, Option, solve
from tessera.puzzle.search import SearchConfig, search
from tessera.puzzle.space import Space, SpaceConfig, build_space
from tests.searching import priced
from tests.toy import toy_config

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


def _counted(parent, space) -> tuple[list[dict], Costs]:
    """Equal scores, and counted costs, of every word of a space."""
    settings = CostConfig(source="counted")
    words = [(kind, word) for kind in ("attention", "ffn") for word in space.words(0, kind)]
    costs = CostTable.from_rows(cost_rows(parent, words, settings, "cost"), settings.scenario)
    places = space.replacements()
    rows = [{"layer": i, "kind": k, "word": w, "kl": 1.0} for i, k, w in places]
    return rows, priced(costs)


def test_an_impossible_constraint_is_named_with_the_nearest_that_can_be_met():
    parent = toy_config(layers=3)
    space = build_space(SpaceConfig(attention=("gqa-2",), ffn=("50%",)), parent)
    scores, costs = _counted(parent, space)

    def found(**constraints: float | str):
        return search(SearchConfig(constraints=constraints), parent, space, scores, costs)

    with pytest.raises(Infeasible, match='parameters = "0.1x": at least "0.*x" is needed') as told:
        found(parameters="0.1x", kv_bytes_per_token="0.9x")
    assert "kv_bytes_per_token" not in str(told.value)
    nearest = re.findall(r'"([0-9.]+x)" is needed', str(told.value))[0]
    assert found(parameters=nearest)
    slightly_less = f"{float(nearest.removesuffix('x')) - 0.002}x"
    with pytest.raises(Infeasible, match=f'at least "{nearest}" is needed in this space'):
        found(parameters=slightly_less)


def test_what_an_engine_refuses_is_among_the_reasons():
    parent = toy_config(layers=1)
    space = Space(((("gqa-4", "noop"), ("swiglu-48", "swiglu-24")),))
    scores, costs = _counted(parent, space)
    clash = SearchConfig(
        constraints={"parameters": "0.9x", "kv_bytes_per_token": "0.5x"}, servable=("llama.cpp",)
    )
    with pytest.raises(Infeasible, match="kv_bytes_per_token"):  # layer 0 needs attention there
        search(clash, parent, space, scores, costs)


def test_what_an_engine_refuses_as_a_whole_is_searched_again():
    """Layers 0 and 1 empty, then a bare FFN: each pair is fine alone, vLLM refuses the run."""
    parent = toy_config(layers=3)
    space = Space((((("gqa-4", "noop")), ("swiglu-48", "noop")),) * 3)
    scores = [
        {"layer": i, "kind": k, "word": "noop", "kl": (9.0 if (i, k) == (1, "ffn") else 0.1)}
        for i in range(3)
        for k in ("attention", "ffn")
    ]
    scores[4]["kl"] = scores[5]["kl"] = 5.0
    rows = [
        {"kind": k, "word": w, "parameters": int(w != "noop"), "bytes": 0, "kv_bytes_per_token": 0}
        for k, w in (("base", ""), ("attention", "gqa-4"), ("attention", "noop"),
                     ("ffn", "swiglu-48"), ("ffn", "noop"))
    ]  # fmt: skip
    rows[0]["parameters"] = 0
    costs = priced(CostTable.from_rows(rows, Scenario()))
    free = SearchConfig(constraints={"parameters": 3})
    bound = SearchConfig(constraints={"parameters": 3}, servable=("vllm",))
    (found,) = search(free, parent, space, scores, costs)
    assert found.words == [("noop", "noop"), ("noop", "swiglu-48"), ("gqa-4", "swiglu-48")]
    (found,) = search(bound, parent, space, scores, costs)
    assert not refusals(parent.with_words(found.words), "vllm")


def test_solutions_differ_and_come_best_first():
    options = _instance(7)
    found = [solve(options, {"s": 3.0})]
    for _ in range(3):
        found.append(solve(options, {"s": 3.0}, earlier=found, overlap=0.7))
    scores = [solution.score for solution in found]
    assert scores == sorted(scores)
    for i, a in enumerate(found):
        for b in found[:i]:
            assert sum(x in b.options for x in a.options) <= 0.7 * 2 * LAYERS
