"""A run directory: everything one stage of one recipe made, and whether to believe it.

    run.json       manifest: stage, status, resolved config, inputs and fingerprints, seed
    recipe.toml    the stage's resolved table      metrics.jsonl  one object a logged step
    log.txt        the messages printed            timings.jsonl  how fast each step was
    tables/        NAME.jsonl, NAME.json
    model/         Hugging Face layout             state/         for resuming, gone when done

`status = "done"` is written last, by rename, with the checksum of every file; a run without it is
resumed or refused, never read.
"""

from __future__ import annotations

import ctypes
import datetime as dt
import functools
import gc
import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import TypeAdapter, ValidationError

from tessera import dist
from tessera.progress import tell
from tessera.runs.files import (
    Lock,
    RunError,
    WriteError,
    atomic_write,
    checksum,
    file_identity,
    fingerprint,
    open_plain,
    parse,
    read_plain,
    remove_directories,
    writing,
)

Status = Literal["running", "done", "failed", "interrupted"]
LARGE = 0.5e9  # bytes that a stage took and that are worth a collection, which takes seconds
LOGS = ("metrics.jsonl", "timings.jsonl")  # one object a step
NO_WORK = {"run.json", "recipe.toml", "log.txt", "quarantine.jsonl", ".lock"}
InputPaths = Mapping[str, "Path | Sequence[Path] | None"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The contents of `run.json`. An input is its path, fingerprint and, of a run, its start.

    files: of a finished run, the checksum of each; own: that of all else in the manifest.
    """

    name: str
    stage: str
    status: Status
    fingerprint: str
    seed: int
    config: dict[str, Any]
    inputs: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    started: str = ""
    finished: str | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of the main process and the children it has waited for
    peak_memory: int = 0  # bytes that the main process held at most, of all that has run in it
    error: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    own: str = ""


def fingerprint_path(path: Path) -> str:
    """A finished run's own fingerprint; else that of names, sizes, first and last MiB of files.

    Raises RunError for a run that is not done and for a path that does not exist.
    """
    if manifest := find_manifest(path):
        if manifest.status != "done":
            raise RunError(
                f"{path} is not finished (status {manifest.status}); run its recipe again first"
            )
        return manifest.fingerprint
    if path.is_file():
        return fingerprint([path.name, *file_identity(path)])
    if not path.is_dir():
        raise RunError(f"{path} does not exist; give a run, a model directory or a file")
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    return fingerprint([[str(p.relative_to(path)), *file_identity(p)] for p in files])


def run_fingerprint(
    stage: str, config: Mapping[str, Any], seed: int, inputs: Mapping[str, Any]
) -> str:
    """The identity of a run; `inputs` holds fingerprints, by need, None for an absent one."""
    return fingerprint([stage, dict(config), seed, dict(inputs)])


def read_manifest(path: Path) -> Manifest:
    """The manifest of a run directory. Raises RunError when there is none or it is not one."""
    file = path / "run.json"
    try:
        manifest = _manifests().validate_json(read_plain(file))
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{path} is no run directory: it holds no run.json") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise RunError(f"{file} is no manifest of tessera's: {where} {first['msg']}") from None
    for one in manifest.inputs.values():
        for reference in one if isinstance(one, list) else [one]:
            if not (reference is None or {"path", "fingerprint"} <= _texts(reference)):
                raise RunError(f"{file} is no manifest of tessera's: inputs name no path")
    return manifest


@functools.cache
def _manifests() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


def _texts(value: Any) -> set[str]:
    return {k for k, v in value.items() if isinstance(v, str)} if isinstance(value, dict) else set()


def find_manifest(path: Path) -> Manifest | None:
    """The manifest of a run directory; None where there is no run."""
    return read_manifest(path) if (path / "run.json").is_file() else None


def runs_in(folder: Path, depth: str = "*") -> list[Path]:
    """The run directories below a folder, without old ones that are being made anew."""
    found = folder.glob(f"{depth}/run.json") if folder.is_dir() else []
    return sorted(file.parent for file in found if not file.parent.name.startswith("."))


def is_done(path: Path) -> bool:
    """True for a finished run; everything else may not be read."""
    manifest = find_manifest(path)
    return manifest is not None and manifest.status == "done"


def read_table(path: Path, name: str) -> list[dict[str, Any]]:
    """The rows of `tables/NAME.jsonl`. Raises RunError naming the tables there are."""
    file = path / "tables" / f"{name}.jsonl"
    rows = [parse(line, file) for line in _table(path, file.name).split(b"\n") if line]
    if not all(isinstance(row, dict) for row in rows):
        raise RunError(f"{file} holds a line that is no row; make the run anew with --redo")
    return rows


def read_json(path: Path, name: str) -> Any:
    """The value of `tables/NAME.json`. Raises RunError naming the tables there are."""
    return parse(_table(path, f"{name}.json"), path / "tables" / f"{name}.json")


def _table(path: Path, name: str) -> bytes:
    file = path / "tables" / name
    if not os.path.lexists(file):
        names = sorted(p.name for p in file.parent.glob("*.json*"))
        raise RunError(f"{path} has no {name}; it has: {', '.join(names) or 'none'}")
    require_intact(file)
    return read_plain(file)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged steps of a run; a line that a crash tore in half is no step."""
    return whole_lines(path / "metrics.jsonl")[0]


def read_timings(path: Path) -> list[dict[str, Any]]:
    """How fast the logged steps of a run were: seconds, tokens a second, MFU."""
    return whole_lines(path / "timings.jsonl")[0]


def whole_lines(file: Path) -> tuple[list[dict[str, Any]], bool]:
    """The complete records of a JSON-lines file, and whether the file ends in half of one."""
    if not os.path.lexists(file):
        return [], False
    *lines, tail = read_plain(file).split(b"\n")
    rows = [parse(line, f"a line of {file}") for line in lines]
    if not all(isinstance(row, dict) for row in rows):
        raise RunError(f"{file} holds a line that is no record; delete the run")
    return rows, tail != b""


# Checksums of finished runs.

DEPTH = 4  # directories of a run above a file: library/03/ffn/swiglu-256.safetensors


def checksums(path: Path) -> dict[str, str]:
    """The checksum of every file of a run, by its name there; of what is written while a run goes
    on (`state/`, hidden files, the manifest) none."""
    return {str(file.relative_to(path)): checksum(file) for file in _contents(path)}


def _contents(path: Path) -> list[Path]:
    found = []
    for folder, names, files in os.walk(path):
        top = Path(folder) == path
        names[:] = [n for n in names if not n.startswith(".") and not (top and n == "state")]
        mine = [n for n in files if not (n.startswith(".") or (top and n == "run.json"))]
        found += [Path(folder, n) for n in mine]
    return sorted(file for file in found if not file.is_symlink() and file.is_file())


def require_intact(file: Path) -> None:
    """Raises RunError for a file of a finished run that is not as it was when the run ended."""
    above = file.absolute().parents[:DEPTH]
    for path in above:
        try:
            stamp = (path / "run.json").stat().st_mtime_ns
        except OSError:
            continue
        expected = _finished(path, stamp).get(file.absolute().relative_to(path).as_posix())
        if expected and checksum(file) != expected:
            raise RunError(f"{file} {CHANGED}")
        return


CHANGED = (
    "has changed since its run was finished: the disk, a copy or a person has damaged it. Copy it "
    "again, or make the run anew with --redo"
)


@functools.lru_cache
def _finished(path: Path, stamp: int) -> dict[str, str]:
    return read_manifest(path).files


def verify(path: Path) -> list[str]:
    """What is wrong with the files of a run, a sentence each. Raises RunError for no manifest."""
    manifest = read_manifest(path)
    if manifest.status != "done" or not manifest.own:
        why = "is not finished" if manifest.status != "done" else "was finished without checksums"
        return [f"{path} {why}: nothing tells whether its files are whole"]
    problems = [] if _own(manifest) == manifest.own else [f"{path / 'run.json'} {CHANGED}"]
    there = {str(file.relative_to(path)): file for file in _contents(path)}
    for name, expected in manifest.files.items():
        if name not in there:
            problems.append(f"{path / name} is missing, or no plain file any more")
        elif checksum(there[name]) != expected:
            problems.append(f"{path / name} {CHANGED}")
    return problems + [f"{path / n} came after the run" for n in there if n not in manifest.files]


def _own(manifest: Manifest) -> str:
    return fingerprint(asdict(replace(manifest, own="")))


def versions() -> dict[str, str]:
    """Which software made a run."""
    found = {"python": platform.python_version()}
    for package in ("tessera", "torch", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Run:
    """One run directory, open for its stage; a context manager that records how it ended.

    Of a job's processes only the main one writes.
    """

    def __init__(self, path: Path, manifest: Manifest, lock: Lock | None, quiet: bool) -> None:
        self.path = path
        self.manifest = manifest
        self.name, self.stage = manifest.name, manifest.stage
        self.seed, self.config = manifest.seed, manifest.config
        self.model_path = path / "model"
        self.state_path = path / "state"
        self.tables = path / "tables"
        self.quiet = quiet
        self._lock = lock
        self._writes = dist.is_main()
        self._afterwards: list[Callable[[], object]] = []
        self._opened, self._opened_cpu = time.monotonic(), _cpu_seconds()
        self._spent, self._spent_cpu = manifest.seconds, manifest.cpu_seconds
        self._resident = resident_memory()
        begin_peak()
        self._peaks = len(_peaks)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        stage: str,
        config: Mapping[str, Any],
        inputs: InputPaths,
        seed: int,
        identity: Mapping[str, Any] | None = None,
        quiet: bool = False,
    ) -> Run:
        """Creates a run, or resumes one of the same fingerprint, made from `identity` or `config`.

        Raises RunError when it is finished, differs, is in use, or an input is unfinished.
        """
        lock = Lock(path) if dist.is_main() else None
        try:
            _refuse_links(path)
            made = config if identity is None else identity
            manifest = _begin(path, stage, dict(config), made, inputs, seed)
            run = cls(path, manifest, lock, quiet)
            run._save()
            run.rewind()
        except BaseException:
            if lock:
                lock.release()
            raise
        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.interrupted()
        elif error is not None:
            reason = f"{type(error).__name__}: {error}"
            try:
                self._append("log.txt", reason)
                self._end("failed", reason)
            except WriteError:  # a full disk: the manifest says "running", which is resumed as well
                pass
        self.close()

    def log(self, step: int, file: str = "metrics.jsonl", /, **numbers: Any) -> None:
        """Appends one step's numbers to `metrics.jsonl`; what is not finite becomes null."""
        row = {key: v.item() if hasattr(v, "item") else v for key, v in numbers.items()}
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                row[key] = None
        self._append(file, json.dumps({"step": step, **row}))

    def log_timing(self, step: int, **timings: float) -> None:
        """Appends to `timings.jsonl`, apart from what two runs of one fingerprint agree on."""
        self.log(step, "timings.jsonl", **timings)

    def rewind(self, last: float = math.inf) -> None:
        """Drops the logged steps after `last`, and half a line that a killed process left."""
        for file in (self.path / name for name in LOGS):
            rows, torn = whole_lines(file) if self._writes else ([], False)
            kept = [row for row in rows if row.get("step", last) <= last]
            if torn or len(kept) < len(rows):
                atomic_write(file, _lines(kept))

    def say(self, text: str) -> None:
        """Prints a line for the user and keeps it in `log.txt`."""
        if self._writes and not self.quiet:
            tell(text)
        self._append("log.txt", f"{dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M:%S} {text}")

    def write_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes `tables/NAME.jsonl` whole. Raises RunError for a number that is not finite."""
        for index, row in enumerate(rows):
            for column, value in row.items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise RunError(f"table {name!r}: row {index} has {column} = {value}: {row}")
        self.write_file(f"tables/{name}.jsonl", _lines(rows))

    def write_json(self, name: str, value: Any) -> None:
        """Writes `tables/NAME.json`, whole or not at all."""
        text = json.dumps(value, indent=1, allow_nan=False, default=_plain)
        self.write_file(f"tables/{name}.json", text + "\n")

    def write_file(self, name: str, data: str | bytes) -> None:
        """Writes a file of this run, whole or not at all; `name` is relative to it."""
        file = self.path / name
        if self._writes:
            with writing(file):
                file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file, data)

    def inherit(self, source: Path, *names: str) -> None:
        """Copies tables of the run this one was made from; what `source` lacks is left out."""
        for name in names:
            for file in (source / "tables").glob(f"{name}.json*"):
                self.write_file(f"tables/{file.name}", file.read_bytes())

    def read_table(self, name: str) -> list[dict[str, Any]]:
        """The rows of one of this run's own tables."""
        return read_table(self.path, name)

    def finish(self) -> None:
        """Declares the run done: the last thing written, after which nothing here changes."""
        self._end("done")
        if self._writes:
            shutil.rmtree(self.state_path, ignore_errors=True)
            for tidy in self._afterwards:
                try:
                    tidy()
                except Exception as error:  # the run is done whatever is left elsewhere
                    self.say(f"resume states are left behind: {error}")
        self.close()

    def afterwards(self, tidy: Callable[[], object]) -> None:
        """Has the main process call `tidy` when the run is done."""
        self._afterwards.append(tidy)

    def interrupted(self) -> None:
        """Records that the user stopped the stage; what it left stays for resuming."""
        self._end("interrupted")

    def close(self) -> None:
        """Lets another process open this directory."""
        if self._lock:
            self._lock.release()
        if resident_memory(peak=True) - self._resident > LARGE:
            release_memory()
            begin_peak()

    def _end(self, status: Status, error: str | None = None) -> None:
        if self.manifest.status == "done":  # a Ctrl-C that lands after the end does not undo it
            return
        self.manifest = replace(
            self.manifest,
            status=status,
            error=error,
            finished=dt.datetime.now(dt.UTC).isoformat(),
            seconds=round(self._spent + time.monotonic() - self._opened, 3),
            cpu_seconds=round(self._spent_cpu + _cpu_seconds() - self._opened_cpu, 3),
            peak_memory=max(
                self.manifest.peak_memory, resident_memory(True), *_peaks[self._peaks :]
            ),
        )
        self._save()

    def _save(self) -> None:
        if self.manifest.status == "done" and self._writes:
            self.manifest = replace(self.manifest, files=checksums(self.path))
            self.manifest = replace(self.manifest, own=_own(self.manifest))
        text = json.dumps(asdict(self.manifest), indent=1, default=_plain)
        self.write_file("run.json", text + "\n")

    def _append(self, name: str, line: str) -> None:
        if self._writes and self.manifest.status != "done":
            file, flags = self.path / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT
            with writing(file), os.fdopen(open_plain(file, flags), "ab", buffering=0) as handle:
                handle.write(line.encode(errors="replace") + b"\n")


def _refuse_links(path: Path) -> None:
    """Raises RunError for a link in a run, through which its files would be written elsewhere."""
    for folder, names, files in os.walk(path):
        for one in (Path(folder, name) for name in (*names, *files)):
            if one.is_symlink():
                raise RunError(f"{one} is a link, and a run holds plain files; remove it")


def _begin(
    path: Path,
    stage: str,
    config: dict[str, Any],
    made: Mapping[str, Any],
    inputs: InputPaths,
    seed: int,
) -> Manifest:
    """The manifest to start or to go on with."""
    references = {need: _reference(value, path.parent) for need, value in inputs.items()}
    prints = {need: _print_of(value) for need, value in references.items()}
    identity = run_fingerprint(stage, made, seed, prints)
    if dist.is_main():  # the other processes would see what this one is writing
        if manifest := find_manifest(path):
            if manifest.fingerprint != identity:
                raise RunError(
                    f"{path} was begun with another config, seed or inputs; delete it first"
                )
            if manifest.status == "done":
                raise RunError(f"{path} is finished and never changes; delete it to redo it")
            return replace(manifest, status="running", finished=None, error=None)
        if foreign := sorted(p.name for p in path.iterdir() if not p.name.startswith(".")):
            raise RunError(
                f"{path} holds files ({', '.join(foreign[:3])}) but no run.json; name another "
                "directory or empty this one"
            )
    return Manifest(
        name=path.name,
        stage=stage,
        status="running",
        fingerprint=identity,
        seed=seed,
        config=config,
        inputs=references,
        versions=versions(),
        started=dt.datetime.now(dt.UTC).isoformat(),
    )


def _reference(value: Path | Sequence[Path] | None, near: Path) -> Any:
    """How the manifest names an input: its path, relative where it is a sibling, and its hash."""
    if value is None:
        return None
    if not isinstance(value, Path):
        return [_reference(path, near) for path in value]
    shown, home = value.resolve(), near.resolve()
    if shown.is_relative_to(home):
        shown = shown.relative_to(home)
    found = {"path": str(shown), "fingerprint": fingerprint_path(value)}
    manifest = find_manifest(value)
    return {**found, "started": manifest.started} if manifest else found


def _print_of(reference: Any) -> Any:
    if isinstance(reference, list):
        return [_print_of(one) for one in reference]
    return reference and reference["fingerprint"]


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, default=_plain) + "\n" for row in rows)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def _cpu_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def release_memory() -> None:
    """Gives the system back what memory is free; glibc keeps gigabytes for the next stage else."""
    gc.collect()  # models that refer to themselves
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


