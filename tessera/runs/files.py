"""Files that survive a crash: written whole or not at all, owned by one process, known by hash."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from tessera import dist

MEBIBYTE = 1 << 20


class RunError(ValueError):
    """A run directory that cannot be used this way; the text says what to do."""


class FailureError(RunError):
    """The work failed, not the user's input (a loss that is not finite): exit code 1."""

    exit_code = 1


class WriteError(FailureError):
    """A file that could not be written (disk full, no permission); what was there is intact."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's refusal to write into a WriteError that names the path and the reason."""
    try:
        yield
    except OSError as error:
        if error.errno is None and _is_full(path):  # numpy, which writes GGUF files, tells none
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reason = error.strerror or str(error)
        raise WriteError(
            f"could not write {path}: {reason}. What was there is intact{advice_on(error)}."
        ) from error


def _is_full(path: Path) -> bool:
    with suppress(OSError):
        return shutil.disk_usage(path if path.exists() else path.parent).free < MEBIBYTE
    return False


def advice_on(error: OSError) -> str:
    """What to do about a full disk, as the end of a sentence; "" where it is another refusal."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "; free some space and run the same command again" if full else ""


def open_plain(path: Path, flags: int) -> int:
    """A descriptor of a plain file of a run. Follows no link, and waits for no FIFO.

    Raises RunError for what is no plain file, OSError.
    """
    with suppress(FileNotFoundError):
        _require_plain(path, path.lstat().st_mode)
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        _require_plain(path, os.fstat(descriptor).st_mode)
    except RunError:
        os.close(descriptor)
        raise
    return descriptor


def _require_plain(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFLNK: "a link", stat.S_IFIFO: "a FIFO", stat.S_IFDIR: "a directory"}
        kind = kinds.get(stat.S_IFMT(mode), "a device or a socket")
        raise RunError(f"{path} is {kind}, and a run holds plain files there; remove it")


def read_plain(path: Path) -> bytes:
    """A plain file of a run. Raises RunError naming it, FileNotFoundError."""
    try:
        with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise
    except (OSError, MemoryError) as error:
        raise RunError(f"{path} cannot be read: {str(error) or 'no memory is left'}") from None


def parse(data: str | bytes, where: object) -> Any:
    """The JSON value of a text. Raises RunError naming where it is from."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # also long numbers, bytes that are no UTF-8
        raise RunError(f"{where} is not valid JSON: {error}") from None


# Checksums. CRC-32 tells every flipped bit and runs at 7 GB/s where SHA-256 makes 2: saving and
# loading wait for the disk and not for it. It proves nothing against people: whoever can write
# a file of a run can write its manifest too.

_sums: dict[tuple[int, int, int], str] = {}  # by inode, size and time


def checksum(path: Path) -> str:
    """The CRC-32 of a plain file; not computed again while the file is unchanged. Raises RunError,
    OSError."""
    with os.fdopen(open_plain(path, os.O_RDONLY), "rb", buffering=0) as file:
        key = _state_of(file.fileno())
        if key not in _sums:
            found, buffer = 0, bytearray(MEBIBYTE)
            while size := file.readinto(buffer):
                found = zlib.crc32(memoryview(buffer)[:size], found)
            _sums[key] = f"{found:08x}"
    return _sums[key]


def _state_of(descriptor: int) -> tuple[int, int, int]:
    found = os.fstat(descriptor)
    return found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def summed(path: Path) -> Iterator[Callable[[Any], None]]:
    """A new file, synced at the end, and what writes to it. A thread makes its checksum."""
    done: Future[int] = Future()
    done.set_result(0)
    descriptor = open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    def write(data: Any) -> None:
        nonlocal done
        done = pool.submit(zlib.crc32, data, done.result())
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]

    try:
        with ThreadPoolExecutor(1, "checksum") as pool:
            yield write
            os.fsync(descriptor)
        _sums[_state_of(descriptor)] = f"{done.result():08x}"
    finally:
        os.close(descriptor)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Replaces a file whole, by fsync and rename. Raises WriteError; the old file is then intact.

    One writer at a time, as a run's lock ensures: the temporary name is fixed.
    """
    data = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            temporary.unlink(missing_ok=True)  # a killed writer's
            with summed(temporary) as write:
                write(data)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def resumable(file: Path, compute: Callable[[], Any]) -> Any:
    """What `compute` returns, as JSON values, from `file` where it was finished before."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(compute()))
    return parse(read_plain(file), file)


def cache_home() -> Path:
    """Where what can be made again is kept for this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tessera"


def sync(*paths: Path) -> None:
    """Files and directories put through to the disk; a rename holds once its directory is."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def fingerprint(value: Any) -> str:
    """SHA-256 of a value's canonical JSON: key order and spacing do not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_identity(path: Path) -> tuple[int, str]:
    """Size and hash of the first and last MiB: hundreds of GB take milliseconds."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(MEBIBYTE))
        if size > MEBIBYTE:
            file.seek(max(MEBIBYTE, size - MEBIBYTE))
            digest.update(file.read(MEBIBYTE))
    return size, digest.hexdigest()


