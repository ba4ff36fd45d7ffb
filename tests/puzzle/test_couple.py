"""Pairs trained together: which, that they learn, and that all else stays what it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tessera.model.checkpoint import load_model, open_model
from tessera.puzzle import bld
from tessera.puzzle.bld import CoupleConfig, choose_pairs, largest_pairs, most_chosen, unit_params
from tessera.puzzle.library import LibraryError, assemble, load_unit, unit_file
from tessera.puzzle.space import Space, Unit, read_space
from tessera.runs.run import read_json, read_table
from tessera.train.optim import TrainConfig
from tests.objectives.recipes import BLD, SEARCH, UNITS, run, units
from tests.toy import toy_config

COUPLE = f'searches = ["search"]\n{UNITS}'
CONFIG = CoupleConfig(train=TrainConfig(steps=1))
AGAIN = """
[score-2]
tokens = 64
microbatch_tokens = 64
sequence_length = 32
[search-2]
scores = "score-2"
constraints = { parameters = "0.7x" }
[child]
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bld, score, cost, search, couple, and score, search and child again."""
    text = f"[bld]\n{BLD}{SEARCH}[couple]\n{COUPLE}{AGAIN}"
    return run(tmp_path_factory.mktemp("couple"), text)


def _words(*layers: str) -> list[list[str]]:
    return [layer.split() for layer in layers]


def _space(**changes) -> Space:
    layer = ("gqa-4", "gqa-2", "noop"), ("swiglu-48", "swiglu-24", "noop")
    return Space((layer,) * 2, **changes)


def test_the_most_chosen_words_stay():
    found = [_words("a x", "b x"), _words("c y", "b x"), _words("c z", "b x")]
    assert most_chosen(found, "attention", 2) == ["b", "c"]
    assert most_chosen(found, "attention", 9) == ["b", "c", "a"]
    assert most_chosen(found, "ffn", 1) == ["x"]


def test_pairs_are_the_product_of_the_kept_words_or_what_was_chosen():
    found = [_words("gqa-2 swiglu-24", "gqa-4 noop")] * 2 + [_words("noop noop", "gqa-2 swiglu-24")]
    parent = toy_config(layers=2)
    product = choose_pairs(CONFIG, _space(), parent, found, [0, 1])
    words = {(a, f) for a in ("gqa-4", "gqa-2", "noop") for f in ("swiglu-24", "noop")}
    assert set(product) == {Unit.pair(i, *w) for i in (0, 1) for w in words - {("noop", "noop")}}
    chosen = CONFIG.model_copy(update={"pairs": "chosen"})
    pairs = choose_pairs(chosen, _space(), parent, found, [0, 1])
    assert set(pairs) == {
        Unit.pair(0, "gqa-2", "swiglu-24"),
        Unit.pair(1, "gqa-4", "noop"),
        Unit.pair(1, "gqa-2", "swiglu-24"),
    }
    fewer = CONFIG.model_copy(update={"attention": 1, "ffn": 1})
    assert choose_pairs(fewer, _space(), parent, found, [1]) == [Unit.pair(1, "gqa-2", "swiglu-24")]


def test_pairs_that_the_library_holds_or_an_engine_refuses_are_left_out():
    found, parent = [_words("gqa-2 swiglu-24", "gqa-2 noop")], toy_config(layers=2)
    held = _space(pairs=(Unit.pair(0, "gqa-2", "noop"),), servable=("llama.cpp",))
    pairs = choose_pairs(CONFIG, held, parent, found, [0, 1])
    assert pairs == [Unit.pair(layer, "gqa-2", "swiglu-24") for layer in (0, 1)]


def test_the_largest_pairs_bound_those_of_any_search():
    parent, config = toy_config(layers=2), CONFIG.model_copy(update={"attention": 2, "ffn": 2})

    def total(pairs) -> int:
        return sum(unit_params(parent, *pair[1:]) for pair in pairs)

    most = total(largest_pairs(config, _space(), parent, "couple"))
    for a in ("gqa-4", "gqa-2", "noop"):
        for f in ("swiglu-48", "swiglu-24", "noop"):
            found = [_words(f"{a} {f}", "gqa-2 swiglu-24")]
            assert total(choose_pairs(config, _space(), parent, found, [0, 1])) <= most


def test_trained_together_every_pair_comes_closer_to_the_parent(runs):
    rows = read_table(runs / "couple", "pairs")
    assert len(rows) == len(read_space(runs / "couple").pairs) > 4
    assert all(row["joint"] < row["apart"] for row in rows)


def test_the_library_keeps_every_word_and_gains_the_pairs(runs):
    before, after = units(runs / "bld"), units(runs / "couple")
    space = read_space(runs / "couple")
    assert before.items() <= after.items()
    added = {unit_file(Path(), pair).as_posix() for pair in space.pairs}
    assert set(after) - set(before) == added
    assert space.layers == read_space(runs / "bld").layers
    sample = runs / "couple" / "library" / next(iter(before))
    assert sample.stat().st_nlink == 2


def test_scores_and_search_run_again_on_pairs(runs):
    space = read_space(runs / "score-2")
    rows = {(r["layer"], r["word"]) for r in read_table(runs / "score-2", "scores")}
    assert {(pair.layer, pair.word) for pair in space.pairs} <= rows
    words = read_json(runs / "search-2", "architecture")["words"]
    child = load_model(runs / "child")
    held = [unit for unit in space.units(words) if unit.kind == "block"]
    assert held and [list(pair) for pair in child.config.words] == words
    for pair in held:
        block = load_unit(runs / "couple" / "library", child.config, pair)
        own = child.blocks[pair.layer]
        for mine, theirs in zip(own.parameters(), block.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_an_architecture_of_parent_words_is_the_parent_bit_for_bit(runs):
    parent = load_model(runs / "parent")
    library = runs / "couple" / "library"
    built = load_model(assemble(open_model(runs / "parent"), library, parent.config.words))
    for a, b in zip(parent.parameters(), built.parameters(), strict=True):
        assert torch.equal(a, b)


def test_pairs_some_layers_at_once_and_by_range_are_the_same_files(tmp_path, runs):
    text = f"""[bld]\n{BLD}{SEARCH}
