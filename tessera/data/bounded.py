"""A function in a process of its own, with limits on its time and its memory.

Chat templates and requests are written by others, and what they cost is only known by trying: a
process can be killed, and its memory is not ours.
"""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

START_SECONDS = 120.0
INSIDE = "TESSERA_BOUNDED"  # set in the environment of such a process


class LimitError(ValueError):
    """A call that took more time or memory than it may."""


class Bounded:
    """Calls of the object that `maker` ("module:name") makes of `settings` in the process.

    The process starts with the first call, and again after one that was killed. One call at a time.
    seconds: of a call. mib: of memory beyond what the process takes before its first call.
    """

    def __init__(self, maker: str, settings: tuple[Any, ...], seconds: float, mib: int) -> None:
        self.maker, self.settings, self.seconds, self.mib = maker, settings, seconds, mib
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        atexit.register(self.close)

    def __call__(self, *given: Any) -> Any:
        """The result, or what the call raised. Raises LimitError."""
        with self._lock:
            pipe = self._started()
            try:
                pipe.send_bytes(pickle.dumps(given))
                if not pipe.poll(self.seconds):
                    self._kill()
                    raise LimitError(f"it took over {self.seconds:g} s")
                result, error = pickle.loads(pipe.recv_bytes())
            except (EOFError, OSError):
                self._kill()
                raise LimitError(f"its process died; it may use {self.mib} MiB") from None
        if error is not None:
            raise error
        return result

    def start(self) -> None:
        """Start the process now, so that the first call does not wait for it."""
        with self._lock:
            self._started()

    def close(self) -> None:
        """End the process, and a call in it."""
        if (process := self._process) is not None:
            process.kill()
            process.wait()

    def _started(self) -> Connection:
        if self._pipe is not None:
            return self._pipe
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-m", "tessera.data.bounded", str(theirs.fileno())]
        self._process = subprocess.Popen(
            [*command, self.maker, str(self.mib)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # a signal of the terminal is the caller's
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), INSIDE: "1"},
        )
        theirs.close()
        try:
            self._pipe.send_bytes(pickle.dumps(self.settings))
            if not self._pipe.poll(START_SECONDS):
                raise EOFError
            self._pipe.recv_bytes()
        except (EOFError, OSError):
            self._kill()
            raise RuntimeError(
                f"the process of {self.maker} did not start; see the error above"
            ) from None
        return self._pipe

    def _kill(self) -> None:
        if self._process is not None and self._pipe is not None:
            self._process.kill()
            self._process.wait()
            self._pipe.close()
        self._process = self._pipe = None


def serve(pipe: Connection, maker: str, mib: int) -> None:
    """Answer calls until the other end is closed."""
    module, _, name = maker.partition(":")
    call = getattr(importlib.import_module(module), name)(*pickle.loads(pipe.recv_bytes()))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    pipe.send_bytes(b"ready")
    while True:
        try:
            given = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        pipe.send_bytes(_answer(call, given, mib))
        del given


def _answer(call: Callable[..., Any], given: tuple[Any, ...], mib: int) -> bytes:
    try:
        return pickle.dumps((call(*given), None))
    except MemoryError:
        error: Exception = LimitError(f"it took over {mib} MiB of memory")
    except RecursionError:
        error = LimitError("it calls itself too often")
    except Exception as raised:  # noqa: BLE001 - the caller's
        error = raised.with_traceback(None)
    try:
        return pickle.dumps((None, error))
    except Exception:  # noqa: BLE001 - an error that holds what cannot be sent
        return pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with its pipe
    # By its import name: its errors are those that the caller knows.
    importlib.import_module("tessera.data.bounded").serve(
        Connection(int(sys.argv[1])), sys.argv[2], int(sys.argv[3])
    )
