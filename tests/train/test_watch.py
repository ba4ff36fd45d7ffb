"""Silence is told of once, with who is at what; without silence nothing is said."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tessera.run import Run
from tessera.train.watch import Watch, told
from tests.test_dist import run_ranks


def _run(path: Path) -> Run:
    return Run.open(path, stage="parent", config={}, inputs={}, seed=0, quiet=True)


def _said(path: Path) -> list[str]:
    log = path / "log.txt"
    return log.read_text().splitlines() if log.is_file() else []


def test_one_line_tells_of_everybody():
    now = 1000.0
    known = {
        0: ("step 12: losses and gradients", now - 128),
        1: ("step 12: losses and gradients", now - 130),
        2: ("step 12: reading data", now - 131),
        3: None,
    }
    assert told(known, now) == (
        "quiet for 2:08: ranks 0-1 at 'step 12: losses and gradients' for 2:10; "
        "rank 2 at 'step 12: reading data' for 2:11; rank 3 not heard of: moving, or gone"
    )
    assert told({0: ("step 1: saving", now - 60)}, now) == (
        "quiet for 1:00: at 'step 1: saving' for 1:00"
    )


def test_silence_is_told_of_once_until_it_has_doubled(tmp_path):
    with _run(tmp_path / "r") as run, Watch(run, quiet=0.4) as watch:
        watch.at("step 3: reading data")
        time.sleep(0.7)
        first = _said(run.path)
        watch.at("step 3: losses and gradients")
        time.sleep(0.1)
    assert len(first) == 1 and "at 'step 3: reading data'" in first[0]
    assert _said(run.path) == first


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
    assert "rank 0 at 'step 5: summing losses'" in line
    assert "rank 1 at 'step 5: reading data'" in line
    assert not list((tmp_path / "r" / "state").rglob("*.json"))
