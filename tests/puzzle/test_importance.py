"""Iterative importance is brute force: each round takes out what moves the output least."""

from __future__ import annotations

import pytest
import torch

from tessera.model.config import SwiGLU
from tessera.puzzle import surgery
from tessera.puzzle.surgery import (
    channels,
    collect_statistics,
    cut,
    removal_order,
    schedule,
)
from tests.toy import split_rows, toy_batch, toy_config, toy_model


def _ffn_and_input(tokens: int = 40):
    torch.manual_seed(0)
    return toy_model().layers[1].ffn, torch.randn(tokens, 32)


@torch.no_grad()
def _brute_force(ffn, x: torch.Tensor, rounds: int) -> list[int]:
    """The order of removal, from whole forward passes with channels set to nothing."""
    full, weight = ffn(x, None), ffn.op.down_proj.weight
    saved, left, order = weight.clone(), list(range(48)), []
    for stay in schedule(48, rounds):
        harm = {}
        for channel in left:
            weight[:, [*order, channel]] = 0
            harm[channel] = float((full - ffn(x, None)).norm(dim=-1).double().sum())
            weight.copy_(saved)
        gone = sorted(left, key=harm.__getitem__)[: len(left) - stay]
        order += gone
        left = [channel for channel in left if channel not in gone]
    return order


@pytest.mark.parametrize("rounds", [1, 4, 100])
def test_the_order_of_removal_is_brute_force(rounds: int):
    ffn, x = _ffn_and_input()
    rank = removal_order(ffn, x, rounds)
    assert rank.argsort().tolist() == _brute_force(ffn, x, rounds)


def test_the_schedule_takes_most_first_and_everything_in_the_end():
    for width, rounds in ((48, 16), (5, 16), (1, 3), (8192, 16)):
        left = [width, *schedule(width, rounds)]
        steps = [a - b for a, b in zip(left, left[1:], strict=False)]
        assert left[-1] == 0 and min(steps) > 0
        assert steps[0] == max(steps)


def test_two_channels_that_stand_for_one_another_are_not_both_dispensable():
    """Channels 0 and 1 do nearly nothing together, and much where only one of them is left."""
    ffn, x = _ffn_and_input()
    with torch.no_grad():
        for projection in (ffn.op.gate_proj, ffn.op.up_proj):
            projection.weight[1] = projection.weight[0]
        large = 5 * torch.randn(32)
        ffn.op.down_proj.weight[:, 0], ffn.op.down_proj.weight[:, 1] = large, -0.99 * large
        both = removal_order(ffn, x, 48)
    first, second = sorted([int(both[0]), int(both[1])])
    assert second == first + 1  # as soon as one goes, the other has to


def test_parts_and_batches_change_nothing(monkeypatch):
    model, batch = toy_model(), toy_batch(3, rows=3)
    whole = collect_statistics(model, [batch], "iterative").channel_importance
    monkeypatch.setattr(surgery, "CHANNELS", 5)
    parts = collect_statistics(model, split_rows(batch), "iterative").channel_importance
    for rank, same in zip(whole, parts, strict=True):
        assert sorted(rank.tolist()) == list(range(48))
        assert torch.equal(rank, same)


@torch.no_grad()
def test_pruning_by_it_loses_less_of_the_output():
    ffn, x = _ffn_and_input(tokens=200)
    inner = channels(ffn, ffn.norm(x))
    independent = inner.abs().mean(0) * ffn.op.down_proj.weight.norm(dim=0)
    lost = {
        how: float((ffn(x, None) - cut(ffn, toy_config(), SwiGLU(24), rank)(x, None)).norm())
        for how, rank in (("independent", independent), ("iterative", removal_order(ffn, x)))
    }
    assert lost["iterative"] < lost["independent"]


def test_statistics_hold_it_for_the_layers_asked_for():
    model, batch = toy_model(), toy_batch(4)
    plain = collect_statistics(model, [batch]).channel_importance
    found = collect_statistics(model, [batch], "iterative", [1]).channel_importance
    every = collect_statistics(model, [batch], "iterative").channel_importance
    assert torch.equal(found[1], every[1]) and not torch.equal(found[1], plain[1])
    assert torch.equal(found[0], plain[0]) and torch.equal(found[2], plain[2])
