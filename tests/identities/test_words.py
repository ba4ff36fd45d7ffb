"""`parse(name(v)) = v`: a word says all there is to say about a subblock."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.model.config import GQA, ConfigError, Linear, NoOp, SwiGLU, name, parse, parse_kind
from tests import tiny

sizes = st.integers(1, 10**7)
variants = st.one_of(sizes.map(GQA), sizes.map(SwiGLU), st.just(Linear()), st.just(NoOp()))


@settings(derandomize=True)
@given(variants)
def test_parse_inverts_name(variant):
    assert parse(name(variant)) == variant


@settings(derandomize=True)
@given(st.text(max_size=12))
def test_a_word_that_parses_is_the_name_of_what_it_means(word):
    try:
        variant = parse(word)
    except ConfigError as error:
        assert repr(word) in str(error)
    else:
        assert name(variant) == word


@pytest.mark.parametrize("word", ["gqa-0", "gqa-08", "swiglu--1", "gqa", "swiglu-1.5", "GQA-8", ""])
def test_near_words_are_refused(word):
    with pytest.raises(ConfigError, match=repr(word)):
        parse(word)


@pytest.mark.parametrize(("kind", "word"), [("attention", "swiglu-8"), ("ffn", "gqa-8")])
def test_a_word_in_the_other_kinds_place_is_refused(kind, word):
    with pytest.raises(ConfigError, match=f"{word}.*{kind}"):
        parse_kind(kind, word)


def test_an_architecture_is_its_words():
    config = tiny.config()
    assert config.with_words(config.words) == config