class Lock:
    """One process's hold on a directory, by a flock on its `.lock`; a context manager.

    Raises RunError naming the process that holds the directory already.
    """

    def __init__(self, directory: Path) -> None:
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            self._descriptor = open_plain(directory / ".lock", os.O_RDWR | os.O_CREAT)
        if not _locked(self._descriptor, fcntl.LOCK_EX):
            holder = os.read(self._descriptor, 32).decode(errors="replace") or "another"
            os.close(self._descriptor)
            raise RunError(
                f"{directory} is in use by process {holder}; wait until it ends, or stop it"
            )
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    def release(self) -> None:
        """Lets the next process in; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def in_use(directory: Path) -> bool:
    """True where a process holds a directory. Needs no right to write there."""
    try:
        descriptor = open_plain(directory / ".lock", os.O_RDONLY)
    except (FileNotFoundError, RunError):
        return False
    try:
        return not _locked(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _locked(descriptor: int, kind: int) -> bool:
    """Takes a flock where it is free; waits for `in_use`, which holds one for a moment."""
    for pause in (0.01, 0.1, 0.0):
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(pause)
    return False


def remove_directories(*directories: Path) -> None:
    """Deletes directories. Raises RunError, with none deleted, where a process holds one."""
    with ExitStack() as held:
        for directory in directories:
            held.enter_context(Lock(directory))
        for directory in directories:
            trash = directory.with_name(f".{directory.name}.deleted-{os.getpid()}")
            with writing(directory):
                os.replace(directory, trash)
                shutil.rmtree(trash)


class Journal:
    """Rows by key, one JSON line each; a context manager. A key's later row replaces the earlier.

    Opening cuts off half a line that a killed process left. Memory holds offsets, not rows. A line
    that is no row, or that `accepts` refuses, is passed over, and `skipped` counts them.
    writes: False for reading what another process has written, which may go on.
    """

    def __init__(
        self,
        path: Path,
        writes: bool = True,
        accepts: Callable[[dict[str, Any]], bool] = lambda row: True,
    ) -> None:
        self.path, self._writes, self._accepts = path, writes, accepts
        self._at: dict[str, int] = {}
        self.skipped = 0

    def __enter__(self) -> Self:
        with writing(self.path):
            if self._writes:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open_plain(self.path, os.O_RDWR | os.O_CREAT)
            self._reader = os.fdopen(open_plain(self.path, os.O_RDONLY), "rb")
        self._end = 0
        for line in self._reader:
            if not line.endswith(b"\n"):
                break
            if (key := self._key(line)) is None:
                self.skipped += 1
            else:
                self._at[key] = self._end
            self._end += len(line)
        if self._writes:
            os.ftruncate(self._file, self._end)
        return self

    def _key(self, line: bytes) -> str | None:
        try:
            row = parse(line, self.path)
        except RunError:
            return None
        known = isinstance(row, dict) and isinstance(row.get("key"), str) and self._accepts(row)
        return row["key"] if known else None

    def __exit__(self, *_: Any) -> None:
        self._reader.close()
        if self._writes:
            os.fsync(self._file)
            os.close(self._file)

    def __contains__(self, key: str) -> bool:
        return key in self._at

    def __len__(self) -> int:
        return len(self._at)

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keeps a row; raises WriteError where the disk is full."""
        line = json.dumps({"key": key, **row}).encode() + b"\n"
        with writing(self.path):
            written = 0
            while written < len(line):
                written += os.pwrite(self._file, line[written:], self._end + written)
        self._at[key] = self._end
        self._end += len(line)

    def get(self, key: str) -> dict[str, Any]:
        """The row of a key, its key among the fields."""
        self._reader.seek(self._at[key])
        return json.loads(self._reader.readline())


class SharedJournal:
    """A journal that all processes of a job write, each into a file of its own; they open it, and
    call `collect`, together.

    A process sees what was there when it was opened, also of a stopped job of other processes, and
    what it adds itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._all = Journal(path, writes=dist.is_main())
        self._own = self._all if dist.is_main() else Journal(self._part(dist.rank()))

    def __enter__(self) -> Self:
        if dist.is_main():
            self._all.__enter__()
            self._take()
        dist.barrier()
        if not dist.is_main():
            self._all.__enter__()
            self._own.__enter__()
        dist.barrier()  # before the main process adds to what the others read
        return self

    def __exit__(self, *_: Any) -> None:
        self._own.__exit__()
        if self._own is not self._all:
            self._all.__exit__()

    def collect(self) -> None:
        """Gives the main process the rows of all."""
        dist.barrier()
        if dist.is_main():
            self._take()

    def _part(self, rank: int | str) -> Path:
        return self.path.with_name(f".{self.path.stem}-{rank}.jsonl")

    def _take(self) -> None:
        for path in sorted(self.path.parent.glob(self._part("*").name)):
            with Journal(path, writes=False) as part:
                for key in part:
                    if key not in self._all:  # processes of a tensor group add the same rows
                        row = part.get(key)
                        self._all.add(row.pop("key"), row)
            path.unlink()

    def __contains__(self, key: str) -> bool:
        return key in self._own or key in self._all

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        if self._own is not self._all:
            yield from self._all

    def add(self, key: str, row: dict[str, Any]) -> None:
        self._own.add(key, row)

    def get(self, key: str) -> dict[str, Any]:
        return (self._own if key in self._own else self._all).get(key)


AnyJournal = Journal | SharedJournal


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """An empty sibling directory that takes the place of `directory` when the block succeeds.

    Raises WriteError. Whatever the block raises, what stood there is intact.
    """
    directory = directory.resolve()
    temporary, old = (directory.with_name(f".{directory.name}.{end}") for end in ("tmp", "old"))
    with writing(directory):
        if old.exists() and not directory.exists():  # killed between the two renames below
            os.replace(old, directory)
        for left_over in (temporary, old):
            shutil.rmtree(left_over, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            sync(*temporary.rglob("*"), temporary)
            if directory.exists():
                os.replace(directory, old)
            os.replace(temporary, directory)
            sync(directory.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
