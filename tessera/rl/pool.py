"""Processes that judge, each killed and replaced when it is late or dies: nothing can hang the run.

A checker runs on what a model wrote, and a model writes `9^{9^{9^9}}`. Deadlines within a process
rest on signals, which threads and C code do not obey; a process can always be killed. The sample it
held is could-not-judge, the others go on, and results come in the order of the tasks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Self

from pydantic import TypeAdapter

from tessera.rl.rewards import CheckedReward, RewardError, Sample
from tessera.rl.verifiers.outcome import Outcome, unjudged

START_SECONDS = 120.0  # for a worker to import its libraries, on a busy machine
STARTS_FAILED = 3  # in a row, and the pool gives up
WORKER_BYTES = (
    4 << 30
)  # of address space: a checker's memory bomb is a MemoryError, could-not-judge


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    pipe: Connection
    deadline: float
    ready: bool = False
    task: int | None = None
    limit: float = field(default=START_SECONDS)


class Pool:
    """Workers that check samples by some rewards.

    with Pool(rewards, workers=8) as pool:
        outcomes = pool.check([(0, sample), (1, sample)])

    The workers start at the first call, live between calls, and end with their maker.
    """

    def __init__(self, rewards: Sequence[CheckedReward], workers: int) -> None:
        self.rewards, self.size = list(rewards), workers
        self.replaced = 0
        self._workers: list[_Worker] = []
        self._failed = 0
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends all workers at once; a call of `check` in another thread ends with RewardError."""
        self._closed = True
        self._end_workers()

    def _end_workers(self) -> None:
        for worker in list(self._workers):
            self._kill(worker)

    def check(self, tasks: Sequence[tuple[int, Sample]]) -> list[Outcome]:
        """The outcome of each task (index of a reward, sample), in the order of the tasks.

        Raises RewardError where workers cannot be started, and after `close`.
        """
        results: list[Outcome | None] = [None] * len(tasks)
        waiting = deque(range(len(tasks)))
        try:
            while waiting or self._busy():
                if self._closed:
                    break
                self._start(min(self.size, len(waiting) + self._busy()))
                self._hand_out(tasks, waiting)
                for worker in self._heard():
                    self._receive(worker, results)
                self._kill_late(results)
        except BaseException:
            self._end_workers()  # what they hold belongs to a call that is over
            raise
        if self._closed:
            self._end_workers()  # one that was started while the others were ended
            raise RewardError("the processes that judge were ended")
        return [outcome for outcome in results if outcome is not None]

    def _busy(self) -> int:
        return sum(worker.task is not None for worker in self._workers)

    def _start(self, wanted: int) -> None:
        while len(self._workers) < wanted:
            ours, theirs = Pipe()
            descriptor = theirs.fileno()
            arguments = [str(descriptor), str(os.getpid()), str(WORKER_BYTES)]
            process = subprocess.Popen(
                [sys.executable, "-m", "tessera.rl.worker", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[descriptor],
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            theirs.close()
            rewards = TypeAdapter(list[CheckedReward]).dump_json(self.rewards)
            worker = _Worker(process, ours, time.monotonic() + START_SECONDS)
            self._workers.append(worker)
            self._send(worker, rewards)

    def _hand_out(self, tasks: Sequence[tuple[int, Sample]], waiting: deque[int]) -> None:
        for worker in self._workers:
            if not waiting:
                return
            if worker.ready and worker.task is None:
                worker.task = waiting.popleft()
                part, sample = tasks[worker.task]
                worker.limit = self.rewards[part].deadline
                worker.deadline = time.monotonic() + worker.limit
                self._send(worker, json.dumps([part, asdict(sample)]).encode())

    def _send(self, worker: _Worker, message: bytes) -> None:
        try:
            worker.pipe.send_bytes(message)
        except OSError:
            pass  # it is dead, which the next look at its pipe finds

    def _heard(self) -> list[_Worker]:
        """Workers whose pipe has a message, or has closed, before the next deadline."""
        occupied = [w for w in self._workers if not w.ready or w.task is not None]
        patience = min((w.deadline for w in occupied), default=0.0) - time.monotonic()
        heard = wait([w.pipe for w in self._workers], max(0.0, patience))
        return [w for w in self._workers if w.pipe in heard]

    def _receive(self, worker: _Worker, results: list[Outcome | None]) -> None:
        try:
            message = json.loads(worker.pipe.recv_bytes())
        except (EOFError, OSError):
            self._lose(worker, results, f"its checker died ({_end(worker.process)})")
            return
        if not worker.ready:
            worker.ready, self._failed = True, 0
        elif worker.task is not None:
            results[worker.task] = Outcome(*message)
            worker.task = None

    def _kill_late(self, results: list[Outcome | None]) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            if (worker.task is not None or not worker.ready) and now > worker.deadline:
                why = f"its checker took over {worker.limit:g} s and was killed"
                self._lose(worker, results, why)

    def _lose(self, worker: _Worker, results: list[Outcome | None], why: str) -> None:
        """Takes a worker out; the sample that it held is could-not-judge."""
        self._kill(worker)
        if worker.task is not None:
            results[worker.task] = unjudged(why)
        self.replaced += 1
        self._failed += not worker.ready
        if self._failed >= STARTS_FAILED:
            raise RewardError(f"the processes that judge cannot start: {why}; see stderr above")

    def _kill(self, worker: _Worker) -> None:
        """Ends a worker and what it started: its group, and its jail by the worker's own death."""
        try:
            os.killpg(worker.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        worker.process.wait()
        worker.pipe.close()
        if worker in self._workers:  # else `close` was there first
            self._workers.remove(worker)


def _end(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(1.0)
    except subprocess.TimeoutExpired:
        return "it closed its pipe"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
