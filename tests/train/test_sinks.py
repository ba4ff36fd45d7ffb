"""Sinks take every step once, also over a resume; their failures stop nothing."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from pydantic import ValidationError

from tessera.objectives.lm import LM
from tessera.runs.recipe import identity
from tessera.runs.run import Run, read_metrics
from tessera.train import sinks
from tessera.train.engine import Trainer
from tessera.train.optim import TrainConfig
from tests.test_dist import run_ranks
from tests.toy import ToySource, toy_model


def _open(path: Path) -> Run:
    return Run.open(path, stage="parent", config={}, inputs={}, seed=0, quiet=True)


def _fit(path: Path, stop: int | None = None, **settings) -> None:
    class Stopping(ToySource):
        def batches(self, step):
            if step == stop:
                raise KeyboardInterrupt
            return super().batches(step)

    config = TrainConfig(**{"steps": 6, "save_seconds": 1e-9} | settings)
    with _open(path) as run:
        Trainer(toy_model(), LM(), Stopping(), config, run).fit()


@pytest.fixture
def recorded(monkeypatch) -> list[tuple[int, dict]]:
    """A sink in TensorBoard's place that keeps what it is given."""
    lines: list[tuple[int, dict]] = []

    class Recorder:
        def __init__(self, run, start):
            self.first = start + 1
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


def test_a_sink_changes_no_number(tmp_path, recorded):
    _fit(tmp_path / "with", report_to=("tensorboard",))
    _fit(tmp_path / "without")
    told, untold = (
        (tmp_path / name / "metrics.jsonl").read_bytes() for name in ("with", "without")
    )
    assert told == untold


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
        first = 0

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


@pytest.mark.parametrize("kept", [0, 2, 9])
def test_a_sink_is_sent_what_it_lacks_and_nothing_twice(tmp_path, monkeypatch, recorded, kept):
    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path / "r", stop=3)
    known = sinks.SINKS["tensorboard"]

    class Remembers(known):
        def __init__(self, run, start):
            super().__init__(run, start)
            self.first = kept

    monkeypatch.setitem(sinks.SINKS, "tensorboard", Remembers)
    _fit(tmp_path / "r", report_to=("tensorboard",))
    steps = [step for step, _ in recorded if step > 0]
    assert steps == [step for step in range(1, 7) if step >= kept]
    assert all(numbers["tokens_per_second"] > 0 for step, numbers in recorded if step > 0)


@pytest.mark.parametrize("found", [None, ModuleSpec("wandb", None, is_package=True)])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, found):
    """Also where a folder of its name, which it makes itself, stands on Python's path."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(ValidationError, match=r"pip install 'tessera\[wandb\]'"):
        TrainConfig(steps=1, report_to=("wandb",))


def test_a_redone_run_is_another_and_a_resumed_one_is_not(tmp_path):
    def opened():
        with _open(tmp_path / "r") as run:
            return sinks.identity(run)

    first = opened()
    assert opened() == first
    shutil.rmtree(tmp_path / "r")
    assert opened() != first


def test_a_recipe_is_one_project_of_all_its_runs(tmp_path):
    with _open(tmp_path / "nano/race") as race, _open(race.path / "heats/1-best") as heat:
        assert sinks.names(race) == ("nano", "race")
        assert sinks.names(heat) == ("nano", "race-heats-1-best")


def test_where_numbers_go_is_no_part_of_what_is_made():
    plain = TrainConfig(steps=2)
    reported = plain.model_copy(update={"report_to": ("wandb",)})
    assert identity(plain) == identity(reported) and "report_to" not in identity(plain)


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


def test_tensorboard_asked_for_late_has_the_steps_before(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path / "r", stop=3)
    _fit(tmp_path / "r", report_to=("tensorboard",))
    found = EventAccumulator(str(tmp_path / "r/tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("mfu")] == [1, 2, 3, 4, 5, 6]


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path / "r", stop=3, report_to=("wandb",))
    with _open(tmp_path / "r") as run:
        identity = sinks.identity(run)
    _fit(tmp_path / "r", report_to=("wandb",))
    told = (tmp_path / "r/log.txt").read_text().splitlines()
    assert len(told) == 1 and "resuming after step 3" in told[0]  # nothing failed
    files = sorted((tmp_path / "r/wandb").glob("offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    assert [_wandb_steps(file) for file in files] == [[1, 2, 3], [1, 2, 3, 4, 5, 6]]


def _wandb_steps(file: Path) -> list[int]:
    """The steps in an offline file: a header of 7 bytes, then LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[import-not-found]

    data, at, whole, steps = file.read_bytes(), 7, b"", []
    while at < len(data):
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if 32_768 - at % 32_768 < 7:  # a block's end that holds no header
            at += 32_768 - at % 32_768
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record.FromString(whole)
            steps += [record.history.step.num] * record.HasField("history")
            whole = b""
    return steps


def interrupted_and_resumed(path: str) -> None:
    """Prints the steps that Trackio holds of a run that went on from before what it was sent."""
    with contextlib.suppress(KeyboardInterrupt):
        _fit(Path(path), stop=3, save_seconds=1e9, report_to=("trackio",))
    assert not list(Path(path).glob("state/step-*"))  # as a kill leaves it
    _fit(Path(path), report_to=("trackio",))
    from trackio.sqlite_storage import SQLiteStorage  # type: ignore[import-not-found]

    (name,) = SQLiteStorage.get_runs("nano")
    print([row["step"] for row in SQLiteStorage.get_logs("nano", name)])


@pytest.mark.skipif(not importlib.util.find_spec("trackio"), reason="no extra `trackio`")
def test_trackio_holds_each_step_once_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    path = tmp_path / "nano/r"
    code = "from tests.train.test_sinks import interrupted_and_resumed as go; "
    (printed,) = run_ranks(f"{code} go({str(path)!r})", world=1)
    assert printed == "[1, 2, 3, 4, 5, 6]\n"  # and no other word: Trackio's go to stderr
    assert not (path / "log.txt").exists()  # no failure to tell of
