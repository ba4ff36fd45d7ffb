from __future__ import annotations

from dataclasses import replace

import pytest

from tessera.model.config import ConfigError
from tessera.puzzle.library import union
from tessera.puzzle.space import (
    SpaceConfig,
    Unit,
    build_space,
    forbidden_pairs,
    layer_numbers,
)
from tessera.runs.recipe import RecipeError, validate
from tests.toy import toy_config


def test_the_parents_words_come_first_and_words_do_not_repeat():
    space = build_space(SpaceConfig(ffn=("100%", "50%", "swiglu-24", "noop")), toy_config())
    assert space.words(0, "attention") == ("gqa-4", "gqa-2", "gqa-1", "linear", "noop")
    assert space.words(2, "ffn") == ("swiglu-48", "swiglu-24", "noop")


def test_widths_are_rounded_up_and_never_wider_than_the_parent():
    config = SpaceConfig(attention=(), ffn=("10%", "100%"), width_multiple=16)
    assert build_space(config, toy_config()).words(0, "ffn") == ("swiglu-48", "swiglu-16")
    with pytest.raises(ConfigError, match="swiglu-64, which fits no layer"):
        build_space(SpaceConfig(ffn=("swiglu-64",)), toy_config())
    with pytest.raises(ConfigError, match="gqa-3, which fits no layer"):
        build_space(SpaceConfig(attention=("gqa-3",)), toy_config())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"ffn": ["gqa-2"]}, "cannot stand for ffn"),
        (
            {"ffn": ["swiglu_24"]},
            "names no subblock.*share of the parent's width",
        ),
        ({"ffn": ["140%"]}, "above 0% and up to 100%"),
        ({"attention": ["divisor"]}, 'names no subblock.*too: "divisors"'),
    ],
)
def test_a_word_that_is_none_is_refused_before_anything_runs(table, message: str):
    with pytest.raises(RecipeError, match=message):
        validate(SpaceConfig, table, "bld.space")


def test_what_an_engine_cannot_load_is_left_out():
    space = build_space(SpaceConfig(), toy_config(layers=3))
    pairs = forbidden_pairs(space, toy_config(layers=3), ("vllm", "llama.cpp"))
    assert {("noop", "swiglu-48"), ("gqa-4", "noop"), ("linear", "linear")} <= pairs[0]
    assert ("noop", "swiglu-48") not in pairs[1]
    assert ("noop", "noop") in pairs[2] and ("noop", "noop") not in pairs[1]


def _words(kind: str, **table) -> list[tuple[str, ...]]:
    """The words of a kind by layer, of a space whose table is read as a recipe's."""
    space = build_space(validate(SpaceConfig, table, "bld.space"), toy_config(layers=5))
    return [space.words(layer, kind) for layer in range(5)]


def test_layers_take_lists_of_their_own():
    table = {
        "attention": ["gqa-2"],
        "ffn": ["50%"],
        "layers": {"0-3": {"attention": ["gqa-1"]}, "1, 3": {"ffn": ["noop"], "attention": []}},
    }
    plain, one, none = ("gqa-4", "gqa-2"), ("gqa-4", "gqa-1"), ("gqa-4",)
    assert _words("attention", **table) == [one, none, one, none, plain]
    half, gone = ("swiglu-48", "swiglu-24"), ("swiglu-48", "noop")
    assert _words("ffn", **table) == [half, gone, half, gone, half]


