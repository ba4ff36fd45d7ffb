"""Resume states: whole or absent, the last N of them, of the step they were asked for."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from tessera.objectives.lm import LM
from tessera.runs.files import RunError, WriteError
from tessera.runs.run import Run, read_metrics
from tessera.train import checkpoint
from tessera.train.checkpoint import META, Saver, States, load_state
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
    saver = Saver(States(run.state_path))
    saver.save(1, trainer)
    trainer.train_step(1)  # while it is being written
    saver.wait()
    other = _trainer(run, seed=1)
    assert load_state(States(run.state_path), other) == 1
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
    with Saver(States(run.state_path), keep=2) as saver:
        for step in range(4):
            trainer.train_step(step)
            saver.save(step + 1, trainer)
    assert States(run.state_path).whole() == ["step-00000003", "step-00000004"]


def test_states_are_as_far_apart_as_they_cost(run: Run, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: now[0]))
    saver, told = Saver(States(run.state_path)), Saver(States(run.state_path), seconds=7)
    for copying, writing, wait in ((0, 0, 60), (1, 9, 60), (10, 9, 200), (1, 100, 400)):
        for one in (saver, told):
            one.copying, one.writing = copying, writing
        due = []
        for now[0] in (6, 8, wait - 1, wait + 1):
            due.append((saver.due(), told.due()))
        assert due == [(False, False), (False, True), (False, True), (True, True)]


@contextmanager
def s3() -> Iterator[str]:
    """A bucket of a server on this machine."""
    moto, boto3 = pytest.importorskip("moto.server"), pytest.importorskip("boto3")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(key, "test")
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="bucket")
        yield "s3://bucket/states"
        server.stop()


@pytest.mark.filterwarnings("ignore")  # of boto's, on versions of Python
@pytest.mark.parametrize("kind", ["memory", "file", pytest.param("s3", marks=pytest.mark.slow)])
def test_states_may_live_on_any_storage(kind: str, run: Run, tmp_path: Path):
    address = {"memory": "memory://states", "file": f"file://{tmp_path}/elsewhere"}.get(kind)
    with nullcontext(address) if address else s3() as place:
        config = {"steps": 4, "lr": 1e-2, "save_seconds": 1e-9, "save_total_limit": 2}

        def trainer(seed: int = 0) -> Trainer:
            settings = TrainConfig(state=place, **config)  # type: ignore[arg-type]
            return Trainer(toy_model(seed=seed), LM(), ToySource(), settings, run)

        whole = trainer()
        whole.fit()
        states = whole.states
        assert states.place.startswith(f"{place}/") and not (run.state_path / "step-0").exists()
        assert states.whole() == ["step-00000003", "step-00000004"]
        states._fs.rm_file(f"{states.place}/step-00000004/{META}")  # killed before the end
        again = trainer(seed=1)
        again.fit()
        assert read_metrics(run.path)[-1]["step"] == 4
        for a, b in zip(whole.trainable.values(), again.trainable.values(), strict=True):
            assert torch.equal(a, b)
        assert states.whole() == ["step-00000003", "step-00000004"]
        run.finish()
        assert states.whole() == []


def test_storage_that_cannot_be_had_is_one_sentence(run: Run, tmp_path: Path):
    for address, reason in (("bucket/states", "like s3://bucket"), ("foo://x", "not known")):
        with pytest.raises(ValueError, match=reason):
            TrainConfig(steps=1, state=address)
    (tmp_path / "taken").touch()
    states = States(f"file://{tmp_path}/taken/states")
    saver = Saver(states)
    saver.save(1, _trainer(run))
    with pytest.raises(WriteError, match=r"could not write .*taken/states.*run the same command"):
        saver.wait()


def test_half_a_state_is_none(run: Run):
    trainer = _trainer(run)
    trainer.train_step(0)
    with Saver(States(run.state_path)) as saver:
        saver.save(1, trainer)
    (run.state_path / "step-00000002").mkdir()
    assert load_state(States(run.state_path), _trainer(run)) == 1


def test_a_full_disk_is_told_and_leaves_the_state_before(run: Run, monkeypatch):
    trainer = _trainer(run)
    trainer.train_step(0)
    saver = Saver(States(run.state_path))
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
    saver = Saver(States(run.state_path))
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
    with Saver(States(run.state_path)) as saver:
        saver.save(1, trainer)
    kept = sum(file.stat().st_size for file in (run.state_path / "step-00000001").iterdir())
    needed = 3 * sum(p.nbytes for p in trainer.trainable.values())  # and Adam's two moments
    assert needed < kept < 1.5 * needed + 100_000
