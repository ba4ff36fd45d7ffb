"""The loop's own promises: it stops on nonsense, on a signal, and logs every step once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from tessera.objectives.lm import LM
from tessera.runs.files import FailureError
from tessera.runs.run import Run, read_metrics
from tessera.train.engine import Trainer
from tessera.train.optim import TrainConfig
from tests.toy import ToySource, toy_model

CONFIG = TrainConfig(steps=6, lr=1e-2, save_seconds=1e-9)


def _run(path: Path) -> Run:
    return Run.open(path, stage="parent", config={}, inputs={}, seed=0, quiet=True)


def test_a_non_finite_loss_stops_before_the_update(tmp_path):
    model = toy_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with _run(tmp_path / "r") as run, pytest.raises(FailureError, match="not finite at step 1"):
        Trainer(model, LM(), ToySource(), CONFIG, run).fit()
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == ["norm.weight"]


def test_nothing_to_train_on_is_an_error(tmp_path):
    class Empty(ToySource):
        def batches(self, step):
            batches = super().batches(step)
            for batch in batches:
                batch.weight.zero_()
            return batches

    with _run(tmp_path / "r") as run, pytest.raises(FailureError, match="no trained token"):
        Trainer(toy_model(), LM(), Empty(), CONFIG, run).fit()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_stops(tmp_path, number):
    class Signals(ToySource):
        def batches(self, step):
            if step == 2:
                os.kill(os.getpid(), number)
            return super().batches(step)

    model = toy_model()
    with pytest.raises(KeyboardInterrupt), _run(tmp_path / "r") as run:
        Trainer(model, LM(), Signals(), CONFIG, run).fit()
    assert [row["step"] for row in read_metrics(tmp_path / "r")] == [1, 2, 3]
    straight = toy_model()
    with _run(tmp_path / "s") as run:
        Trainer(straight, LM(), ToySource(), CONFIG, run).fit()
    again = toy_model()
    with _run(tmp_path / "r") as run:
        Trainer(again, LM(), ToySource(), CONFIG, run).fit()
    assert read_metrics(tmp_path / "r") == read_metrics(tmp_path / "s")
    for ours, theirs in zip(again.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_training_lowers_the_loss(tmp_path):
    class Same(ToySource):
        def batches(self, step):
            return super().batches(0)

    with _run(tmp_path / "r") as run:
        Trainer(toy_model(), LM(), Same(), CONFIG.model_copy(update={"steps": 30}), run).fit()
    losses = [row["loss"] for row in read_metrics(tmp_path / "r")]
    assert losses[-1] < 0.7 * losses[0]
