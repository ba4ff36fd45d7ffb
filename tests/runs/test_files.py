from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tessera.runs.files import (
    Lock,
    RunError,
    WriteError,
    atomic_write,
    fingerprint,
    remove_directories,
    replacing,
)


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path: Path):
    atomic_write(tmp_path / "a.json", "old")
    atomic_write(tmp_path / "a.json", "new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.json": "new"}


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_full_disk_keeps_the_old_file_and_says_so(tmp_path: Path, monkeypatch, call: str):
    file = tmp_path / "a.json"
    atomic_write(file, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(WriteError, match=rf"a\.json: {os.strerror(errno.ENOSPC)}"):
        atomic_write(file, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert file.read_text() == "old"


def test_a_really_full_disk(tmp_path: Path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        atomic_write(tmp_path / "a.json", "old")
        with pytest.raises(WriteError, match=os.strerror(errno.ENOSPC)):
            atomic_write(tmp_path / "a.json", b"x" * 200_000)
        assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.json": "old"}
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_partial_write_is_continued(tmp_path: Path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data)[:3]))
    atomic_write(tmp_path / "a", "0123456789")
    assert (tmp_path / "a").read_text() == "0123456789"


def test_what_a_killed_writer_left_is_cleared_by_the_next(tmp_path: Path):
    code = (
        "import os, signal, sys, pathlib; from tessera.runs import files; "
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL); "
        "files.atomic_write(pathlib.Path(sys.argv[1]), 'new')"
    )
    file = tmp_path / "a"
    atomic_write(file, "old")
    subprocess.run([sys.executable, "-c", code, str(file)], check=False)
    assert file.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    atomic_write(file, "newer")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "newer"}


def test_fingerprint_ignores_key_order_and_nothing_else():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert len({fingerprint(v) for v in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, [1], None)}) == 6


def test_lock_refuses_a_second_holder_naming_the_first(tmp_path: Path):
    lock = Lock(tmp_path)
    with pytest.raises(RunError, match=f"process {os.getpid()}"):
        Lock(tmp_path)
    lock.release()
    Lock(tmp_path).release()


def test_lock_of_a_killed_process_is_free(tmp_path: Path):
    code = (
        "import sys, time, pathlib; from tessera.runs.files import Lock; "
        "lock = Lock(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"process {holder.pid}"):
            Lock(tmp_path)
        holder.kill()
    Lock(tmp_path).release()


def test_a_held_directory_is_not_removed_nor_one_named_beside_it(tmp_path: Path):
    free, run = tmp_path / "free", tmp_path / "run"
    free.mkdir()
    lock = Lock(run)
    with pytest.raises(RunError, match=f"{run}.*process {os.getpid()}"):
        remove_directories(free, run)
    assert free.is_dir()
    lock.release()
    (run / "file").write_text("x")
    remove_directories(free, run)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path: Path):
    place = tmp_path / "place"
    for name in ("old", "new"):
        with replacing(place) as temporary:
            (temporary / "folder").mkdir()
            (temporary / "folder" / name).touch()
    with pytest.raises(WriteError) as error, replacing(place) as temporary:
        (temporary / "half").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(place) in str(error.value)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == [
        "place",
        "place/folder",
        "place/folder/new",
    ]


def test_a_directory_that_a_kill_left_between_two_renames_is_put_back(tmp_path: Path):
    for name in (".place.old", ".place.tmp"):
        (tmp_path / name).mkdir()
    with pytest.raises(KeyError), replacing(tmp_path / "place"):
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["place"]
