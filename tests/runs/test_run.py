from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tessera.runs.files import RunError, WriteError
from tessera.runs.run import (
    Run,
    fingerprint_path,
    is_done,
    read_json,
    read_manifest,
    read_metrics,
    read_table,
)


def open_run(path: Path, config: dict[str, Any] | None = None, **inputs: Any) -> Run:
    return Run.open(path, stage="kd", config=config or {}, inputs=inputs, seed=3, quiet=True)


def test_done_is_written_last_and_clears_state(tmp_path: Path):
    with open_run(tmp_path / "kd", {"lr": 0.1}) as run:
        run.state_path.mkdir()
        run.write_table("scores", [{"layer": 0, "kl": 0.5}])
        run.write_json("architecture", {"words": [["gqa-2", "noop"]]})
        assert read_manifest(run.path).status == "running" and not is_done(run.path)
        run.finish()
    assert is_done(run.path) and not run.state_path.exists()
    assert read_table(run.path, "scores") == [{"layer": 0, "kl": 0.5}]
    assert read_json(run.path, "architecture") == {"words": [["gqa-2", "noop"]]}
    newest = max((p for p in run.path.rglob("*.json*")), key=lambda p: p.stat().st_mtime_ns)
    assert newest.name == "run.json"


def test_a_finished_run_is_never_reopened(tmp_path: Path):
    open_run(tmp_path / "kd").finish()
    with pytest.raises(RunError, match=str(tmp_path / "kd")):
        open_run(tmp_path / "kd")


def test_an_unfinished_run_goes_on_and_keeps_its_beginning(tmp_path: Path):
    first = open_run(tmp_path / "kd")
    first.interrupted()
    first.close()
    assert read_manifest(first.path).status == "interrupted"
    second = open_run(tmp_path / "kd")
    assert second.manifest.started == first.manifest.started
    assert read_manifest(second.path).status == "running"
    second.finish()
    assert read_manifest(second.path).seconds >= first.manifest.seconds


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), "interrupted"), (ValueError("bad"), "failed")]
)
def test_how_a_stage_ended_is_recorded(tmp_path: Path, error: BaseException, status: str):
    with pytest.raises(type(error)), open_run(tmp_path / "kd"):
        raise error
    assert read_manifest(tmp_path / "kd").status == status
    open_run(tmp_path / "kd").finish()
    assert is_done(tmp_path / "kd") and read_manifest(tmp_path / "kd").error is None


def test_an_interrupt_after_the_end_does_not_undo_it(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path / "kd") as run:
        run.finish()
        raise KeyboardInterrupt
    assert is_done(tmp_path / "kd")


def test_another_config_is_refused(tmp_path: Path):
    open_run(tmp_path / "kd", {"lr": 0.1}).close()
    with pytest.raises(RunError, match=str(tmp_path / "kd")):
        open_run(tmp_path / "kd", {"lr": 0.2})
    open_run(tmp_path / "kd", {"lr": 0.1}).close()  # the refusal let go of the directory


def test_a_directory_of_something_else_is_refused(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match=r"thesis\.tex"):
        open_run(tmp_path)


def test_a_second_process_is_refused(tmp_path: Path):
    with open_run(tmp_path / "kd"), pytest.raises(RunError, match=f"process {os.getpid()}"):
        open_run(tmp_path / "kd")


def test_metrics_survive_a_torn_line_and_rewind(tmp_path: Path):
    run = open_run(tmp_path / "kd")
    for step in range(1, 6):
        run.log(step, loss=1.0 / step)
    run.close()
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert [row["step"] for row in read_metrics(run.path)] == [1, 2, 3, 4, 5]
    run = open_run(tmp_path / "kd")
    run.rewind(3)
    run.log(4, loss=0.25)
    assert read_metrics(run.path) == [{"step": s, "loss": 1.0 / s} for s in range(1, 5)]


def test_metrics_are_json_even_when_the_loss_is_not_finite(tmp_path: Path):
    run = open_run(tmp_path / "kd")
    run.log(1, loss=float("nan"), norm=float("inf"), lr=0.1)
    (line,) = (run.path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=lambda word: pytest.fail(word)) == {
        "step": 1,
        "loss": None,
        "norm": None,
        "lr": 0.1,
    }