[couple-at-once]
layers_at_once = 1
{COUPLE}
[couple-low]
library = "bld"
layers = "0-1"
{COUPLE}
[couple-high]
library = "bld"
layers = "2-3"
{COUPLE}
[merge]
libraries = ["couple-low", "couple-high"]
"""
    found = run(tmp_path, text.replace("[couple-at-once]", "[couple-at-once]\nlibrary = 'bld'"))
    for name in ("couple-at-once", "merge"):
        assert units(found / name) == units(runs / "couple")
        assert read_space(found / name) == read_space(runs / "couple")
    assert read_table(found / "couple-at-once", "pairs") == read_table(runs / "couple", "pairs")


def test_a_killed_coupling_goes_on_where_it_was(tmp_path, runs, monkeypatch):
    text = f"[bld]\n{BLD}{SEARCH}[couple]\nlayers_at_once = 2\n{COUPLE}"
    plain, seen = bld.link_library, []

    def dying(source, target):
        seen.append(1)
        if len(seen) == 1:
            raise KeyboardInterrupt
        plain(source, target)

    monkeypatch.setattr(bld, "link_library", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, text)
    found = run(tmp_path, text)
    assert units(found / "couple") == units(runs / "couple")


def test_searches_that_chose_only_the_parent_have_nothing_to_couple(tmp_path):
    text = f"[bld]\n{BLD}{SEARCH}[couple]\n{COUPLE}".replace('"0.7x"', '"1.0x"')
    with pytest.raises(LibraryError, match="make no pair to train"):
        run(tmp_path, text.replace("solutions = 3", "solutions = 1"))