_peaks: list[int] = []  # before each `begin_peak`; a race's heats begin them within its own run


def begin_peak() -> None:
    """Makes Linux count the peak anew; elsewhere it is that of all stages so far."""
    _peaks.append(resident_memory(peak=True))
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_memory(peak: bool = False) -> int:
    """Bytes of memory that this process holds, or has held at most since `begin_peak`; where that
    is not known, the most that it ever held."""
    key = "VmHWM" if peak else "VmRSS"
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((1024 * int(x.split()[1]) for x in lines if x.startswith(key)), 0)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def aside(path: Path) -> Path:
    """Where a run is kept while another is made in its place."""
    return path.with_name(f".{path.name}.old")


def holds_no_work(path: Path) -> bool:
    """True for a run that stopped before it made anything, so a corrected recipe may restart it."""
    return not path.exists() or {file.name for file in path.iterdir()} <= NO_WORK


@contextmanager
def replacing_run(path: Path, anew: bool) -> Iterator[None]:
    """Keeps the old run at `aside(path)` until the new one is done; `anew` where it begins now.

    An error before the new run holds any work puts the old one back. The old run's lock moves too.
    """
    old = aside(path)
    if not old.exists() and not (anew and path.exists()):
        yield
        return
    with Lock(old if old.exists() else path):
        if not old.exists():
            with writing(old):
                os.replace(path, old)
        elif anew and path.exists():  # An unfinished attempt: the run worth keeping is the older.
            remove_directories(path)
        try:
            yield
        except BaseException:
            if holds_no_work(path):
                _put_back(path)
            raise
        shutil.rmtree(old)


def settle(path: Path, fingerprint: str) -> bool:
    """Ends what a process killed inside `replacing_run` left; False where nothing was to end.

    The old run is put back where the new one holds no work, or where `fingerprint`, the recipe's,
    is the old run's and not the new one's.
    """
    old = aside(path)
    if not old.exists():
        return False
    with Lock(old):
        kept, new = (find_manifest(one) for one in (old, path))
        if is_done(path):
            shutil.rmtree(old)
        elif holds_no_work(path) or (
            kept
            and kept.fingerprint == fingerprint
            and not (new and new.fingerprint == fingerprint)
        ):
            _put_back(path)
        else:
            return False
    return True


def _put_back(path: Path) -> None:
    if path.exists():
        remove_directories(path)
    with writing(path):
        os.replace(aside(path), path)
