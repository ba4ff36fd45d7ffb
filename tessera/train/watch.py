"""Says what each process is doing when nothing has moved for a while.

quiet for 2:11: rank 3 at 'step 12: reading data' for 2:14, in read (tessera.data.store:88);
ranks 0-2 at 'step 12: summing weights' for 2:11, in all_reduce (tessera.dist:118)
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from tessera import dist
from tessera.runs.files import WriteError, atomic_write
from tessera.runs.run import Run
from tessera.table import clock, spans


class Sign(NamedTuple):
    """What a process is at, since when (seconds of the epoch), and in which call."""

    what: str
    since: float
    call: str


class Watch:
    """Reports silence through `run.say`; a context manager that every process of a job holds.

    A thread looks every few seconds. A process that has been at one thing for half of `quiet`
    seconds leaves a file in the run's state, for the main process to read: no collectives, because
    those are what hangs. The next line comes when twice as many seconds have passed.
    """

    def __init__(self, run: Run, quiet: float) -> None:
        self.run, self.quiet = run, quiet
        self._folder = run.state_path / "watch"
        self._mine = self._folder / f"rank-{dist.rank()}.json"
        self._now = ("starting", time.time())
        self._reported = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="tessera-watch", daemon=True)

    def __enter__(self) -> Self:
        self._watched = threading.get_ident()
        self._mine.unlink(missing_ok=True)  # of a process that was killed
        self.at("starting")
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()
        self._mine.unlink(missing_ok=True)

    def at(self, what: str) -> None:
        """From now on this process is at `what`."""
        self._now = (what, time.time())

    def _look(self) -> None:
        while not self._over.wait(min(5.0, self.quiet / 8)):
            what, since = self._now
            silent = time.time() - since
            with contextlib.suppress(OSError, WriteError):  # a full disk is the training's to tell
                if silent < self.quiet / 2:
                    self._reported = 0.0
                    self._mine.unlink(missing_ok=True)
                else:
                    self._report(Sign(what, since, call_of(self._watched)), silent)

    def _report(self, sign: Sign, silent: float) -> None:
        if dist.world() > 1:
            self._folder.mkdir(parents=True, exist_ok=True)
            atomic_write(self._mine, json.dumps(sign))
        if dist.is_main() and silent >= max(self.quiet, 2 * self._reported):
            self._reported = silent
            others = {rank: self._read(rank) for rank in range(1, dist.world())}
            self.run.say(describe({0: sign, **others}, time.time()))

    def _read(self, rank: int) -> Sign | None:
        try:
            return Sign(*json.loads((self._folder / f"rank-{rank}.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None


def call_of(thread: int) -> str:
    """The innermost call of a thread, with the line of tessera's that led to it."""
    frame = innermost = sys._current_frames().get(thread)
    while frame and not frame.f_globals.get("__name__", "").startswith("tessera."):
        frame = frame.f_back
    frame = frame or innermost
    if frame is None or innermost is None:
        return "nothing: its thread has ended"
    module = frame.f_globals.get("__name__", frame.f_code.co_filename)
    return f"{innermost.f_code.co_name} ({module}:{frame.f_lineno})"


def describe(signs: Mapping[int, Sign | None], now: float) -> str:
    """One line: who has been at what for how long, those in the same call together.

    signs: by rank; None where a process has left none: it has moved lately, or is gone.
    """
    groups: dict[tuple[str, str] | None, list[int]] = {}
    starts: dict[tuple[str, str] | None, float] = {}
    for rank, sign in signs.items():
        group = sign and (sign.what, sign.call)
        groups.setdefault(group, []).append(rank)
        since = sign.since if sign else float("inf")
        starts[group] = min(since, starts.get(group, since))
    parts = []
    for group in sorted(groups, key=lambda group: starts[group]):
        who = f"{spans(groups[group], 'rank')} " if len(signs) > 1 else ""
        state = "not heard of: moving, or gone"
        if group is not None:
            state = f"at {group[0]!r} for {clock(now - starts[group])}, in {group[1]}"
        parts.append(f"{who}{state}")
    silent = now - max(sign.since for sign in signs.values() if sign)
    return f"quiet for {clock(silent)}: {'; '.join(parts)}"
