"""A job of two processes under torchrun: it stops when told, and says so when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tessera.model.checkpoint import load_model
from tessera.runs.run import is_done, read_manifest, read_metrics

ROOT = Path(__file__).parents[2]
RECIPE = """
name = "r"
[data]
tokenizer = "byte"
tasks = { calc = 400 }
[parent]
architecture = { hidden_size = 32, num_hidden_layers = 2, intermediate_size = 64 }
[parent.train]
steps = STEPS
tokens_per_step = 512
microbatch_tokens = 128
sequence_length = 64
save_seconds = 0.2
"""


def _start(path: Path, world: int = 2) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    words = ["--standalone", "-m", "tessera", "run", str(path / "r.toml"), "--runs", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command + words, env=environment, stderr=subprocess.PIPE, text=True, cwd=path
    )


def _wait_for_a_state(run: Path) -> None:
    until = time.monotonic() + 120
    while not list((run / "state").glob("step-*")):
        assert time.monotonic() < until, "no resume state in two minutes"
        time.sleep(0.05)


def _workers(job: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "r.toml").write_text(RECIPE.replace("STEPS", "100000"))
    return tmp_path


def _finish(path: Path, after: int) -> None:
    """Goes on for a few steps more than were made, in one process, from what the job left."""
    (path / "r.toml").write_text(RECIPE.replace("STEPS", "100000"))
    assert read_manifest(path / "r" / "parent").status in ("interrupted", "failed", "running")
    job = _start(path, world=1)
    try:
        until = time.monotonic() + 120
        while not (rows := read_metrics(path / "r" / "parent")) or rows[-1]["step"] <= after:
            assert time.monotonic() < until and job.poll() is None, "it did not go on"
            time.sleep(0.1)
    finally:
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=60)
    steps = [row["step"] for row in read_metrics(path / "r" / "parent")]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_sigterm_saves_and_stops_every_process(path: Path):
    run = path / "r" / "parent"
    job = _start(path)
    _wait_for_a_state(run)
    job.send_signal(signal.SIGTERM)
    _, told = job.communicate(timeout=60)
    assert "interrupted; what was done is kept" in told
    assert read_manifest(run).status == "interrupted"
    last = read_metrics(run)[-1]["step"]
    (state,) = (run / "state").glob("step-*")
    assert json.loads((state / "trainer.json").read_text())["step"] == last
    _finish(path, last)


@pytest.mark.slow
def test_a_killed_process_ends_the_job_with_the_reason(path: Path):
    run = path / "r" / "parent"
    job = _start(path)
    _wait_for_a_state(run)
    os.kill(_workers(job)[1], signal.SIGKILL)
    _, told = job.communicate(timeout=60)
    assert job.returncode != 0
    assert "Signal 9 (SIGKILL)" in told
    assert "process 0 of 2 lost another one" in told and "the same command again" in told
    _finish(path, read_metrics(run)[-1]["step"])


@pytest.mark.slow
def test_a_model_written_by_two_processes_is_a_model(tmp_path: Path):
    (tmp_path / "r.toml").write_text(RECIPE.replace("STEPS", "3"))
    job = _start(tmp_path)
    _, told = job.communicate(timeout=120)
    run = tmp_path / "r" / "parent"
    assert job.returncode == 0 and is_done(run), told
    assert (run / "model" / "model.safetensors.index.json").is_file()
    assert load_model(run).config.num_params() == sum(
        p.numel() for p in load_model(run).parameters()
    )
