"""What each process is doing, told when nothing has moved for a while.

    with Watch(run, quiet=120) as watch:
        watch.at("step 12: reading data")

    quiet for 2:11: rank 3 at 'step 12: reading data' for 2:14, in read (tessera.data.store:88);
    ranks 0-2 at 'step 12: summing weights' for 2:11, in all_reduce (tessera.dist:118)

`at` stores two values and costs nothing; which call a process is in is read off its stack, by a
thread that looks every few seconds. A process that has been at one thing for half the time leaves a
file in the run's state, and when the main one has been quiet for all of it, a line tells what
everybody is at. Files and no collectives: those are what hangs.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from tessera import dist
from tessera.runs.files import WriteError, atomic_write
from tessera.runs.run import Run
from tessera.table import clock


class Sign(NamedTuple):
    """What a process is at, since when (seconds of the epoch), and in which call."""

    what: str
    since: float
    call: str


class Watch:
    """Tells of silence through `run.say`; every process of a job holds one.

    quiet: seconds at one thing before a line; the next comes when twice as many have passed, so
    that a night's wait is a dozen lines.
    """

    def __init__(self, run: Run, quiet: float) -> None:
        self.run, self.quiet = run, quiet
        self.folder = run.state_path / "watch"
        self._now = ("starting", time.time())
        self._left: Sign | None = None
        self._told = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="tessera-watch", daemon=True)

    def __enter__(self) -> Self:
        self._watched = threading.get_ident()
        _file(self.folder, dist.rank()).unlink(missing_ok=True)  # of a process that was killed
        self.at("starting")
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()
        self._withdraw()

    def at(self, what: str) -> None:
        """From now on this process is at `what`."""
        self._now = (what, time.time())

    def _look(self) -> None:
        while not self._over.wait(min(5.0, self.quiet / 8)):
            what, since = self._now
            silent = time.time() - since
            try:
                if silent < self.quiet / 2:
                    self._told = 0.0
                    self._withdraw()
                else:
                    sign = Sign(what, since, call_of(self._watched))
                    self._leave(sign)
                    self._tell(sign, silent)
            except (OSError, WriteError):
                pass  # a full disk is the training's to report

    def _leave(self, sign: Sign) -> None:
        if dist.world() > 1 and sign != self._left:
            file = _file(self.folder, dist.rank())
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file, json.dumps(sign))
            self._left = sign

    def _withdraw(self) -> None:
        if self._left is not None:
            _file(self.folder, dist.rank()).unlink(missing_ok=True)
            self._left = None

    def _tell(self, sign: Sign, silent: float) -> None:
        due = max(self.quiet, 2 * self._told)
        if silent >= due and dist.is_main():
            self._told = silent
            others = {r: _read(_file(self.folder, r)) for r in range(1, dist.world())}
            self.run.say(told({0: sign, **others}, time.time()))


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


def told(known: Mapping[int, Sign | None], now: float) -> str:
    """One line: who has been at what for how long, those in the same call together.

    known: of each rank its sign, or None where it has left none: it has moved lately, or is gone.
    """
    groups: dict[tuple[str, str] | None, list[int]] = {}
    for rank, sign in known.items():
        groups.setdefault(sign and (sign.what, sign.call), []).append(rank)
    parts = []
    for ranks in sorted(groups.values(), key=lambda ranks: _since(known, ranks)):
        sign = known[ranks[0]]
        who = f"{_ranks(ranks)} " if len(known) > 1 else ""
        state = "not heard of: moving, or gone"
        if sign is not None:
            state = f"at {sign.what!r} for {clock(now - _since(known, ranks))}, in {sign.call}"
        parts.append(f"{who}{state}")
    silent = now - max(sign.since for sign in filter(None, known.values()))
    return f"quiet for {clock(silent)}: {'; '.join(parts)}"


def _since(known: Mapping[int, Sign | None], ranks: list[int]) -> float:
    """When the first of these began what they are at; the end of time where nobody knows."""
    return min((sign.since for r in ranks if (sign := known[r])), default=float("inf"))


def _ranks(ranks: list[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][-1] == rank - 1:
            spans[-1] = [spans[-1][0], rank]
        else:
            spans.append([rank])
    text = ", ".join(f"{s[0]}-{s[-1]}" if len(s) > 1 else str(s[0]) for s in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def _read(file: Path) -> Sign | None:
    try:
        return Sign(*json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None
