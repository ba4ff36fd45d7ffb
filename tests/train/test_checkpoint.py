"""A resumed trainer holds nothing of the file it was resumed from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tessera.objectives.lm import LM
from tessera.run import Run
from tessera.train.checkpoint import FILE, load_state, save_state
from tessera.train.engine import Trainer
from tessera.train.optim import TrainConfig
from tests.toy import ToySource, toy_model

MAPS = Path("/proc/self/maps")


@pytest.mark.skipif(not MAPS.exists(), reason="needs /proc")
def test_a_replaced_state_file_gives_its_space_back(tmp_path):
    with Run.open(tmp_path, stage="parent", config={}, inputs={}, seed=0, quiet=True) as run:
        config = TrainConfig(steps=2)
        trainer = Trainer(toy_model(), LM(), ToySource(), config, run)
        trainer.train_step(0)
        save_state(run.state_path, 1, trainer)
        other = Trainer(toy_model(), LM(), ToySource(), config, run)
        assert load_state(run.state_path, other) == 1
        assert str(run.state_path / FILE) not in MAPS.read_text()
