"""What happens to files and streams of a run, and what is said of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tessera.cli.main import app
from tessera.model.checkpoint import load_model, save_model
from tessera.runs.files import Journal, RunError, atomic_write
from tessera.runs.run import Run, read_json, read_manifest, read_table, verify
from tests import tiny


def made(path: Path) -> Path:
    """A finished run with a model, a table and a log."""
    with Run.open(path, stage="kd", config={}, inputs={}, seed=0, quiet=True) as run:
        save_model(tiny.model(tiny.PARENT), run.model_path)
        run.write_table("scores", [{"layer": 0, "kl": 0.5}])
        run.write_json("architecture", {"words": [list(words) for words in tiny.PARENT]})
        run.log(1, loss=1.0)
        run.say("said")
        run.finish()
    return path


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def tessera(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_every_file_of_a_run_has_its_checksum_and_a_copy_verifies(tmp_path: Path):
    run = made(tmp_path / "kd")
    there = {str(f.relative_to(run)) for f in run.rglob("*") if f.is_file()}
    assert read_manifest(run).files.keys() == there - {"run.json", ".lock"}
    subprocess.run(["cp", "-r", run, tmp_path / "copy"], check=True)
    assert verify(run) == verify(tmp_path / "copy") == []
    assert tessera("verify", tmp_path)[0] == 0


def test_a_flipped_bit_is_noticed_by_verify_in_every_file_and_by_every_reader(tmp_path: Path):
    run = made(tmp_path / "kd")
    readers: dict[str, Callable[[], object]] = {
        "model/model.safetensors": lambda: load_model(run),
        "model/config.json": lambda: load_model(run),
        "tables/scores.jsonl": lambda: read_table(run, "scores"),
        "tables/architecture.json": lambda: read_json(run, "architecture"),
    }
    for name in read_manifest(run).files:
        file = run / name
        before, place = file.read_bytes(), file.stat().st_size - 3
        flip(file, place)
        code, said = tessera("verify", run)
        assert code == 1 and str(file) in said.replace("\n", "")
        if name in readers:
            with pytest.raises(ValueError, match=name):
                readers[name]()
        file.write_bytes(before)
    assert verify(run) == [] and load_model(run)
    (run / "extra").write_text("")
    (run / "log.txt").unlink()
    told = " ".join(verify(run))
    assert "extra came after" in told and "log.txt is missing" in told
    manifest = (run / "run.json").read_text()
    (run / "run.json").write_text(manifest.replace('"seed": 0', '"seed": 1'))
    assert any("run.json has changed" in one for one in verify(run))


def test_nothing_is_written_through_a_link(tmp_path: Path):
    target, run = tmp_path / "target", tmp_path / "kd"
    target.write_text("mine")
    run.mkdir()
    for name in (
        ".lock",
        ".run.json.tmp",
        "run.json",
        "log.txt",
        "metrics.jsonl",
        "tables",
        "state",
    ):
        (run / name).symlink_to(target)
        with pytest.raises(RunError, match=r"is a link.*remove it"):
            Run.open(run, stage="kd", config={}, inputs={}, seed=0)
        (run / name).unlink()
        assert target.read_text() == "mine"
    (run / "journal.jsonl").symlink_to(target)
    with pytest.raises(RunError, match="is a link"), Journal(run / "journal.jsonl"):
        pass
    (run / ".table.tmp").symlink_to(target)
    atomic_write(run / "table", "ours")  # the link goes, not what it names
    assert target.read_text() == "mine" and (run / "table").read_text() == "ours"


DEEP = b"[" * 100_000 + b"\n"
DAMAGES: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a link": lambda file: file.symlink_to("/dev/zero"),
    "a directory": Path.mkdir,
    "deep": lambda file: file.write_bytes(DEEP),
    "no UTF-8": lambda file: file.write_bytes(b"\xff\n"),
    "another form": lambda file: file.write_bytes(b"[3]\n"),
    "a long number": lambda file: file.write_bytes(b'{"seed": ' + b"9" * 5000 + b"}\n"),
    "null": lambda file: file.write_bytes(b"null\n"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["run.json", "tables/scores.jsonl", "metrics.jsonl"])
def test_a_damaged_file_is_one_sentence_and_stops_no_other_runs_report(
    tmp_path: Path, damage: str, name: str
):
    run, other = made(tmp_path / "runs" / "kd"), made(tmp_path / "runs" / "sft")
    (run / name).unlink()
    DAMAGES[damage](run / name)
    for command in (["show", run], ["show", run.parent], ["report", run.parent, "--markdown"]):
        code, said = tessera(*command)
        assert code in (0, 2) and "Traceback" not in said
        if command[1] == run.parent:
            assert code == 0 and other.name in said
            if name == "run.json" or command[0] == "report":
                assert str(run / name) in said
    code, said = tessera("verify", run.parent)
    assert code == 1 and str(run) in said and f"{other}: every file" in said


def command(arguments: str, out: str) -> int:
    """The exit code of a command of a shell whose output goes as `out` says."""
    line = f"{sys.executable} -c 'from tessera.cli.main import main; main()' {arguments} {out}"
    return subprocess.run(["bash", "-c", line], check=False, capture_output=True).returncode


def test_work_goes_on_without_a_reader_and_a_failure_keeps_its_exit_code(tmp_path: Path):
    pipe = "2>&1 | true; exit ${PIPESTATUS[0]}"
    for number, out in enumerate((pipe, ">&- 2>&-", "2>/dev/full")):
        file = tmp_path / f"{number}.jsonl"
        assert command(f"data tasks calc {file} --count 5", out) == 0
        assert len(file.read_text().splitlines()) == 10
        assert command(f"show {tmp_path}/absent", out) == 2
    run = made(tmp_path / "kd")
    flip(run / "log.txt", 0)
    assert command(f"verify {run}", pipe) == 1
    assert command(f"show {run}", pipe) == 0
    assert command(f"show {run}", "> /dev/full") != 0  # what was asked for is lost


def test_a_recipe_of_any_depth_or_length_is_one_sentence(tmp_path: Path):
    file = tmp_path / "r.toml"
    texts = ["a = " + "[" * 100_000, "seed = " + "9" * 5000, "[kd]\n" + "x = 1e999\n", "\0"]
    for text in [*texts, "#" * (5 << 20), json.dumps("\ud800")]:
        file.write_text(text)
        code, said = tessera("check", file)
        assert code == 2 and said.startswith("error: "), said
    os.remove(file)
    os.mkfifo(file)
    assert tessera("check", file)[0] == 2
