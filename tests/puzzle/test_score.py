"""Scores by reused hidden states are the scores of whole forward passes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tessera.model.config import KINDS
from tessera.model.context import Context
from tessera.puzzle.library import BlockLibrary, assemble, load_unit, save_library
from tessera.puzzle.score import load_units, score_batch
from tessera.puzzle.space import SpaceConfig, build_space
from tessera.puzzle.surgery import collect_statistics
from tests.toy import toy_batch, toy_model


def _library(tmp_path):
    parent = toy_model().requires_grad_(False)
    space = build_space(SpaceConfig(), parent.config)
    statistics = collect_statistics(parent, [toy_batch(9)])
    save_library(BlockLibrary.from_parent(parent, space, statistics), tmp_path / "library")
    return parent, space, tmp_path / "library"


def test_replace_one_is_a_whole_forward_with_one_subblock_swapped(tmp_path):
    parent, space, library = _library(tmp_path)
    batch = toy_batch(2)
    found = score_batch(parent, load_units(library, parent, space), batch)
    context = lambda: Context(batch.positions, batch.segments)  # noqa: E731
    log_p = F.log_softmax(parent.logits(parent(batch.tokens, context())), -1)
    for layer, kind, word in space.replacements():
        swapped = toy_model().requires_grad_(False)
        swapped.replace(layer, kind, load_unit(library, parent.config, layer, kind, word))
        with torch.no_grad():
            log_q = F.log_softmax(swapped.logits(swapped(batch.tokens, context())), -1)
        kl = ((log_p.exp() * (log_p - log_q)).sum(-1) * batch.weight).sum()
        torch.testing.assert_close(found[layer, kind, word]["kl"], kl.item(), rtol=1e-4, atol=1e-5)
    assert found[()]["kl"] == 0


def test_an_architecture_of_parent_words_is_the_parent_bit_for_bit(tmp_path):
    parent, _, library = _library(tmp_path)
    built = assemble(toy_model(), library, parent.config.words)
    for a, b in zip(parent.parameters(), built.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_assembled_model_is_what_its_words_say(tmp_path):
    parent, space, library = _library(tmp_path)
    words = [(space.words(i, "attention")[-1 - i], space.words(i, "ffn")[i]) for i in range(3)]
    child = assemble(toy_model(), library, words)
    assert list(child.config.words) == words
    assert sum(p.numel() for p in child.parameters()) == child.config.num_params()
    for layer, pair in enumerate(words):
        for kind, word in zip(KINDS, pair, strict=True):
            if word not in ("noop", *parent.config.words[layer]):
                unit = load_unit(library, parent.config, layer, kind, word)
                own = getattr(child.layers[layer], kind)
                assert all(
                    torch.equal(a, b)
                    for a, b in zip(unit.parameters(), own.parameters(), strict=True)
                )
