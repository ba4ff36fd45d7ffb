"""The integer program is brute force on random instances, pairs trained together included."""

from __future__ import annotations

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
from tessera.puzzle.search import SearchConfig, search
from tests.searching import (
    LAYERS,
    PARENT,
    SPACE,
    brute_force,
    candidates,
    choices_of,
    priced,
    scores,
    table,
)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60), st.integers(2, 60))
def test_search_with_pairs_is_brute_force(seed: int, parameters: int, memory: int):
    costs, words = priced(table(seed)), candidates(seed)
    budgets = {"parameters": parameters + 0.5, "bytes": memory + 0.5}
    config = SearchConfig(constraints={**budgets})
    best = brute_force(words, choices_of(budgets, costs))
    if best is None:
        with pytest.raises(Infeasible):
            search(config, PARENT, SPACE, scores(seed), costs)
        return
    (found,) = search(config, PARENT, SPACE, scores(seed), costs)
    assert found.solution is not None and found.solution.gap < 1e-6
    assert found.solution.score == pytest.approx(best, abs=1e-9)
    assert words.total(found.words) == pytest.approx(best, abs=1e-9)
    assert found.choice.excess(found.words) <= 1


def test_an_architecture_without_attention_is_refused_however_cheap():
    costs = priced(table(0))
    least = table(0).total([("noop", "noop")] * LAYERS)["parameters"]
    config = SearchConfig(constraints={"parameters": least + 0.5})
    with pytest.raises(Infeasible, match="One attention and one FFN always stay"):
        search(config, PARENT, SPACE, scores(0), costs)


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
