"""The simple methods take the best they have within the budget, or the nearest and say so."""

from __future__ import annotations

import itertools

import pytest

from tessera.puzzle.candidates import (
    Candidates,
    dropped_attention,
    dropped_layers,
    greedy,
    uniform,
)
from tessera.puzzle.constraints import BatchChoice, Budgets, batch_choices
from tessera.puzzle.cost import CostConfig, price
from tessera.puzzle.cost_table import CostTable
from tessera.puzzle.program import SearchError
from tessera.puzzle.search import Solver
from tessera.puzzle.space import SpaceConfig, build_space
from tests.searching import priced
from tests.toy import toy_config

PARENT = toy_config(layers=4)
SPACE = build_space(SpaceConfig(ffn=("50%", "25%", "noop")), PARENT)
WORDS = [(k, w) for k in ("attention", "ffn") for w in SPACE.words(0, k)]
COSTS = CostTable.from_rows(
    price(PARENT, WORDS, CostConfig(source="counted"), "cost")[0], CostConfig().scenario
)


def _choices(**constraints: float | str) -> tuple[BatchChoice, ...]:
    return batch_choices(Budgets(constraints, {}, {}), priced(COSTS), PARENT.words)


def _candidates(*engines: str, removal: tuple[float, ...] = ()) -> Candidates:
    """A word further down its list hurts more, and a later layer hurts more.

    removal: what removing the attention of each layer hurts instead.
    """
    rows = [
        {"layer": i, "kind": k, "word": w, "kl": (i + 1) * SPACE.words(i, k).index(w)}
        for i, k, w in SPACE.replacements()
    ]
    for row in rows if removal else ():
        if (row["kind"], row["word"]) == ("attention", "noop"):
            row["kl"] = removal[row["layer"]]
    return Candidates.of(PARENT, SPACE, engines, rows, "kl")


def test_uniform_is_the_least_damaging_pair_of_words_that_meets_the_constraints():
    words = _candidates()
    pairs = list(
        itertools.product(("gqa-4", "gqa-2", "gqa-1"), ("swiglu-48", "swiglu-24", "swiglu-12"))
    )
    for pair in pairs:
        own = COSTS.total([pair] * 4)
        asked = {"parameters": own["parameters"], "bytes": own["bytes"] + 0.5}
        found = uniform(words, choices := _choices(**asked))
        able = [p for p in pairs if choices[0].excess([p] * 4) <= 1]
        assert found.meets and pair in able
        assert words.total(found.words) == min(words.total([p] * 4) for p in able)


def test_the_least_influential_layers_go_first_and_no_more_than_needed():
    kept = [("noop", "noop") if layer in (1, 2) else PARENT.words[layer] for layer in range(4)]
    choices = _choices(parameters=COSTS.total(kept)["parameters"])
    found = dropped_layers(_candidates(), choices, [0.9, 0.2, 0.1, 0.5])
    assert found.words == kept and found.meets


def test_the_attentions_that_matter_least_go_first_and_every_ffn_stays():
    gone = (0, 2)
    kept = [("noop" if layer in gone else a, f) for layer, (a, f) in enumerate(PARENT.words)]
    choices = _choices(kv_bytes_per_token=COSTS.total(kept)["kv_bytes_per_token"])
    found = dropped_attention(_candidates(removal=(0.1, 0.9, 0.2, 0.5)), choices)
    assert found.words == kept and found.meets


def test_what_cannot_be_reached_is_approached_and_says_so():
    found = uniform(_candidates(), _choices(parameters="0.01x"))
    assert found.words[0] == ("gqa-1", "swiglu-12") and not found.meets
    found = dropped_layers(_candidates(), _choices(parameters="0.01x"), [0.9, 0.2, 0.1, 0.5])
    assert not found.meets and sum(words != ("noop", "noop") for words in found.words) == 1


def test_engines_bind_the_baselines_too():
    """llama.cpp needs attention in layer 0, and an FFN in the last; vLLM a first attention."""
    choices = _choices(kv_bytes_per_token="0.5x")
    for engine in ("llama.cpp", "vllm"):
        words = _candidates(engine, removal=(0.1, 0.2, 0.3, 0.4))
        found = dropped_attention(words, choices)
        gone = [layer for layer, words in enumerate(found.words) if words[0] == "noop"]
        assert gone == [1, 2] and found.meets
    found = dropped_layers(_candidates("llama.cpp"), choices, [0.1, 0.2, 0.3, 0.05])
    assert [words == ("noop", "noop") for words in found.words] == [False, True, True, False]


def test_greedy_meets_the_budget_and_never_beats_the_program():
    words = _candidates()
    for share in ("0.9x", "0.7x", "0.5x"):
        choices = _choices(parameters=share, kv_bytes_per_token="0.75x")
        found = greedy(words, choices)
        (best,) = Solver(words, choices).architectures()
        assert found.meets and best.solution
        assert words.total(found.words) >= best.solution.score - 1e-9


def test_dropping_needs_the_word_for_it():
    space = build_space(SpaceConfig(attention=("gqa-1",), ffn=("50%",)), PARENT)
    words, choices = Candidates(PARENT, space, (), {}), _choices(parameters="0.5x")
    with pytest.raises(SearchError, match='"dropped-attention" needs the word noop'):
        dropped_attention(words, choices)
    with pytest.raises(SearchError, match='"dropped" needs the word noop for the attention'):
        dropped_layers(words, choices, [0.1, 0.2, 0.3, 0.4])


def test_a_layer_without_the_word_stays():
    space = build_space(SpaceConfig(layers={"1-3": {"attention": ["gqa-1"]}}), PARENT)
    rows = [{"layer": 0, "kind": "attention", "word": "noop", "kl": 0.1}]
    words = Candidates.of(PARENT, space, (), rows, "kl")
    found = dropped_attention(words, _choices(kv_bytes_per_token="0.5x"))
    assert [attention for attention, _ in found.words] == ["noop", *["gqa-4"] * 3]