def test_layers_are_numbers_and_spans():
    assert layer_numbers("7, 0-3") == (0, 1, 2, 3, 7) and layer_numbers("5") == (5,)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"0-": {"ffn": ["noop"]}}, "names no layers; write numbers and spans"),
        ({"": {"ffn": ["noop"]}}, "names no layers"),
        ({"3-1": {"ffn": ["noop"]}}, "runs backwards; write 1-3"),
        ({"0-3, 2": {"ffn": ["noop"]}}, "names layer 2 twice"),
        ({"0": {}}, "names neither attention nor ffn"),
        ({"0": {"atention": ["noop"]}}, "did you mean 'attention'"),
        ({"0": {"ffn": ["gqa-2"]}}, "cannot stand for ffn"),
    ],
)
def test_layers_that_make_no_sense_are_refused_before_anything_runs(layers, message: str):
    with pytest.raises(RecipeError, match=message):
        validate(SpaceConfig, {"layers": layers}, "bld.space")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"2-5": {"ffn": ["noop"]}}, "names layer 5, and the parent has layers 0-4"),
        ({"0": {"ffn": ["noop"]}, "0-1": {"ffn": []}}, '"0".ffn: later entries override it'),
        ({"1": {"ffn": ["swiglu-64"]}}, "offers swiglu-64, which does not fit layer 1 of"),
    ],
)
def test_layers_that_do_not_fit_the_parent_are_refused(layers, message: str):
    with pytest.raises(ConfigError, match=message):
        _words("ffn", layers=layers)


def test_a_servable_space_holds_what_the_engine_loads_at_each_layer():
    noop = ["noop" in words for words in _words("attention", servable="vllm", ffn=["50%"])]
    assert noop == [False, True, True, True, True]  # the residual starts in layer 0's attention
    assert all("linear" not in words for words in _words("ffn", servable="vllm"))
    bare = _words("ffn", servable="llama.cpp", attention=["gqa-2"])
    assert all("noop" not in words for words in bare)  # it needs a layer without attention too
    both = ["noop" in words for words in _words("ffn", servable="llama.cpp")]
    assert both == [False, True, True, True, False]
    assert "linear" in _words("ffn", servable="hf")[0]
    everywhere = _words("ffn", servable="any")
    assert everywhere == _words("ffn", servable=["vllm", "llama.cpp", "sglang", "hf"])


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp", "sglang", "hf"])
def test_every_word_of_a_servable_space_stands_in_a_model_that_loads(engine: str):
    parent = toy_config(layers=3)
    space = build_space(SpaceConfig(servable=(engine,)), parent)
    assert space.servable == (("transformers",) if engine == "hf" else (engine,))
    refused = forbidden_pairs(space, parent, space.servable)
    for layer, (attention, ffn) in enumerate(space.layers):
        fine = {(a, f) for a in attention for f in ffn} - refused[layer]
        assert {a for a, _ in fine} == {*attention} and {f for _, f in fine} == {*ffn}


def test_a_word_asked_for_that_no_layer_can_have_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"space.ffn offers linear.*layers 0-4.*vllm cannot load"):
        _words("ffn", servable="vllm", ffn=["50%", "linear"])
    with pytest.raises(ConfigError, match=r'"0".attention offers noop.*layer 0 has an FFN and no'):
        _words("attention", servable="vllm", layers={"0": {"attention": ["noop"]}}, ffn=["50%"])
    with pytest.raises(RecipeError, match="unknown engine 'vlm'; did you mean 'vllm'"):
        validate(SpaceConfig, {"servable": "vlm"}, "bld.space")


def test_a_parent_whose_changes_an_engine_cannot_load_has_no_servable_space():
    parent = toy_config(layers=2, qk_norm=True)
    with pytest.raises(ConfigError, match="leaves no word but the parent's own: vllm.*QK norm"):
        build_space(SpaceConfig(servable=("vllm",)), parent)


def test_the_parts_of_a_space_make_the_whole():
    whole = build_space(SpaceConfig(servable=("vllm",)), toy_config(layers=5))
    pairs = Unit.pair(0, "gqa-1", "noop"), Unit.pair(3, "gqa-2", "swiglu-24")
    whole = replace(whole, pairs=pairs)
    first, second = whole.restrict([0, 1]), whole.restrict([2, 3, 4])
    assert not [key for key in first.replacements() if key[0] > 1]
    assert union([first, second]) == whole
