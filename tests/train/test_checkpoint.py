"""Resume states: whole or absent, the last N of them, of the step they were asked for."""

from __future__ import annotations

import errno
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from tessera.objectives.lm import LM
from tessera.runs.files import RunError, WriteError
from tessera.runs.run import Run
from tessera.train import checkpoint
from tessera.train.checkpoint import META, Saver, load_state, states
from tessera.train.engine import Trainer
from tessera.train.optim import TrainConfig
from tests.toy import ToySource, toy_model


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run.open(tmp_path, stage="parent", config={}, inputs={}, seed=0, quiet=True) as run:
        yield run


def _trainer(run: Run, seed: int = 0) -> Trainer:
    return Trainer(toy_model(seed=seed), LM(), ToySource(), TrainConfig(steps=9, lr=1e-2), run)


def test_a_state_is_that_of_its_step_whatever_follows(run: Run):
    trainer = _trainer(run)
    trainer.train_step(0)
    wanted = [p.detach().clone() for p in trainer.trainable.values()]
    saver = Saver(run.state_path)
    saver.save(1, trainer)
    trainer.train_step(1)  # while it is being written
    saver.wait()
    other = _trainer(run, seed=1)
    assert load_state(run.state_path, other) == 1
    for a, b in zip(wanted, other.trainable.values(), strict=True):
        assert torch.equal(a, b)
    other.train_step(1)
    for a, b in zip(trainer.trainable.values(), other.trainable.values(), strict=True):
        assert torch.equal(a, b)


def test_blocks_of_8_bits_are_of_one_layout():
    state = [f"optimizer.exp_avg.scale.{rank}-of-2.norm.weight" for rank in (0, 1)]
    checkpoint._check_layout(state[:1], state)
    with pytest.raises(RunError, match="another number of processes.* go on as it was begun"):
        checkpoint._check_layout(["optimizer.exp_avg.scale.0-of-1.norm.weight"], state)


def test_the_last_states_are_kept(run: Run):
    trainer = _trainer(run)
    with Saver(run.state_path, keep=2) as saver:
        for step in range(4):
            trainer.train_step(step)
            saver.save(step + 1, trainer)
    assert [path.name for path in states(run.state_path)] == ["step-00000003", "step-00000004"]


def test_half_a_state_is_none(run: Run):
    trainer = _trainer(run)
    trainer.train_step(0)
    with Saver(run.state_path) as saver:
        saver.save(1, trainer)
    (run.state_path / "step-00000002").mkdir()
    (run.state_path / ".step-00000003.tmp").mkdir()
    (run.state_path / ".step-00000003.tmp" / META).write_text(json.dumps({"step": 3}))
    assert load_state(run.state_path, _trainer(run)) == 1


def test_a_full_disk_is_told_and_leaves_the_state_before(run: Run, monkeypatch):
    trainer = _trainer(run)
    trainer.train_step(0)
    saver = Saver(run.state_path)
    saver.save(1, trainer)
    saver.wait()

    class Full(FileSystemWriter):
        def write_data(self, plan, planner):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "FileSystemWriter", Full)
    saver.save(2, trainer)
    with pytest.raises(WriteError, match="No space left on device.*intact.*free some space"):
        saver.wait()
    assert [path.name for path in run.state_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("room", [400, 1_000, 20_000])
def test_a_disk_that_fills_up_within_a_tensor_is_told(run: Run, room: int):
    trainer = _trainer(run)
    trainer.train_step(0)
    saver = Saver(run.state_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        saver.save(1, trainer)
        with pytest.raises(WriteError, match="File too large"):
            saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [*run.state_path.iterdir()]


def test_a_state_holds_no_more_than_the_next_step_needs(run: Run):
    trainer = _trainer(run)
    trainer.train_step(0)
    with Saver(run.state_path) as saver:
        saver.save(1, trainer)
    kept = sum(file.stat().st_size for file in states(run.state_path)[0].iterdir())
    needed = 3 * sum(p.nbytes for p in trainer.trainable.values())  # and Adam's two moments
    assert needed < kept < 1.5 * needed + 100_000
