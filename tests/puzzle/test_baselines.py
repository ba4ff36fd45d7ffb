from __future__ import annotations

from tessera.puzzle.baselines import dropped_attention, dropped_layers, uniform_width
from tessera.puzzle.cost import CostConfig, cost_rows
from tessera.puzzle.cost_table import CostTable
from tessera.puzzle.space import SpaceConfig, build_space
from tests.toy import toy_config

PARENT = toy_config(layers=4)
SPACE = build_space(SpaceConfig(ffn=("50%", "25%", "noop")), PARENT)


def _costs() -> CostTable:
    settings = CostConfig(measure=False)
    words = [(k, w) for k in ("attention", "ffn") for w in SPACE.words(0, k)]
    return CostTable.from_rows(cost_rows(PARENT, words, settings, "cost"), settings.scenario)


def test_the_uniform_width_nearest_to_the_budget_is_taken():
    costs = _costs()
    for width, word in ((48, "swiglu-48"), (24, "swiglu-24"), (12, "swiglu-12")):
        words = [("gqa-4", f"swiglu-{width}")] * 4
        for off in (0.98, 1.02):
            budget = {"parameters": off * costs.total(words)["parameters"]}
            assert uniform_width(budget, PARENT, SPACE, costs) == [("gqa-4", word)] * 4


def test_the_least_influential_layers_go_first_and_no_more_than_needed():
    costs = _costs()
    kept = [("noop", "noop") if layer in (1, 2) else PARENT.words[layer] for layer in range(4)]
    budget = {"parameters": costs.total(kept)["parameters"]}
    assert dropped_layers(budget, PARENT, [0.9, 0.2, 0.1, 0.5], costs) == kept


def test_the_attentions_that_matter_least_go_first_and_every_ffn_stays():
    costs = _costs()
    gone = (0, 2)
    kept = [("noop" if layer in gone else a, f) for layer, (a, f) in enumerate(PARENT.words)]
    budget = {"kv_bytes_per_token": costs.total(kept)["kv_bytes_per_token"]}
    assert dropped_attention(budget, PARENT, [0.1, 0.9, 0.2, 0.5], costs) == kept


def test_what_cannot_be_reached_is_approached():
    costs = _costs()
    assert uniform_width({"parameters": "0.01x"}, PARENT, SPACE, costs)[0] == ("gqa-4", "swiglu-12")