def test_a_table_with_a_number_that_json_lacks_is_refused(tmp_path: Path):
    run = open_run(tmp_path / "kd")
    with pytest.raises(RunError, match=r"\b1\b.*kl = inf"):
        run.write_table("scores", [{"kl": 0.5}, {"kl": float("inf")}])


def test_a_full_disk_while_logging(tmp_path: Path, monkeypatch):
    run = open_run(tmp_path / "kd")
    run.log(1, loss=1.0)

    def full(*_: Any, **__: Any):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        monkeypatch.context() as patch,
        pytest.raises(WriteError, match=os.strerror(errno.ENOSPC)),
        run,
    ):
        patch.setattr(os, "fdopen", full)
        patch.setattr(os, "write", full)
        run.log(2, loss=0.5)
    assert read_metrics(run.path) == [{"step": 1, "loss": 1.0}]
    open_run(tmp_path / "kd").finish()
    assert is_done(run.path)


def test_inputs_are_named_by_sibling_path_and_known_by_fingerprint(tmp_path: Path):
    parent = open_run(tmp_path / "runs" / "parent")
    with pytest.raises(RunError, match=str(parent.path)):
        open_run(tmp_path / "runs" / "kd", model=parent.path)
    parent.finish()
    outside = tmp_path / "checkpoint"
    outside.mkdir()
    (outside / "config.json").write_text("{}")
    run = open_run(tmp_path / "runs" / "kd2", model=parent.path, models=[outside], data=None)
    assert run.manifest.inputs == {
        "model": {
            "path": "parent",
            "fingerprint": parent.manifest.fingerprint,
            "started": parent.manifest.started,
        },
        "models": [{"path": str(outside), "fingerprint": fingerprint_path(outside)}],
        "data": None,
    }


def test_fingerprint_of_files_sees_contents_names_and_sizes(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(3 << 20))
    seen = {fingerprint_path(tmp_path)}
    for change in (lambda b: b + b"\0", lambda b: b"\1" + b[1:], lambda b: b[:-1] + b"\1"):
        file.write_bytes(change(bytes(3 << 20)))
        seen.add(fingerprint_path(tmp_path))
    file.rename(tmp_path / "other.safetensors")
    seen.add(fingerprint_path(tmp_path))
    assert len(seen) == 5


def test_tables_can_be_inherited(tmp_path: Path):
    child = open_run(tmp_path / "child")
    child.write_json("architecture", [1])
    child.finish()
    kd = open_run(tmp_path / "kd", model=child.path)
    kd.inherit(child.path, "architecture", "absent")
    assert read_json(kd.path, "architecture") == [1]


def test_an_absent_table_is_named_with_those_there_are(tmp_path: Path):
    run = open_run(tmp_path / "kd")
    run.write_table("scores", [])
    with pytest.raises(RunError, match=r"costs.*scores\.jsonl"):
        read_table(run.path, "costs")


def test_only_the_main_process_writes(tmp_path: Path, monkeypatch):
    main = open_run(tmp_path / "kd")
    monkeypatch.setenv("RANK", "1")
    with open_run(tmp_path / "kd") as other:
        other.log(1, loss=1.0)
        other.write_table("scores", [{"kl": 1.0}])
        other.finish()
    assert read_manifest(main.path).status == "running"
    assert not (main.path / "tables").exists() and not (main.path / "metrics.jsonl").exists()


def test_a_manifest_counts_the_cpu_of_its_children_too(tmp_path: Path):
    busy = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    spent = []
    for _ in range(2):  # interrupted once: what was spent before counts
        with suppress(KeyboardInterrupt), open_run(tmp_path / "kd") as run:
            subprocess.run([sys.executable, "-c", busy], check=True)
            if not spent:
                raise KeyboardInterrupt
            run.finish()
        assert run.manifest.cpu_seconds > 0.29  # clocks tick in hundredths
        spent.append(run.manifest.cpu_seconds)
    assert spent[1] > spent[0] + 0.29


def test_a_run_within_a_run_takes_no_peak_from_it(tmp_path):
    given = {"stage": "data", "config": {}, "inputs": {}, "seed": 0, "quiet": True}
    with Run.open(tmp_path / "outer", **given) as outer:
        held = len(b"x" * 300_000_000)
        with Run.open(tmp_path / "outer" / "inner", **given):
            pass
        outer.interrupted()
    assert outer.manifest.peak_memory > held
