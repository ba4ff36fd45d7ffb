"""What each process is doing, told when nothing has moved for a while.

    with Watch(run, quiet=120) as watch:
        watch.at("step 12: reading data")

`at` stores two values and costs nothing. A thread looks every few seconds; a process that has been
at one thing for half the time leaves a file in the run's state, and when the main one has been
quiet for all of it, a line tells what everybody is at. Files and no collectives: those are what
hangs. A process that left none has moved lately, or is gone.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tessera import dist
from tessera.disk import WriteError, atomic_write
from tessera.progress import clock
from tessera.run import Run


class Watch:
    """Tells of silence through `run.say`; every process of a job holds one.

    quiet: seconds at one thing before a line; the next comes when twice as many have passed, so
    that a night's wait is a dozen lines.
    """

    def __init__(self, run: Run, quiet: float) -> None:
        self.run, self.quiet = run, quiet
        self.folder = run.state_path / "watch"
        self._now = ("starting", time.time())
        self._told = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="tessera-watch", daemon=True)

    def __enter__(self) -> Self:
        _file(self.folder, dist.rank()).unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()
        _file(self.folder, dist.rank()).unlink(missing_ok=True)

    def at(self, what: str) -> None:
        """From now on this process is at `what`."""
        self._now = (what, time.time())

    def _look(self) -> None:
        while not self._over.wait(min(5.0, self.quiet / 8)):
            what, since = self._now
            if time.time() - since < self.quiet / 2:
                self._told = 0.0
                _file(self.folder, dist.rank()).unlink(missing_ok=True)
                continue
            try:
                self._leave(what, since)
                self._tell(time.time() - since)
            except (OSError, WriteError):
                pass  # a full disk is the training's to report

    def _leave(self, what: str, since: float) -> None:
        file = _file(self.folder, dist.rank())
        if dist.world() > 1 and not (file.exists() and json.loads(file.read_text())[1] == since):
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file, json.dumps([what, since]))

    def _tell(self, silent: float) -> None:
        due = max(self.quiet, 2 * self._told)
        if silent >= due and dist.is_main():
            self._told = silent
            known = {r: _read(_file(self.folder, r)) for r in range(1, dist.world())}
            self.run.say(told({0: self._now, **known}, time.time()))


def told(known: Mapping[int, tuple[str, float] | None], now: float) -> str:
    """One line: who has been at what for how long, those at the same thing together.

    known: of each rank what it is at and since when, or None where it has left no word.
    """
    silent = now - max(since for _, since in filter(None, known.values()))
    parts = []
    for what in dict.fromkeys(found[0] if found else None for found in known.values()):
        ranks = [rank for rank, found in known.items() if (found[0] if found else None) == what]
        times = [now - found[1] for rank in ranks if (found := known[rank])]
        state = f"at {what!r} for {clock(max(times))}" if times else "not heard of: moving, or gone"
        parts.append(f"{_ranks(ranks)} {state}")
    who = parts[0].split(" ", 2)[2] if len(known) == 1 else "; ".join(parts)
    return f"quiet for {clock(silent)}: {who}"


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


def _read(file: Path) -> tuple[str, float] | None:
    try:
        what, since = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return what, since
