from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.model.checkpoint import save_model
from tessera.model.config import KINDS, parse_kind
from tessera.puzzle import cost
from tessera.puzzle.cost import CostConfig, _isotonic, cost_rows
from tessera.puzzle.cost_table import CostTable, Scenario, read_costs
from tessera.puzzle.space import Space, write_space
from tessera.runs.recipe import RecipeError, validate
from tessera.runs.run import Run, read_json, read_table
from tests.toy import toy_config, toy_model

SETTINGS = CostConfig(source="counted")
WORDS = [(k, w) for k, pair in (("attention", ("gqa-4", "gqa-1", "linear", "noop")),
         ("ffn", ("swiglu-48", "swiglu-12", "noop"))) for w in pair]  # fmt: skip


def _table(**seconds: float) -> CostTable:
    rows = cost_rows(toy_config(), WORDS, SETTINGS, "cost")
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
    rows = cost_rows(toy_config(), WORDS, settings, "cost")
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
    table = read_costs(path).at(None)["default"]
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
        for name, field in (("costs", "rows"), ("calibration", "calibration")):
            own = [row for row in read_table(path, name) if row["batch"] == batch]
            assert own == [key | row for row in json.loads(text)[field]]
    assert set(read_costs(path).tables) == {("default", batch) for batch in (1, 2, 4)}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"measure": False, "source": "measured"}, "measure = false contradicts source = 'meas.*"),
        ({"measure": True, "source": "counted"}, "measure = true contradicts.*drop measure"),
        ({"source": "roofline"}, 'needs a device, for example device = "H100"'),
        ({"source": "roofline", "device": "H10"}, "did you mean 'H100'"),
        ({"source": "roofline", "device": "cpu", "dtype": "bf16"}, "'fp32' and tensor_parallel 1"),
        ({"device": "H100"}, 'belong to the roofline.*set source = "roofline" or drop them'),
        ({"source": "counted", "tensor_parallel": 2}, "belong to the roofline"),
        ({"dtype": "bf16"}, "measured models are fp32; drop it"),
        ({"source": "measurd"}, "did you mean 'measured'"),
        ({"wholes": -1}, "cost.wholes"),
        ({"depth": 0}, "cost.depth"),
    ],
)
def test_a_source_that_is_contradicted_is_said(table: dict, message: str):
    with pytest.raises(RecipeError, match=message):
        validate(CostConfig, table, "cost")


def test_the_older_spelling_and_what_follows_from_the_source():
    assert CostConfig().source == "measured" and CostConfig().measure
    assert CostConfig(source="counted").source == "counted"
    assert CostConfig(source="counted").measure is False
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
    assert costs.at(None)["default"].measured
    assert not (path / "tables" / "calibration.jsonl").exists()
    assert read_json(path, "scenarios")["dtype"] == "bf16"
