"""Counted and measured prices, calibration as arithmetic, and the stage."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.model.checkpoint import save_model
from tessera.model.config import KINDS, parse_kind
from tessera.puzzle import cost
from tessera.puzzle.cost import (
    FASTEST,
    CostConfig,
    _isotonic,
    architectures,
    calibrate,
    compared,
    held_out,
    predicted,
    price,
)
from tessera.puzzle.cost_table import CostTable, Scenario, read_costs
from tessera.puzzle.space import Space, write_space
from tessera.runs.recipe import RecipeError, validate
from tessera.runs.run import Run, read_json, read_table
from tests.toy import toy_config, toy_model

SETTINGS = CostConfig(source="counted")
WORDS = [(k, w) for k, pair in (("attention", ("gqa-4", "gqa-1", "linear", "noop")),
         ("ffn", ("swiglu-48", "swiglu-12", "noop"))) for w in pair]  # fmt: skip


def _table(**seconds: float) -> CostTable:
    rows = price(toy_config(), WORDS, SETTINGS, "cost")[0]
    for row in rows:
        if seconds:
            row["prefill_seconds"] = row["decode_seconds"] = seconds.get(row["word"], 0.1)
    return CostTable.from_rows(rows, SETTINGS.scenario)


def test_counted_totals_are_the_models_own():
    table = _table()
    words = [("gqa-4", "swiglu-48"), ("noop", "swiglu-12"), ("linear", "noop")]
    config = toy_config().with_words(words)
    total = table.total(words)
    assert total["parameters"] == config.num_params()
    assert total["kv_bytes_per_token"] == config.kv_bytes_per_token()
    cached = SETTINGS.scenario.cached_tokens
    assert total["bytes"] == 4 * config.num_params() + cached * config.kv_bytes_per_token()


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_isotonic_never_falls_and_keeps_the_sum(values):
    found = _isotonic(values)
    assert all(a <= b + 1e-9 for a, b in zip(found, found[1:], strict=False))
    assert sum(found) == pytest.approx(sum(values), abs=1e-6)


def test_counts_are_those_of_the_built_subblock():
    from tessera.model.layers import Subblock

    config = toy_config(qkv_bias=True)
    for kind, word in WORDS:
        unit = Subblock(config, parse_kind(kind, word))
        counted = config.subblock_params(kind, unit.variant)
        assert kind in KINDS and sum(p.numel() for p in unit.parameters()) == counted


def test_measured_seconds_are_there_for_every_word():
    settings = CostConfig(scenario=Scenario(batch=2, prompt=4, new=4), rounds=3, depth=1)
    rows = price(toy_config(), WORDS, settings, "cost")[0]
    assert len(rows) == len(WORDS) + 1
    assert all(row["decode_seconds"] >= 0 for row in rows)
    assert next(r for r in rows if r["word"] == "")["decode_seconds"] > 0


def test_every_scenario_is_priced_at_every_batch():
    chat, long = Scenario(batch=2), Scenario(batch=3, prompt=512)
    assert CostConfig(scenario=chat).priced() == [("default", chat)]
    own = CostConfig(scenarios={"chat": chat, "long": long})
    assert own.priced() == [("chat", chat), ("long", long)]
    swept = CostConfig(scenarios={"chat": chat, "long": long}, batches=[1, 8, 8])
    assert [(n, s.batch) for n, s in swept.priced()] == [
        ("chat", 1), ("chat", 8), ("long", 1), ("long", 8)]  # fmt: skip
    assert swept.priced()[2][1].prompt == 512


SPACE = Space(((("gqa-4", "gqa-1", "noop"), ("swiglu-48", "swiglu-12", "noop")),) * 3)
TINY = {"scenario": {"batch": 2, "prompt": 4, "new": 4}, "rounds": 3, "wholes": 3}


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    save_model(toy_model(), tmp_path / "parent")
    with Run.open(tmp_path / "library", stage="bld", config={}, inputs={}, seed=0) as run:
        write_space(SPACE, run)
        run.finish()
    return {"parent": tmp_path / "parent", "library": tmp_path / "library"}


def _priced(path: Path, inputs: dict[str, Path], **table: object) -> Path:
    config = validate(CostConfig, table, "cost")
    dump = config.model_dump(mode="json")
    with Run.open(path, stage="cost", config=dump, inputs={}, seed=0, quiet=True) as run:
        cost.stage(config, run, inputs)
        run.finish()
    return path


def test_the_stage_tells_how_right_it_is_about_models_it_was_not_fitted_to(inputs, tmp_path):
    path = _priced(tmp_path / "cost", inputs, **TINY)
    rows = read_table(path, "calibration")
    assert len(rows) == 1 + TINY["wholes"]  # the parent, too
    assert rows[0]["words"] == [["gqa-4", "swiglu-48"]] * 3
    for row in rows:
        assert row["error_seconds"] == pytest.approx(
            row["promised_seconds"] / row["measured_seconds"] - 1
        )
        assert (row["scenario"], row["batch"]) == ("default", 2)
    worst = max(abs(row["error_seconds"]) for row in rows)
    assert "4 whole models that prices were not fitted to are off by" in _log(path)
    assert f"{worst:.1%} at most" in _log(path)
    table = read_costs(path).first
    assert table.measured and set(table.words) == {
        (k, w) for k, words in zip(KINDS, SPACE.layers[0], strict=True) for w in words
    }
    assert table.words["attention", "noop"]["seconds"] == 0


def _log(path: Path) -> str:
    return (path / "log.txt").read_text()


def test_without_whole_models_nothing_is_said_of_them(inputs, tmp_path):
    path = _priced(tmp_path / "cost", inputs, **TINY | {"wholes": 0})
    assert not (path / "tables" / "calibration.jsonl").exists()
    assert "whole models" not in _log(path) if (path / "log.txt").exists() else True


def test_a_killed_stage_loses_no_finished_table(inputs, tmp_path, monkeypatch):
    table = {"batches": [1, 2, 4], **TINY}
    asked: list[int] = []
    real = cost.price

    def killed_at(last: int):
        def price(parent, words, settings, *rest):
            asked.append(settings.scenario.batch)
            if len(asked) == last:
                raise KeyboardInterrupt
            return real(parent, words, settings, *rest)

        return price

    monkeypatch.setattr(cost, "price", killed_at(3))
    with pytest.raises(KeyboardInterrupt):
        _priced(tmp_path / "cost", inputs, **table)
    kept = [(tmp_path / "cost" / "state" / f"costs-{i}.json").read_text() for i in range(2)]
    assert asked == [1, 2, 4] and not (tmp_path / "cost" / "tables" / "costs.jsonl").exists()
    monkeypatch.setattr(cost, "price", killed_at(0))
    path = _priced(tmp_path / "cost", inputs, **table)
    assert asked == [1, 2, 4, 4]
    for batch, text in zip((1, 2), kept, strict=True):
        key = {"scenario": "default", "batch": batch}
        for name, rows in zip(("costs", "calibration"), json.loads(text), strict=True):
            own = [row for row in read_table(path, name) if row["batch"] == batch]
            assert own == [key | row for row in rows]
    assert set(read_costs(path).tables) == {("default", batch) for batch in (1, 2, 4)}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"source": "roofline"}, 'needs a device, for example device = "H100"'),
        ({"source": "roofline", "device": "H10"}, "did you mean 'H100'"),
        ({"source": "roofline", "device": "cpu", "dtype": "bf16"}, "'fp32' and tensor_parallel 1"),
        ({"device": "H100"}, "belong to the roofline"),
        ({"source": "counted", "tensor_parallel": 2}, "belong to the roofline"),
        ({"dtype": "fp8"}, "measured models are fp32 or bf16"),
        ({"source": "counted", "dtype": "auto"}, "is of what is measured"),
        ({"source": "measurd"}, "did you mean 'measured'"),
        ({"wholes": -1}, "cost.wholes"),
        ({"depth": 0}, "cost.depth"),
    ],
)
def test_a_source_that_is_contradicted_is_said(table: dict, message: str):
    with pytest.raises(RecipeError, match=message):
        validate(CostConfig, table, "cost")


def test_what_follows_from_the_source():
    assert CostConfig().source == "measured"
    here = CostConfig(bytes_per_kv=1.0).here()
    assert (here.dtype, here.bytes_per_parameter, here.bytes_per_kv) == ("fp32", 4, 1)
    served = CostConfig(source="roofline", device="H100")
    assert (served.dtype, served.bytes_per_parameter, served.bytes_per_kv) == ("bf16", 2, 2)
    assert CostConfig(source="roofline", device="cpu").dtype == "fp32"
    own = CostConfig(source="counted", dtype="fp8", bytes_per_kv=2.0)
    assert (own.bytes_per_parameter, own.bytes_per_kv) == (1, 2)
    for one in (CostConfig(), served, own):  # what a manifest keeps is read back as it was
        assert CostConfig(**one.model_dump(mode="json")) == one


def test_words_of_a_roofline_need_no_machine(inputs, tmp_path):
    path = _priced(tmp_path / "cost", inputs, source="roofline", device="H100")
    costs = read_costs(path)
    assert (costs.source, costs.device, costs.bytes_per_kv) == ("roofline", "H100", 2)
    assert costs.first.measured
    assert not (path / "tables" / "calibration.jsonl").exists()
    assert read_json(path, "scenarios")["dtype"] == "bf16"


WHOLE = (("gqa-4", "swiglu-48"),) * 6
OFFERED = [(k, w) for k, words in (("attention", ("gqa-4", "gqa-2", "gqa-1", "linear", "noop")),
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
    return [(w, predicted(prices, w)) for w in architectures(WHOLE, OFFERED, count, seed)]


def scaled(factor: float, **others: float) -> dict:
    """The true prices where words were measured too high or low: all by one factor, some more."""
    return {
        key: (a * factor * others.get(key[1], 1.0), b * factor * others.get(key[1], 1.0))
        for key, (a, b) in PRICES.items()
    }


def test_architectures_lead_from_the_parent_into_the_space():
    found = architectures(WHOLE, OFFERED, 40, seed=3)
    assert found[0] == WHOLE and len(found) == 41
    assert {(k, w) for one in found for pair in one
            for k, w in zip(("attention", "ffn"), pair, strict=True)} == set(OFFERED)  # fmt: skip
    own = [sum(w == o for pair in one for w, o in zip(pair, WHOLE[0], strict=True))
           for one in found[1:]]  # fmt: skip
    assert sum(own[:10]) > 2 * sum(own[-10:])
    assert found == architectures(WHOLE, OFFERED, 40, seed=3)
    assert found != architectures(WHOLE, OFFERED, 40, seed=4)


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
            for words in architectures(WHOLE, OFFERED, 20, seed=7)
            for own, right in zip(predicted(found, words), predicted(truth, words), strict=True)
        )

    assert worst(8) < worst(0) and worst(200) < 0.02


def test_a_price_stays_where_no_model_speaks_about_it():
    models = [(WHOLE, predicted(PRICES, WHOLE))]
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
    words = [*WHOLE[:3], ("linear", "noop"), ("noop", "swiglu-12"), ("gqa-1", "noop")]
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
