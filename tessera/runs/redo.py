"""A run that is made anew: marked when that is asked for, kept until its own stage has done it.

    .redo       in the run's directory: a mark, which holds who asked and what is to become of it
    .NAME.old   beside the run's directory: the run as it was, while its stage makes the new one

A mark outlives whatever ends the process, so a run made from what has been made again since is
never taken for a finished one, even where a measurement made again has the same fingerprint. A
run without `.old` is whole; one with it is put back, gone on with, or done. What is redone, and
in which order, is no business of this file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tessera.runs.files import Lock, atomic_write, remove_directories, writing
from tessera.runs.run import is_done, read_manifest

MARK = ".redo"
_NO_WORK = {"run.json", "recipe.toml", "log.txt", "quarantine.jsonl", ".lock", MARK}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Why a run is to be made anew.

    named: the stages that the user named, and this one is one of them or follows from them.
    becomes: the fingerprint of the run that takes its place.
    inputs: when each of its inputs that are to be redone was begun; "" where there was none.
    """

    named: tuple[str, ...]
    becomes: str
    inputs: dict[str, str]

    def outdated(self, begun: Mapping[str, str]) -> bool:
        """True when one of the inputs has been replaced; `begun` holds when those now here were."""
        return any(begun.get(name, "") != time for name, time in self.inputs.items())


def read_mark(path: Path) -> Mark | None:
    """The mark of a run directory, or None."""
    try:
        value = json.loads((path / MARK).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Mark(named=tuple(value.pop("named")), **value)


def mark_all(marks: Mapping[Path, Mark], worthless: Sequence[Path] = ()) -> None:
    """Marks runs as to be made anew, and deletes those that hold nothing.

    Of a run that is marked already, the first mark knows what the run was made from.
    Raises RunError naming the process that holds one of them; then none is touched.
    """
    with ExitStack() as held:
        for path in marks:
            held.callback(Lock(path).release)
        remove_directories(*worthless)
        for path, mark in marks.items():
            if first := read_mark(path):
                named = tuple(dict.fromkeys([*first.named, *mark.named]))
                mark = replace(mark, named=named, inputs={**mark.inputs, **first.inputs})
            atomic_write(path / MARK, json.dumps(asdict(mark)) + "\n")


def withdraw_marks(paths: Sequence[Path]) -> None:
    """Takes runs for what they were before a redo that failed, where their inputs are the same."""
    files = {path: path / "run.json" for path in paths}
    begun = {p.name: read_manifest(p).started for p, file in files.items() if file.is_file()}
    for path in paths:
        mark = read_mark(path)
        if mark and not mark.outdated(begun):
            (path / MARK).unlink()


def aside(path: Path) -> Path:
    """Where a run is while another is made in its place."""
    return path.with_name(f".{path.name}.old")


def holds_no_work(path: Path) -> bool:
    """True for a run that stopped before it made anything: a mistake put right begins anew."""
    return not path.exists() or {file.name for file in path.iterdir()} <= _NO_WORK


@contextmanager
def replacing(path: Path, anew: bool) -> Iterator[None]:
    """Keeps the old run beside the new one until that is done; `anew` where it begins now.

    Whatever ends the stage before it has made anything puts the old run back. The lock goes with
    the directory, so no other process takes it for one that a killed process left.
    """
    lock = _set_aside(path, anew)
    if lock is None:
        yield
        return
    try:
        yield
    except BaseException:
        if holds_no_work(path):
            _put_back(path)
        raise
    else:
        shutil.rmtree(aside(path))
    finally:
        lock.release()


def _set_aside(path: Path, anew: bool) -> Lock | None:
    """The hold on the old run of a path, now aside; None where there is no old run."""
    old = aside(path)
    if not old.exists() and not (anew and path.exists()):
        return None
    lock = Lock(old if old.exists() else path)
    try:
        if not old.exists():
            with writing(old):
                os.replace(path, old)
        elif anew and path.exists():  # a try before this one: the run worth keeping is the older
            remove_directories(path)
    except BaseException:
        lock.release()
        raise
    return lock


def settle(path: Path, fingerprint: str) -> bool:
    """Ends what a killed process left half done; False where there was nothing to end.

    The old run is put back where the new one holds nothing, or where the recipe, to which
    `fingerprint` belongs, is the old one's again. Raises RunError where a process works on it.
    """
    old = aside(path)
    if not old.exists():
        return False
    lock = Lock(old)
    try:
        if is_done(path):
            shutil.rmtree(old)
        elif holds_no_work(path) or _known_by(old) == fingerprint != _known_by(path):
            _put_back(path)
        else:
            return False
    finally:
        lock.release()
    return True


def _known_by(path: Path) -> str | None:
    return read_manifest(path).fingerprint if (path / "run.json").is_file() else None


def _put_back(path: Path) -> None:
    if path.exists():
        remove_directories(path)
    with writing(path):
        os.replace(aside(path), path)
