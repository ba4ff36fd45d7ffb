"""`run`: one program in the jail, its output, and how it ended.

The jail (`inside.py`) has an empty network, a private /tmp that is gone afterwards, the
interpreter and the system's libraries read-only and nothing else of the file system, no other
process in sight, no rights, a filter on system calls (`seccomp.py`), and limits on time, memory,
processes, files and output. Needs Linux 5.14 and user namespaces for everybody, or root.

Before the first program, `require_isolation` tries to break out and refuses to go on where a way
works. What the jail does not stop is an error in the kernel itself.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field

from tessera.rl.jail import probes
from tessera.rl.jail.seccomp import pivot_root_number, program
from tessera.runs.recipe import Config

MEBIBYTE = 1 << 20
INSIDE = Path(__file__).with_name("inside.py")
GRACE_SECONDS = 5.0  # for the jail to be built and to report, beyond the program's own time
SYSTEM = ("/bin", "/lib", "/lib32", "/lib64", "/usr", "/etc/ld.so.cache", "/etc/alternatives")
ENVIRONMENT = {
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PATH": "/usr/bin:/bin",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",  # the same program ends the same way twice
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
Reason = Literal["exited", "time", "asleep", "cpu", "memory", "processes", "output"]


# How code is judged; the second is a sentence so that nobody sets it by accident.
Isolation = Literal["namespaces", "none, run generated code with my own rights"]


class JailError(ValueError):
    """This machine gives no isolation, or the jail could not be built; the text says why."""


class Limits(Config):
    """What a jailed program may use before it is killed.

    seconds: wall time. cpu_seconds: CPU time of each process, rounded up to whole seconds; by
    default as much as the wall time and one second more. asleep_seconds: wall time in which none of
    its threads computes or could; by default all of it. Without isolation it is not counted.
    memory_mib: of all its processes together, and of address space for each of them.
    processes: at once, threads included. output_kib: of stdout and of stderr each.
    """

    seconds: float = Field(default=10.0, gt=0)
    cpu_seconds: float | None = Field(default=None, gt=0)
    asleep_seconds: float | None = Field(default=None, gt=0)
    memory_mib: int = Field(default=1024, ge=64)
    processes: int = Field(default=16, ge=1)
    output_kib: int = Field(default=1024, ge=1)
    tmp_mib: int = Field(default=64, ge=1)
    open_files: int = Field(default=64, ge=16)


@dataclass(frozen=True)
class Ended:
    """How a program ended: by itself with an exit code (-N by signal N), or over a limit."""

    reason: Reason
    code: int | None
    stdout: bytes
    stderr: bytes
    seconds: float

    @property
    def succeeded(self) -> bool:
        return self.reason == "exited" and self.code == 0


def run(
    argv: Sequence[str],
    *,
    stdin: bytes = b"",
    limits: Limits | None = None,
    visible: Sequence[str] = (),
    isolation: Isolation = "namespaces",
) -> Ended:
    """Runs a program in the jail; nothing that it started is left when this returns.

    argv: the program's absolute path first. visible: absolute paths that the program may read
    besides the interpreter and the system's. isolation: without namespaces the program has the
    user's own rights, and only the limits on time, output and each process's memory remain.
    Raises JailError if this machine has none.
    """
    isolated = isolation == "namespaces"
    if isolated:
        require_isolation()
    return _run(argv, stdin, limits or Limits(), visible, isolated=isolated)


def python() -> str:
    """The path of this interpreter, with its installed packages, as the jail shows it."""
    prefix = os.path.realpath(sys.prefix)
    return str(Path(prefix, "bin", "python3"))


@functools.cache
def require_isolation() -> None:
    """Builds a jail and tries to break out of it, once a process. Raises JailError."""
    if not sys.platform.startswith("linux"):
        raise JailError(
            _refusal(f"the jail is made of Linux's namespaces, and this is {sys.platform}")
        )
    with probes.canary() as canary:
        ended = _run(
            [python(), "-I", "-S", "-c", probes.script(canary)],
            b"",
            Limits(seconds=10, memory_mib=256, processes=probes.PROCESSES),
            (),
        )
    try:
        lines = ended.stdout.splitlines()
        escaped: list[str] = json.loads(lines[0 if ended.reason == "processes" else 1])
    except (ValueError, IndexError):
        error = ended.stderr.decode(errors="replace").strip()[-500:]
        raise JailError(_refusal(f"its self-test ended by {ended.reason}: {error}")) from None
    if escaped:
        raise JailError(_refusal(f"a jailed program could {'; '.join(escaped)}"))


def _refusal(why: str) -> str:
    return (
        f"generated code is not run on this machine: {why}. Allow user namespaces (sysctl "
        "kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0; "
        "in a container, --security-opt seccomp=unconfined), or judge code on another machine"
    )


def _run(
    argv: Sequence[str],
    stdin: bytes,
    limits: Limits,
    visible: Sequence[str],
    *,
    isolated: bool = True,
) -> Ended:
    begun = time.monotonic()
    reader, writer = os.pipe()
    try:
        setup = _setup(argv, limits, writer) | {"isolated": isolated}
        setup |= _walls(visible) if isolated else {}
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(INSIDE), json.dumps(setup)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[writer],
            start_new_session=True,
            env={},
        )
    except OSError as error:
        os.close(reader)
        raise JailError(_refusal(str(error))) from None
    finally:
        os.close(writer)
    try:
        with process:
            over, outputs = _talk(process, stdin, limits, 0 if not isolated else GRACE_SECONDS)
            _end(process, 0 if over else GRACE_SECONDS)
        report = _report(reader)
    finally:
        os.close(reader)
    seconds = time.monotonic() - begun
    if over or not report:
        return Ended(over or "time", None, *outputs, seconds)
    if report["reason"] == "setup":
        raise JailError(_refusal(f"the jail could not be built: {report['error']}"))
    return Ended(cast(Reason, report["reason"]), report.get("code"), *outputs, seconds)


def _setup(argv: Sequence[str], limits: Limits, status: int) -> dict[str, Any]:
    return {
        "argv": list(argv),
        "environment": ENVIRONMENT,
        "parent": os.getpid(),
        "status": status,
        "seconds": limits.seconds,
        "cpu_seconds": math.ceil(limits.cpu_seconds or int(limits.seconds) + 1),
        "asleep_seconds": limits.asleep_seconds or limits.seconds,
        "memory_bytes": limits.memory_mib * MEBIBYTE,
        "tmp_bytes": limits.tmp_mib * MEBIBYTE,
        "processes": limits.processes,
        "open_files": limits.open_files,
    }


def _walls(visible: Sequence[str]) -> dict[str, Any]:
    try:
        code = program()
    except OSError as error:
        raise JailError(_refusal(str(error))) from None
    return {
        "visible": _visible(visible),
        "filter": code.hex(),
        "pivot_root": pivot_root_number(),
    }


def _visible(extra: Sequence[str]) -> list[str]:
    """The paths that exist, without those that lie within another; parents before children."""
    own = [os.path.realpath(path) for path in (sys.prefix, sys.base_prefix)]
    paths = sorted({path for path in (*SYSTEM, *own, *extra) if os.path.lexists(path)})
    roots = [path for path in paths if not os.path.islink(path)]
    return [
        path
        for path in paths
        if not any(path != root and Path(path).is_relative_to(root) for root in roots)
    ]


def _talk(
    process: subprocess.Popen[bytes], stdin: bytes, limits: Limits, grace: float
) -> tuple[Reason | None, tuple[bytes, bytes]]:
    """The limit that was broken, if any, and both outputs as far as they were read."""
    assert process.stdin and process.stdout and process.stderr
    deadline = time.monotonic() + limits.seconds + grace
    room = limits.output_kib * 1024
    outputs = {process.stdout: bytearray(), process.stderr: bytearray()}
    left = memoryview(stdin)
    with selectors.DefaultSelector() as selector:
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        for stream in outputs:
            selector.register(stream, selectors.EVENT_READ)
        over: Reason | None = None
        while selector.get_map() and not over:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            over = None if ready else "time"
            for key, _ in ready:
                stream = cast(Any, key.fileobj)
                if stream is process.stdin:
                    left = _feed(stream, left)
                    if not left:
                        selector.unregister(stream)
                        stream.close()
                    continue
                chunk = os.read(stream.fileno(), 1 << 16)
                if not chunk:
                    selector.unregister(stream)
                outputs[stream] += chunk
                over = "output" if len(outputs[stream]) > room else over
    return over, (bytes(outputs[process.stdout][:room]), bytes(outputs[process.stderr][:room]))


def _feed(stream: Any, left: memoryview) -> memoryview:
    try:
        return left[os.write(stream.fileno(), left) :] if left else left
    except BrokenPipeError:
        return memoryview(b"")


def _end(process: subprocess.Popen[bytes], patience: float) -> None:
    """Ends the jail. Its processes die with it: the kernel kills what lives in its namespace."""
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        pass
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _report(reader: int) -> dict[str, Any]:
    """The report of process 1 on the program's end; empty if it was killed."""
    os.set_blocking(reader, False)
    try:
        text = os.read(reader, 1 << 16)
    except BlockingIOError:
        return {}
    return json.loads(text) if text else {}
