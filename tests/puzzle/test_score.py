"""Scores by reused hidden states are the scores of whole forward passes."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tessera.model.checkpoint import Checkpoint, load_model
from tessera.model.config import KINDS
from tessera.model.context import Context
from tessera.puzzle.library import BlockLibrary, assemble, load_unit, save_library, unit_file
from tessera.puzzle.score import LibraryUnits, score_cells, score_given
from tessera.puzzle.space import SpaceConfig, Unit, build_space
from tessera.puzzle.surgery import collect_statistics
from tests.toy import toy_batch, toy_model


def added_up(current, one, units=None, parent=None) -> dict:
    """What is added up of one batch, by unit."""
    cells = {(layer, 0) for layer in range(len(current.blocks) + 1)}
    found = score_cells(parent or current, current, units or {}, [one], cells)
    return {unit: own for _, of_layer in found for unit, own in of_layer.items()}


def _library(tmp_path):
    parent = toy_model().requires_grad_(False)
    space = build_space(SpaceConfig(), parent.config)
    statistics = collect_statistics(parent, [toy_batch(9)])
    save_library(BlockLibrary.from_parent(parent, space, statistics), tmp_path / "library")
    return parent, space, tmp_path / "library"


def test_replace_one_is_a_whole_forward_with_one_subblock_swapped(tmp_path):
    parent, space, library = _library(tmp_path)
    batch = toy_batch(2)
    found = added_up(parent, batch, LibraryUnits.of(library, parent, space))
    context = lambda: Context(batch.positions, batch.segments)  # noqa: E731
    log_p = F.log_softmax(parent.logits(parent(batch.tokens, context())), -1)
    for layer, kind, word in space.replacements():
        swapped = toy_model().requires_grad_(False)
        unit = load_unit(library, parent.config, Unit(layer, kind, word))
        swapped.replace(layer, kind, unit)  # type: ignore[arg-type]
        with torch.no_grad():
            log_q = F.log_softmax(swapped.logits(swapped(batch.tokens, context())), -1)
        kl = ((log_p.exp() * (log_p - log_q)).sum(-1) * batch.weight).sum()
        torch.testing.assert_close(
            found[layer, kind, word]["kl"][0], kl.item(), rtol=1e-4, atol=1e-5
        )
        cosine = 1 - F.cosine_similarity(
            swapped(batch.tokens, context()), parent(batch.tokens, context()), dim=-1
        )
        own = (cosine * batch.weight).sum().item()
        torch.testing.assert_close(found[layer, kind, word]["cosine"][0], own, rtol=1e-4, atol=1e-5)
        loss = -log_q.gather(-1, batch.labels[..., None]).squeeze(-1)
        own = (loss * batch.weight).sum().item()
        torch.testing.assert_close(
            found[layer, kind, word]["lm_loss"][0], own, rtol=1e-4, atol=1e-5
        )
    kl, weight = found[()]["kl"]
    assert abs(kl) < 1e-5 * weight
    assert found[()]["agreement"] == (weight, weight)


def test_scores_given_an_architecture_are_changes_to_it(tmp_path):
    parent, space, library = _library(tmp_path)
    units, batches = LibraryUnits.of(library, parent, space), [toy_batch(2), toy_batch(3)]
    words = [("gqa-2", "noop"), ("noop", "swiglu-24"), parent.config.words[2]]
    current = load_model(assemble(Checkpoint.of(toy_model()), library, words), frozen=True)
    own, rows = score_given(parent, current, units, batches)
    assert own["kl"] > 0
    table = {(row["layer"], row["kind"], row["word"]): row for row in rows}
    assert abs(table[1, "ffn", "swiglu-24"]["kl"]) < 1e-6  # it stands there already
    words[2] = ("linear", words[2][1])
    after = load_model(assemble(Checkpoint.of(toy_model()), library, words), frozen=True)
    change = score_given(parent, after, {}, batches)[0]["kl"] - own["kl"]
    assert abs(table[2, "attention", "linear"]["kl"] - change) < 1e-5


def test_scores_given_the_parent_are_replace_one_scores(tmp_path):
    parent, space, library = _library(tmp_path)
    units, batch = LibraryUnits.of(library, parent, space), toy_batch(2)
    _, rows = score_given(parent, parent, units, [batch])
    found = added_up(parent, batch, units)
    for row in rows:
        sums = found[row["layer"], row["kind"], row["word"]]
        kl, weight = sums["kl"]
        assert abs(row["kl"] - kl / weight) < 1e-6
        assert row["agreement"] == sums["agreement"][0] / weight


def test_a_pair_stands_for_both_words(tmp_path):
    """A pair saved from the two trained words scores, and assembles, as those two together."""
    parent, space, library = _library(tmp_path)
    words = ("gqa-1", "swiglu-24")
    pair = Unit.pair(1, *words)
    block = copy.deepcopy(parent.blocks[1])
    for kind, word in pair.parts:
        setattr(block, kind, load_unit(library, parent.config, Unit(1, kind, word)))
    path = unit_file(library, pair)
    path.parent.mkdir(parents=True)
    save_file(block.state_dict(), path)
    paired = replace(space, pairs=(pair,))
    batch = toy_batch(2)
    found = added_up(parent, batch, LibraryUnits.of(library, parent, paired))
    architecture = list(parent.config.words)
    architecture[1] = words
    child = load_model(assemble(Checkpoint.of(parent), library, architecture), frozen=True)
    whole = added_up(child, batch, parent=parent)[()]
    for metric, (value, _) in whole.items():
        assert abs(found[pair][metric][0] - value) < 1e-3


def test_an_architecture_of_parent_words_is_the_parent_bit_for_bit(tmp_path):
    parent, _, library = _library(tmp_path)
    built = load_model(assemble(Checkpoint.of(parent), library, parent.config.words))
    for a, b in zip(parent.parameters(), built.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_assembled_model_is_what_its_words_say(tmp_path):
    parent, space, library = _library(tmp_path)
    words = [(space.words(i, "attention")[-1 - i], space.words(i, "ffn")[i]) for i in range(3)]
    child = load_model(assemble(Checkpoint.of(parent), library, words))
    assert list(child.config.words) == words
    assert sum(p.numel() for p in child.parameters()) == child.config.num_params()
    for layer, pair in enumerate(words):
        for kind, word in zip(KINDS, pair, strict=True):
            if word not in ("noop", *parent.config.words[layer]):
                unit = load_unit(library, parent.config, Unit(layer, kind, word))
                own = getattr(child.layers[layer], kind)
                assert all(
                    torch.equal(a, b)
                    for a, b in zip(unit.parameters(), own.parameters(), strict=True)
                )
