from __future__ import annotations

import pytest

from tessera.model.config import ConfigError
from tessera.puzzle.space import Space, SpaceConfig, build_space, forbidden_pairs
from tessera.recipe import RecipeError, validate
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


def test_a_space_without_some_words_is_without_the_pairs_that_hold_them():
    layers = ((("gqa-4", "linear"), ("swiglu-48", "linear")),) * 2
    space = Space(layers, ((0, "linear", "swiglu-48"), (1, "gqa-4", "linear")))
    left = space.without({("attention", "linear")})
    assert left.layers == ((("gqa-4",), ("swiglu-48", "linear")),) * 2
    assert left.pairs == ((1, "gqa-4", "linear"),)
    assert space.without(set()) == space
