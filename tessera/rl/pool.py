"""Processes that judge samples. One that is late or dies is killed and replaced; nothing can hang.

Deadlines within a process rely on signals, which threads and C code do not obey; a process can
always be killed. Its sample is could-not-judge, the others go on. Messages are JSON, so nothing
that a checker made is unpickled. pebble's pool (5.x) leaves alive what a killed checker started.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Self

from pydantic import TypeAdapter

from tessera.rl.rewards import CheckedReward, RewardError, Sample, check, prepare
from tessera.rl.verifiers.outcome import Outcome, unjudged

START_SECONDS = 120.0  # for a worker to import its libraries, on a busy machine
MAX_FAILED_STARTS = 3  # in a row, then `check` raises
WORKER_BYTES = 4 << 30  # of address space: beyond it a checker gets a MemoryError
PR_SET_PDEATHSIG = 1
REWARDS = TypeAdapter(list[CheckedReward])


class Pool:
    """Workers that check samples by some rewards; a context manager.

    They start at the first call, live between calls, and end with the thread that started them.
    `replaced` counts those that were killed or died.
    """

    def __init__(self, rewards: Sequence[CheckedReward], workers: int) -> None:
        self.rewards, self.size = list(rewards), workers
        self.replaced = 0
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends all workers at once; a call of `check` in another thread ends with RewardError."""
        self._closed = True
        self._end(*self._workers)

    def _end(self, *workers: _Worker) -> None:
        for worker in workers:
            worker.kill()
            if worker in self._workers:  # else `close` was there first
                self._workers.remove(worker)

    def check(self, tasks: Sequence[tuple[int, Sample]]) -> list[Outcome]:
        """The outcome of each task (index of a reward, sample), in the order of the tasks.

        Raises RewardError where workers cannot be started, and after `close`.
        """
        results: list[Outcome | None] = [None] * len(tasks)
        waiting = deque(range(len(tasks)))
        try:
            while (waiting or self._busy()) and not self._closed:
                while len(self._workers) < min(self.size, len(waiting) + self._busy()):
                    self._workers.append(_Worker(REWARDS.dump_json(self.rewards)))
                for worker in self._workers:
                    if waiting and worker.ready and worker.task is None:
                        worker.task = waiting.popleft()
                        part, sample = tasks[worker.task]
                        message = json.dumps([part, asdict(sample)]).encode()
                        worker.send(message, self.rewards[part].deadline)
                deadlines = [one.deadline for one in self._workers if one.occupied]
                patience = min(deadlines, default=0.0) - time.monotonic()
                pipes = wait([worker.pipe for worker in self._workers], max(0.0, patience))
                for worker in [one for one in self._workers if one.pipe in pipes]:
                    self._receive(worker, results)
                now = time.monotonic()
                for worker in [w for w in self._workers if w.occupied and now > w.deadline]:
                    why = f"its checker took over {worker.limit:g} s and was killed"
                    self._replace(worker, results, why)
        except BaseException:
            self._end(*self._workers)  # their tasks belong to a call that is over
            raise
        if self._closed:
            self._end(*self._workers)  # one may have been started while the others were ended
            raise RewardError("the processes that judge were ended")
        return [outcome for outcome in results if outcome is not None]

    def _busy(self) -> int:
        return sum(worker.task is not None for worker in self._workers)

    def _receive(self, worker: _Worker, results: list[Outcome | None]) -> None:
        try:
            message = json.loads(worker.pipe.recv_bytes())
        except (EOFError, OSError):
            self._replace(worker, results, f"its checker died ({worker.end()})")
            return
        if not worker.ready:
            worker.ready, self._failed_starts = True, 0
        elif worker.task is not None:
            results[worker.task] = Outcome(*message)
            worker.task = None

    def _replace(self, worker: _Worker, results: list[Outcome | None], why: str) -> None:
        self._end(worker)
        if worker.task is not None:
            results[worker.task] = unjudged(why)
        self.replaced += 1
        self._failed_starts += not worker.ready
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise RewardError(f"the processes that judge cannot start: {why}; see stderr above")


class _Worker:
    """A process that runs `serve`, and the number of the task that it has."""

    def __init__(self, rewards: bytes) -> None:
        self.task: int | None = None
        self.ready = False
        self.pipe, theirs = Pipe()
        numbers = [theirs.fileno(), os.getpid(), WORKER_BYTES]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tessera.rl.pool", *map(str, numbers)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        theirs.close()
        self.send(rewards, START_SECONDS)

    @property
    def occupied(self) -> bool:
        return self.task is not None or not self.ready

    def send(self, message: bytes, limit: float) -> None:
        self.limit, self.deadline = limit, time.monotonic() + limit
        with contextlib.suppress(OSError):  # a dead one is found by the next look at its pipe
            self.pipe.send_bytes(message)

    def kill(self) -> None:
        """Kills the process and its group; a jail dies with the process that made it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.pipe.close()

    def end(self) -> str:
        """How a process that closed its pipe ended."""
        try:
            code = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def serve(descriptor: int, parent: int, memory_bytes: int) -> None:
    """Judges, sample by sample, until the pipe closes. Dies with its parent, at any instant."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY or memory_bytes < most:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, most))
    pipe = Connection(descriptor)
    rewards = REWARDS.validate_json(pipe.recv_bytes())
    prepare(rewards)
    pipe.send_bytes(b"{}")
    while True:
        try:
            part, sample = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        outcome = check(rewards[part], Sample(**sample))
        pipe.send_bytes(json.dumps([outcome.verdict, outcome.score, outcome.reason]).encode())


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
