"""Calibration as arithmetic: machines here take exactly what a formula says."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.puzzle.cost import FASTEST, architectures, calibrate, compared, held_out, predicted
from tessera.puzzle.cost_table import CostTable, Scenario

PARENT = (("gqa-4", "swiglu-48"),) * 6
WORDS = [(k, w) for k, words in (("attention", ("gqa-4", "gqa-2", "gqa-1", "linear", "noop")),
         ("ffn", ("swiglu-48", "swiglu-24", "swiglu-12", "noop"))) for w in words]  # fmt: skip
PRICES = {
    ("base", ""): (2.0, 0.3),
    ("attention", "gqa-4"): (1.2, 0.2),
    ("attention", "gqa-2"): (1.0, 0.15),
    ("attention", "gqa-1"): (0.9, 0.1),
    ("attention", "linear"): (0.2, 0.01),
    ("ffn", "swiglu-48"): (0.8, 0.1),
    ("ffn", "swiglu-24"): (0.5, 0.06),
    ("ffn", "swiglu-12"): (0.4, 0.05),
}
SCENARIO = Scenario(batch=2, prompt=4, new=10)


def timed(prices: dict, count: int, seed: int = 0) -> list:
    """(words, seconds) of the parent and `count` models on a machine where these prices add up."""
    return [(w, predicted(prices, w)) for w in architectures(PARENT, WORDS, count, seed)]


def scaled(factor: float, **others: float) -> dict:
    """The true prices where words were measured too high or low: all by one factor, some more."""
    return {
        key: (a * factor * others.get(key[1], 1.0), b * factor * others.get(key[1], 1.0))
        for key, (a, b) in PRICES.items()
    }


def test_architectures_lead_from_the_parent_into_the_space():
    found = architectures(PARENT, WORDS, 40, seed=3)
    assert found[0] == PARENT and len(found) == 41
    assert {(k, w) for one in found for pair in one
            for k, w in zip(("attention", "ffn"), pair, strict=True)} == set(WORDS)  # fmt: skip
    own = [sum(w == o for pair in one for w, o in zip(pair, PARENT[0], strict=True))
           for one in found[1:]]  # fmt: skip
    assert sum(own[:10]) > 2 * sum(own[-10:])
    assert found == architectures(PARENT, WORDS, 40, seed=3)
    assert found != architectures(PARENT, WORDS, 40, seed=4)


@pytest.mark.parametrize("count", [1, 4, 12])
def test_prices_that_add_up_are_left_alone(count: int):
    found = calibrate(PRICES, timed(PRICES, count))
    assert found.keys() == PRICES.keys()
    for key, pair in PRICES.items():
        assert found[key] == pytest.approx(pair, rel=1e-9)


def test_no_model_no_correction():
    assert calibrate(PRICES, []) == PRICES


@given(st.floats(0.3, 5.0), st.integers(0, 5))
def test_one_factor_on_all_words_is_recovered_from_one_model(factor, count):
    truth = scaled(factor)
    found = calibrate(PRICES, timed(truth, count))
    for key, pair in truth.items():
        assert found[key] == pytest.approx(pair, rel=1e-6)


@pytest.mark.parametrize(("attention", "ffn"), [(1.3, 0.8), (0.8, 1.3), (1.2, 1.2), (1.0, 0.7)])
def test_words_off_by_their_own_factors_come_right_with_models(attention: float, ffn: float):
    truth = scaled(1.1, **{"gqa-4": attention, "swiglu-48": ffn, "swiglu-24": ffn})

    def worst(count: int) -> float:
        """The largest error about models that were not fitted to."""
        found = calibrate(PRICES, timed(truth, count))
        return max(
            abs(own / right - 1)
            for words in architectures(PARENT, WORDS, 20, seed=7)
            for own, right in zip(predicted(found, words), predicted(truth, words), strict=True)
        )

    assert worst(8) < worst(0) and worst(200) < 0.02


def test_a_price_stays_where_no_model_speaks_about_it():
    models = [(PARENT, predicted(PRICES, PARENT))]
    assert calibrate(PRICES, models)["attention", "linear"] == pytest.approx((0.2, 0.01))


@given(st.integers(0, 1000))
def test_no_factor_is_below_the_fastest(seed):
    rng = random.Random(seed)
    models = [(w, (a * rng.uniform(0.01, 3), b * rng.uniform(0.01, 3)))
              for w, (a, b) in timed(PRICES, 6)]  # fmt: skip
    for key, pair in calibrate(PRICES, models).items():
        lowest = {k: FASTEST * min(p[i] for q, p in PRICES.items() if q[0] == key[0])
                  for i, k in enumerate("pd")}  # fmt: skip
        assert pair[0] >= lowest["p"] * (1 - 1e-9) and pair[1] >= lowest["d"] * (1 - 1e-9)


def test_a_word_that_costs_nothing_goes_on_costing_nothing():
    free = PRICES | {("attention", "linear"): (0.0, 0.0)}
    assert calibrate(free, timed(PRICES, 6))["attention", "linear"] == (0, 0)


def test_what_is_promised_is_what_the_table_sums():
    words = [*PARENT[:3], ("linear", "noop"), ("noop", "swiglu-12"), ("gqa-1", "noop")]
    rows = [{"kind": k, "word": w, "prefill_seconds": p, "decode_seconds": d}
            for (k, w), (p, d) in (PRICES | {("attention", "noop"): (0.0, 0.0),
                                             ("ffn", "noop"): (0.0, 0.0)}).items()]  # fmt: skip
    table = CostTable.from_rows(rows, SCENARIO).total(words)
    prefill, decode = predicted(PRICES, words)
    assert (table["prefill_seconds"], table["decode_seconds"]) == pytest.approx((prefill, decode))
    row = compared(words, (prefill, decode), (prefill / 2, decode), SCENARIO)
    assert row["promised_seconds"] == pytest.approx(table["seconds"])
    assert row["error_prefill_seconds"] == pytest.approx(1) and row["error_decode_seconds"] == 0


def test_held_out_rows_are_promised_by_the_others_alone():
    models = timed(PRICES, 5)
    odd_words, (prefill, decode) = models[2]
    models[2] = (odd_words, (prefill * 1.5, decode))
    rows = held_out(PRICES, models, SCENARIO)
    assert [row["words"] for row in rows] == [[list(p) for p in words] for words, _ in models]
    assert rows[2]["error_prefill_seconds"] == pytest.approx(1 / 1.5 - 1)  # the others add up
    assert rows[2]["error_decode_seconds"] == pytest.approx(0, abs=1e-9)
    for i, row in enumerate(rows):
        prices = calibrate(PRICES, [*models[:i], *models[i + 1 :]])
        assert row["promised_prefill_seconds"] == predicted(prices, models[i][0])[0]
        assert row["measured_prefill_seconds"] == models[i][1][0]
