"""Silence is told of once, with who is at what; without silence nothing is said."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

from tessera.objectives.lm import LM
from tessera.runs.run import Run
from tessera.train import engine
from tessera.train import watch as watch_module
from tessera.train.engine import Trainer
from tessera.train.optim import TrainConfig
from tessera.train.watch import Sign, Watch, describe
from tests.test_dist import run_ranks
from tests.toy import ToySource, toy_model


def _run(path: Path) -> Run:
    return Run.open(path, stage="parent", config={}, inputs={}, seed=0, quiet=True)


def _said(path: Path) -> list[str]:
    log = path / "log.txt"
    return log.read_text().splitlines() if log.is_file() else []


def test_one_line_tells_of_everybody_the_longest_first():
    now = 1000.0
    known = {
        0: Sign("step 12: summing losses", now - 128, "all_reduce (tessera.dist:118)"),
        1: Sign("step 12: summing losses", now - 130, "all_reduce (tessera.dist:118)"),
        2: Sign("step 12: reading data", now - 131, "read (tessera.data.store:88)"),
        3: None,
    }
    assert describe(known, now) == (
        "quiet for 2:08: rank 2 at 'step 12: reading data' for 2:11, in read "
        "(tessera.data.store:88); ranks 0-1 at 'step 12: summing losses' for 2:10, in all_reduce "
        "(tessera.dist:118); rank 3 not heard of: moving, or gone"
    )
    assert describe(
        {0: Sign("step 1: saving", now - 60, "join (tessera.train.checkpoint:70)")}, now
    ) == ("quiet for 1:00: at 'step 1: saving' for 1:00, in join (tessera.train.checkpoint:70)")


def test_silence_is_told_of_once_until_it_has_doubled(tmp_path):
    with _run(tmp_path / "r") as run, Watch(run, quiet=0.4) as watch:
        watch.at("step 3: reading data")
        time.sleep(0.7)
        first = _said(run.path)
        watch.at("step 3: summing losses")
        time.sleep(0.1)
    assert len(first) == 1
    assert "at 'step 3: reading data' for 0:00, in test_silence_is_told" in first[0]
    assert _said(run.path) == first


def test_a_call_is_named_with_the_line_of_ours_that_led_to_it(tmp_path):
    """A source that never answers: its call, behind the trainer's."""
    answer = threading.Event()

    class Hangs(ToySource):
        def batches(self, step):
            answer.wait(1.0 if step == 1 else 0.0)
            return super().batches(step)

    config = TrainConfig(steps=2, quiet_seconds=0.4)
    with _run(tmp_path / "r") as run:
        Trainer(toy_model(), LM(), Hangs(), config, run).fit()
    line, *_ = _said(tmp_path / "r")
    assert "at 'step 2: reading data'" in line
    assert re.search(r"in wait \(tessera\.train\.engine:\d+\)$", line)


def test_silence_before_the_first_step_is_told_of_too(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "load_state", lambda *_: time.sleep(0.7) or 0)
    config = TrainConfig(steps=1, quiet_seconds=0.4)
    with _run(tmp_path / "r") as run:
        Trainer(toy_model(), LM(), ToySource(), config, run).fit()
    assert any("at 'reading the resume state'" in line for line in _said(tmp_path / "r"))


def test_a_disk_that_refuses_the_watch_leaves_training_alone(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(watch_module.dist, "world", lambda: 2)
    monkeypatch.setattr(watch_module, "atomic_write", full)
    with _run(tmp_path / "r") as run, Watch(run, quiet=0.2) as watch:
        watch.at("step 1: saving")
        time.sleep(0.4)
        assert watch._thread.is_alive()


def test_no_word_while_things_move(tmp_path):
    with _run(tmp_path / "r") as run, Watch(run, quiet=0.6) as watch:
        for step in range(10):
            watch.at(f"step {step}")
            time.sleep(0.1)
    assert _said(run.path) == []


def sleeper(path: str) -> None:
    """Rank 1 sleeps before a sum that rank 0 waits in."""
    import torch

    from tessera import dist

    with dist.processes():
        run = _run(Path(path))
        with run, Watch(run, quiet=0.8) as watch:
            watch.at("step 5: reading data")
            if dist.rank() == 1:
                time.sleep(2.5)
            watch.at("step 5: summing losses")
            dist.sum(torch.ones(()))


def test_two_processes_of_which_one_sleeps(tmp_path):
    code = f"from tests.train.test_watch import sleeper; sleeper({json.dumps(str(tmp_path / 'r'))})"
    run_ranks(code)
    (line, *_) = _said(tmp_path / "r")
    for pattern in (  # whoever has been quiet longer comes first, which a busy machine decides
        r"rank 1 at 'step 5: reading data' for 0:0\d, in sleeper \(tests\.train\.test_watch:\d+\)",
        r"rank 0 at 'step 5: summing losses' for 0:0\d, in all_reduce \(tessera\.dist:\d+\)",
    ):
        assert re.search(pattern, line)
    assert not list((tmp_path / "r" / "state").rglob("*.json"))
