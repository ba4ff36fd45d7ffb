"""Accumulation and resume change nothing; a unit trained alone is the unit trained in a crowd.

DESIGN identities 6, 7, 8 and 9, for every objective there is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tessera.objectives.kd import KD, KDConfig
from tessera.objectives.lm import LM
from tessera.puzzle.bld import BLD
from tessera.puzzle.library import BlockLibrary
from tessera.puzzle.space import SpaceConfig, build_space
from tessera.puzzle.surgery import collect_statistics
from tessera.runs.run import Run, read_metrics
from tessera.train.engine import Objective, Trainer
from tessera.train.optim import TrainConfig
from tests.toy import ToySource, split_rows, toy_batch, toy_model

CONFIG = TrainConfig(steps=10, lr=3e-3, save_seconds=1e-9)
KD_CONFIG = KDConfig(train=CONFIG, cosine=0.5, lm=0.1)


def _lm() -> tuple[nn.Module, Objective]:
    return toy_model(), LM()


def _kd() -> tuple[nn.Module, Objective]:
    return toy_model(seed=1), KD(toy_model().requires_grad_(False), KD_CONFIG)


def _bld() -> tuple[nn.Module, Objective]:
    parent = toy_model().requires_grad_(False)
    statistics = collect_statistics(parent, [toy_batch(99)])
    space = build_space(SpaceConfig(ffn=("50%", "25%", "linear")), parent.config)
    return BlockLibrary.from_parent(parent, space, statistics), BLD(parent, statistics)


OBJECTIVES = pytest.mark.parametrize("make", [_lm, _kd, _bld])
Make = Callable[[], tuple[nn.Module, Objective]]


def _gradient(module: nn.Module, objective: Objective, batches) -> torch.Tensor:
    module.zero_grad()
    weight = sum(float(objective.weight(batch)) for batch in batches)
    for batch in batches:
        for loss, _ in objective.losses(module, batch):
            (loss / weight).backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@OBJECTIVES
def test_accumulation_changes_nothing(make: Make):
    module, objective = make()
    batch = toy_batch(5, rows=4)
    whole = _gradient(module, objective, [batch])
    parts = _gradient(module, objective, split_rows(batch))
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-7)


def _fit(make: Make, path: Path, steps: int) -> nn.Module:
    module, objective = make()
    source = ToySource()
    with Run.open(path, stage="kd", config={}, inputs={}, seed=0, quiet=True) as run:
        trainer = Trainer(module, objective, source, CONFIG, run)
        if steps < CONFIG.steps:
            plain = source.batches

            def stopping(step: int):
                if step == steps:
                    raise KeyboardInterrupt
                return plain(step)

            source.batches = stopping  # type: ignore[method-assign]
        try:
            trainer.fit()
        except KeyboardInterrupt:
            assert steps < CONFIG.steps
    return module


@OBJECTIVES
def test_ten_steps_are_five_and_five_bit_for_bit(make: Make, tmp_path):
    straight = _fit(make, tmp_path / "straight", 10)
    _fit(make, tmp_path / "resumed", 5)
    resumed = _fit(make, tmp_path / "resumed", 10)
    assert read_metrics(tmp_path / "straight") == read_metrics(tmp_path / "resumed")
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_kd_of_self_is_zero():
    parent = toy_model().requires_grad_(False)
    child = toy_model()
    (loss, _), *_ = KD(parent, KDConfig(train=CONFIG)).losses(child, toy_batch(1))
    assert abs(loss.item()) < 1e-4
    loss.backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-4 for p in child.parameters())


def test_a_unit_trained_alone_is_the_unit_trained_in_a_crowd(tmp_path):
    crowd = _fit(_bld, tmp_path / "crowd", 10)
    assert isinstance(crowd, BlockLibrary)
    key = "01/attention/gqa-2"

    def alone() -> tuple[nn.Module, Objective]:
        library, objective = _bld()
        assert isinstance(library, BlockLibrary)
        for other in [k for k in library if k != key]:
            del library[other]
        return library, objective

    single = _fit(alone, tmp_path / "alone", 10)
    assert isinstance(single, BlockLibrary)
    for a, b in zip(crowd[key].parameters(), single[key].parameters(), strict=True):
        assert torch.equal(a, b)


def test_bld_trains_every_unit_towards_the_parent(tmp_path):
    _fit(_bld, tmp_path / "r", 10)
    rows = read_metrics(tmp_path / "r")
    units = [key for key in rows[0] if key.startswith("bld/")]
    assert len(units) == 3 * (3 + 3)
    assert sum(rows[-1][u] < rows[0][u] for u in units) > 0.8 * len(units)


def test_the_parent_of_an_objective_is_left_alone(tmp_path):
    parent = toy_model().requires_grad_(False)
    before = copy.deepcopy(parent.state_dict())

    def make() -> tuple[nn.Module, Objective]:
        return toy_model(seed=1), KD(parent, KD_CONFIG)

    _fit(make, tmp_path / "r", 10)
    assert all(torch.equal(before[k], v) for k, v in parent.state_dict().items())
