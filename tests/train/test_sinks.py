"""Sinks take every step once, also over a resume; their failures stop nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from pydantic import ValidationError

from tessera.manifest import run_fingerprint
from tessera.objectives.lm import LM
from tessera.run import Run, read_metrics
from tessera.train import sinks
from tessera.train.engine import Trainer
from tessera.train.optim import TrainConfig
from tests.toy import ToySource, toy_model


def _fit(path: Path, stop: int | None = None, **settings) -> None:
    class Stopping(ToySource):
        def batches(self, step):
            if step == stop:
                raise KeyboardInterrupt
            return super().batches(step)

    config = TrainConfig(steps=6, save_seconds=1e-9, **settings)
    with Run.open(path, stage="parent", config={}, inputs={}, seed=0, quiet=True) as run:
        Trainer(toy_model(), LM(), Stopping(), config, run).fit()


@pytest.fixture
def recorded(monkeypatch) -> list[tuple[int, dict]]:
    """A sink in TensorBoard's place that keeps what it is given."""
    lines: list[tuple[int, dict]] = []

    class Recorder:
        def __init__(self, run, start):
            lines.append((-1, {"start": start}))

        def log(self, step, numbers):
            lines.append((step, dict(numbers)))

        def close(self):
            lines.append((-2, {}))

    monkeypatch.setitem(sinks.SINKS, "tensorboard", Recorder)
    monkeypatch.setattr(sinks, "check_installed", lambda names: None)
    monkeypatch.setattr("tessera.train.optim.check_installed", lambda names: None)
    return lines


def test_a_sink_is_given_every_step_with_its_speed(tmp_path, recorded):
    _fit(tmp_path / "r", report_to=("tensorboard",))
    assert [step for step, _ in recorded] == [-1, 1, 2, 3, 4, 5, 6, -2]
    logged = read_metrics(tmp_path / "r")
    for (_, numbers), row in zip(recorded[1:-1], logged, strict=True):
        assert numbers["loss"] == row["loss"] and numbers["tokens_per_second"] > 0


def test_a_resumed_run_tells_its_sink_where_it_goes_on(tmp_path, recorded):
    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path / "r", stop=3, report_to=("tensorboard",))
    _fit(tmp_path / "r", report_to=("tensorboard",))
    starts = [numbers["start"] for step, numbers in recorded if step == -1]
    assert starts == [0, 3]
    assert [step for step, _ in recorded if step > 0] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("when", ["init", "log", "close"])
def test_a_failing_sink_is_told_of_once_and_stops_nothing(tmp_path, monkeypatch, recorded, when):
    class Broken:
        def __init__(self, run, start):
            if when == "init":
                raise RuntimeError("no network")

        def log(self, step, numbers):
            if when == "log" and step == 2:
                raise OSError("no space")

        def close(self):
            if when == "close":
                raise RuntimeError("gone")

    monkeypatch.setitem(sinks.SINKS, "tensorboard", Broken)
    _fit(tmp_path / "r", report_to=("tensorboard",))
    assert len(read_metrics(tmp_path / "r")) == 6
    told = [row for row in (tmp_path / "r/log.txt").read_text().splitlines() if "failed" in row]
    assert len(told) == 1 and "tensorboard failed" in told[0]


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValidationError, match=r"pip install 'tessera\[wandb\]'"):
        TrainConfig(steps=1, report_to=("wandb",))


def test_where_numbers_go_is_no_part_of_what_is_made():
    plain, reported = ({"train": {"steps": 2}}, {"train": {"steps": 2, "report_to": ["wandb"]}})
    assert run_fingerprint("kd", plain, 0, {}) == run_fingerprint("kd", reported, 0, {})


def test_tensorboard_holds_each_step_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path / "r", stop=3, report_to=("tensorboard",))
    _fit(tmp_path / "r", report_to=("tensorboard",))
    found = EventAccumulator(str(tmp_path / "r/tensorboard"))
    found.Reload()
    losses = [(event.step, event.value) for event in found.Scalars("loss")]
    assert losses == [
        (row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in read_metrics(tmp_path / "r")
    ]


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    _fit(tmp_path / "r", report_to=("wandb",))
    assert not (tmp_path / "r/log.txt").exists()  # nothing to tell of
    assert list((tmp_path / "r/wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.skipif(not importlib.util.find_spec("trackio"), reason="no extra `trackio`")
def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    _fit(tmp_path / "r", report_to=("trackio",))
    assert not (tmp_path / "r/log.txt").exists()
    assert list((tmp_path / "trackio").rglob("*.db"))
