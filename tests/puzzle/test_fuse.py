"""A fused FFN is the sum of its parts; the dependency matrix is the naive one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tessera.export.engines import refusals
from tessera.export.write import export_model
from tessera.model.checkpoint import load_model, save_model
from tessera.model.context import Context
from tessera.puzzle.fuse import dependency_matrix, fusable_runs, fuse, fuse_ffns, sharing
from tests import tiny
from tests.export.interop import random_model, write_byte_tokenizer
from tests.toy import toy_batch, toy_model

RUN = (
    ("gqa-2", "swiglu-24"),
    ("noop", "swiglu-8"),
    ("noop", "noop"),
    ("noop", "swiglu-16"),
    ("noop", "swiglu-24"),
    ("gqa-2", "swiglu-24"),
    ("noop", "swiglu-8"),
)


@pytest.mark.parametrize("bias", [False, True])
def test_a_fused_ffn_is_the_sum_of_its_parts(bias: bool):
    model = tiny.model(RUN, mlp_bias=bias)
    parts = [model.blocks[layer].ffn for layer in (1, 3, 4)]
    x = torch.randn(2, 5, 16)
    context = Context.rows(torch.zeros(2, 5, dtype=torch.long))
    fused = fuse_ffns(parts, model.config)
    total = torch.stack([part(x, context) for part in parts]).sum(0)
    torch.testing.assert_close(fused(x, context), total, rtol=1e-5, atol=1e-5)


def test_fusing_what_does_not_read_each_other_changes_nothing():
    """The first FFN of the run writes nothing, so the second sees the same input either way."""
    model = tiny.model(RUN)
    with torch.no_grad():
        model.blocks[1].ffn.op.down_proj.weight.zero_()  # type: ignore[union-attr]
    ids = tiny.tokens(29, 2, 9)
    before = model(ids)
    fused = fuse(sharing(model), [[1, 3]])
    torch.testing.assert_close(fused(ids), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(ids), before) and model.blocks[3].config == model.config.blocks[3]
    assert fused.config.words[1] == ("noop", "swiglu-24")
    assert fused.config.words[3] == ("noop", "noop")


def test_runs_keep_their_last_and_respect_the_width():
    shape = tiny.config(RUN)
    assert fusable_runs(shape) == [[1, 3]]
    assert fusable_runs(shape, keep_last=False) == [[1, 3, 4]]
    assert fusable_runs(shape, max_width=24, keep_last=False) == [[1, 3]]
    assert fusable_runs(shape, max_width=23) == []
    apart = torch.ones(7, 7)
    assert fusable_runs(shape, dependency=apart, threshold=0.5) == []
    assert fusable_runs(shape, dependency=apart, threshold=2.0) == [[1, 3]]


def test_engines_load_what_was_fused():
    fused = fuse(tiny.model(RUN), [[1, 3]])
    assert not refusals(fused.config, "vllm") and not refusals(fused.config, "llama.cpp")


WIDE_RUN = (
    ("gqa-4", "swiglu-256"),
    ("noop", "swiglu-128"),
    ("noop", "swiglu-256"),
    ("noop", "swiglu-64"),
    ("noop", "swiglu-128"),
    ("gqa-8", "swiglu-256"),
)


@pytest.mark.parametrize("form", ["decilm", "gguf"])
def test_a_fused_model_is_exported_as_ordinary_layers(form: str, tmp_path: Path):
    """No engine refuses it, and the exported files read back compute the same."""
    if form == "gguf":
        pytest.importorskip("gguf")
    model = random_model(WIDE_RUN)
    fused = fuse(model, fusable_runs(model.config))
    assert fused.config.words[1] == ("noop", "swiglu-448")
    save_model(fused, tmp_path / "fused")
    write_byte_tokenizer(tmp_path / "fused")
    report = export_model(tmp_path / "fused", tmp_path / "out", form)
    assert not any(report.refusals.values()) and report.words == fused.config.words
    assert report.parity is not None and report.parity.tokens_equal == report.parity.tokens
    if form == "decilm":
        ids = tiny.tokens(320, 2, 9)
        back = load_model(tmp_path / "out", frozen=True)
        torch.testing.assert_close(back.logits(back(ids)), fused.logits(fused(ids)))


def test_dependency_is_what_removing_each_block_does():
    model, batch = toy_model(layers=4), toy_batch(0)
    found = dependency_matrix(model, [batch])
    real = batch.segments >= 0
    own = list(model.hidden_states(batch.tokens, Context(batch.positions, batch.segments)))
    removed = copy.deepcopy(model)
    del removed.layers[1]
    other = list(removed.hidden_states(batch.tokens, Context(batch.positions, batch.segments)))
    without, whole = other[3] - other[2], own[4] - own[3]
    distance = (1 - F.cosine_similarity(without, whole, dim=-1))[real].mean().detach()
    assert float(found[1, 3]) == pytest.approx(float(distance), abs=1e-6)
    assert not found.tril().any()
