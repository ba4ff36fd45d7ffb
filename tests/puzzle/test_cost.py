from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.model.config import KINDS, parse_kind
from tessera.puzzle.calibrate import _isotonic
from tessera.puzzle.cost import CostConfig, cost_rows
from tessera.puzzle.cost_table import CostTable, Scenario
from tests.toy import toy_config

SETTINGS = CostConfig(measure=False)
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
