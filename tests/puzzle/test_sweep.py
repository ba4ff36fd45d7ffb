"""Scenarios and batches: the search is brute force over all of them, and says what it costs."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tessera.puzzle.cost_table import Costs, Scenario
from tessera.puzzle.program import Infeasible
from tessera.puzzle.search import STEPS, Solver, shadow_prices
from tests.searching import brute_force, candidates, choices_of, priced, table

CHAT, LONG = Scenario(batch=2, prompt=4, new=10), Scenario(batch=3, prompt=40, new=5)


def _two(seed: int) -> Costs:
    """Two scenarios at two batches each."""
    tables = []
    for number, scenario in enumerate((CHAT, LONG)):
        for batch in (1, 4):
            own = table(
                seed + 10 * number + batch, scenario.model_copy(update={"batch": batch}), True
            )
            tables.append(own)
    return priced(*tables, names=("chat", "long"), batches=(1, 4))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000),
    st.floats(0.3, 2.5),
    st.floats(0.4, 1.1),
    st.floats(0.3, 1.1),
    st.floats(0.2, 5.0),
    st.sampled_from([(), ("vllm",), ("llama.cpp",)]),
)
def test_search_over_scenarios_and_batches_is_brute_force(
    seed, rate, memory, first, weight, engines
):
    asked = {"throughput": f"{rate}x", "bytes": f"{memory}x"}
    own = {"long": {"time_to_first_token": f"{first}x"}}
    words = candidates(seed, engines)
    choices = choices_of(asked, _two(seed), own, chat=weight)
    best = brute_force(words, choices)
    if best is None:
        with pytest.raises(Infeasible, match="The cheapest way out"):
            Solver(words, choices).architectures()
        return
    (found,) = Solver(words, choices).architectures()
    assert found.solution is not None and found.solution.gap < 1e-6
    assert found.solution.score == pytest.approx(best, abs=1e-6)
    assert found.choice.excess(found.words) <= 1 + 1e-6 and not words.refuses(found.words)


def _found(seed: int, parameters: float, seconds: float) -> tuple:
    words = candidates(seed)
    asked = {"parameters": parameters, "latency": f"{seconds} s"}
    choices = choices_of(asked, priced(table(seed, CHAT, measured=True)))
    try:
        (found,) = Solver(words, choices).architectures()
    except Infeasible:
        found = None
    return words, choices, found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(10, 40), st.integers(60, 400))
def test_shadow_prices_are_what_the_budgets_next_to_it_give(seed, parameters, seconds):
    words, choices, found = _found(seed, parameters + 0.25, seconds + 0.25)
    assume(found is not None)
    rows = shadow_prices(Solver(words, choices), found)
    assert [row["budget"] for row in rows] == ["parameters", "latency"]
    score = found.solution.score
    for row in rows:
        assert row["gain"] >= 0 and row["price"] >= 0
        better = [_optimum(words, choices, row["budget"], 1 + step) for step in STEPS]
        assert row["gain"] == pytest.approx(score - _first_other(score, better), abs=1e-6)
        worse = [_optimum(words, choices, row["budget"], 1 - step) for step in STEPS]
        other = _first_other(score, worse)
        assert row["tighter_possible"] == (other < float("inf"))
        if row["tighter_possible"]:
            assert row["loss"] == pytest.approx(other - score, abs=1e-6)
        assert row["binds"] == (row["gain"] > 1e-6 or other > score + 1e-6)


def _optimum(words, choices, budget: str, factor: float) -> float:
    best = brute_force(words, tuple(case.scaled(budget, factor) for case in choices))
    return float("inf") if best is None else best


def _first_other(score: float, optima: list[float]) -> float:
    return next((one for one in optima if abs(one - score) > 1e-6), score)


def test_a_budget_that_does_not_bind_says_so():
    words, choices, found = _found(1, 10_000.0, 1e6)
    for row in shadow_prices(Solver(words, choices), found):
        assert not row["binds"] and row["price"] == 0 and "does not bind" in row["told"]
    assert found.solution.score <= brute_force(words, choices) + 1e-9


def test_a_smaller_cache_gains_by_a_larger_batch():
    """Seconds are of reading weights, the same at each batch: only memory keeps it small."""
    tables = []
    for batch in (1, 2, 4):
        own = table(5, Scenario(batch=batch, prompt=4, new=10), True)
        for (kind, word), columns in own.words.items():
            cache = {"gqa-4": 100, "gqa-1": 25}.get(word, 0) * batch
            columns["bytes"] = cache + (10 if kind == "ffn" else 0)  # type: ignore[index]
            columns["prefill_seconds"] = columns["decode_seconds"] = columns["seconds"] = 1.0  # type: ignore[index]
        tables.append(own)
    costs = priced(*tables, batches=(1, 2, 4))
    choices = choices_of({"bytes": 230, "throughput": "3.9x"}, costs)
    assert choices[0].reference["default"] is tables[0]  # the parent's cache fits at batch 1 alone
    (found,) = Solver(candidates(5), choices).architectures()
    assert str(found.choice) == "batch 4"
    assert found.choice.excess(found.words) <= 1


def test_solutions_differ_across_batches_and_come_best_first():
    words = candidates(11)
    choices = choices_of({"throughput": "0.6x"}, _two(11))
    found = Solver(words, choices, solutions=4, overlap=0.6).architectures()
    scores = [words.total(one.words) for one in found]
    assert len(found) > 1 and scores == sorted(scores)
    for i, one in enumerate(found):
        for other in found[:i]:
            places = zip(sum(one.words, ()), sum(other.words, ()), strict=True)
            assert sum(a == b for a, b in places) <= 3  # of four: pairs may be counted apart
