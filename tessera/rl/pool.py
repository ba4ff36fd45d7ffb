"""What completions are worth: the weighted sum of rewards, or None where one could not judge.

Checkers run in processes: one that is late or dies is killed and replaced, and its sample is
could-not-judge. Deadlines within a process rely on signals, which threads and C code do not obey.
Messages are JSON, so nothing that a checker made is unpickled. pebble's pool (5.x) leaves alive
what a killed checker started. Judges and reward models are asked over HTTP.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Self

from pydantic import TypeAdapter

from tessera.ask import judge
from tessera.ask.ask import Reply, Request
from tessera.ask.endpoint import Endpoint
from tessera.rl.rewards import (
    AskedReward,
    CheckedReward,
    CodeReward,
    JudgeReward,
    Reward,
    RewardError,
    Sample,
    check,
    names,
    prepare,
)
from tessera.rl.verifiers.outcome import Outcome, judged, unjudged, wrong

START_SECONDS = 120.0  # for a worker to import its libraries, on a busy machine
MAX_FAILED_STARTS = 3  # in a row, then `check` raises
WORKER_BYTES = 4 << 30  # of address space: beyond it a checker gets a MemoryError
PR_SET_PDEATHSIG = 1
REWARDS = TypeAdapter(list[CheckedReward])
_REWARD = re.compile(r"reward[\s:=*]{0,3}(-?\d+(?:\.\d+)?)", re.IGNORECASE)


class Pool:
    """Workers that check samples by some rewards; a context manager.

    They start at the first call, live between calls, and end with the thread that started them.
    """

    def __init__(self, rewards: Sequence[CheckedReward], workers: int) -> None:
        self.rewards, self.size = list(rewards), workers
        self.replaced = 0  # workers that were killed or died
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
        """The outcome of each task (index of a reward, sample), in order. Raises RewardError.

        A program that could not be judged is judged again, alone, for others may have slowed it.
        """
        outcomes = self._check(tasks, self.size)
        for index, (part, _) in enumerate(tasks):
            if outcomes[index].score is None and isinstance(self.rewards[part], CodeReward):
                outcomes[index : index + 1] = self._check([tasks[index]], 1)
        return outcomes

    def _check(self, tasks: Sequence[tuple[int, Sample]], size: int) -> list[Outcome]:
        results: list[Outcome | None] = [None] * len(tasks)
        waiting = deque(range(len(tasks)))
        try:
            while (waiting or self._busy()) and not self._closed:
                while len(self._workers) < min(size, len(waiting) + self._busy()):
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


class Asked:
    """A reward that a server gives: samples in, outcomes out."""

    def __init__(self, reward: AskedReward) -> None:
        self.reward = reward
        self.endpoint = Endpoint(reward.endpoint, seed=0, deadline=reward.deadline)

    def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        """The outcome of each sample, all asked at once."""
        answered = [sample for sample in samples if sample.answer]
        found = judge.replies(self.endpoint, [self._request(sample) for sample in answered])
        outcomes = map(self._outcome, found)
        return [next(outcomes) if sample.answer else wrong("no answer") for sample in samples]

    def _request(self, sample: Sample) -> Request:
        if not isinstance(self.reward, JudgeReward):
            asked = [dict(message) for message in sample.messages]
            return judge.request("", [*asked, {"role": "assistant", "content": sample.answer}], 64)
        question = next(m["content"] for m in reversed(sample.messages) if m["role"] == "user")
        expected = str(sample.fields[self.reward.answer])
        text = judge.same_answer(question, expected, sample.answer, self.reward.template)
        return judge.request("", text, self.reward.max_tokens)

    def _outcome(self, reply: Reply) -> Outcome:
        if reply.error:
            return unjudged(reply.error)
        if isinstance(self.reward, JudgeReward):
            verdict = judge.verdict(reply.answer)
            if verdict is None:
                return unjudged(f"no verdict in the judge's reply: {reply.answer[-80:]!r}")
            return judged(verdict, "the judge says so")
        scores = _REWARD.findall(reply.answer)
        if not scores:
            return unjudged(f"no reward in the model's reply: {reply.answer[-80:]!r}")
        score = float(scores[-1])
        return Outcome("right" if score >= self.reward.right_from else "wrong", score)


@dataclass(frozen=True, slots=True)
class Judged:
    """A sample's reward (None: could not be judged), and the outcome of each part by name."""

    reward: float | None
    parts: dict[str, Outcome]


class Rubric:
    """Some rewards and the processes that compute them; a context manager."""

    def __init__(self, rewards: Sequence[Reward], workers: int) -> None:
        self.rewards, self.names = list(rewards), names(rewards)
        self._pool = Pool([one for one in self.rewards if isinstance(one, CheckedReward)], workers)
        self._asked = [Asked(one) if isinstance(one, AskedReward) else None for one in self.rewards]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.close()

    def __call__(self, samples: Sequence[Sample]) -> list[Judged]:
        """What each sample is worth. Raises RewardError where nothing can be judged at all."""
        parts = range(len(self._pool.rewards))
        checked = iter(self._pool.check([(part, sample) for part in parts for sample in samples]))
        columns = [
            list(islice(checked, len(samples))) if one is None else one(samples)
            for one in self._asked
        ]
        return [self._sum([column[i] for column in columns]) for i in range(len(samples))]

    def _sum(self, outcomes: Sequence[Outcome]) -> Judged:
        total = 0.0
        parts = dict(zip(self.names, outcomes, strict=True))
        for reward, outcome in zip(self.rewards, outcomes, strict=True):
            if outcome.score is None:
                return Judged(None, parts)
            total += reward.weight * outcome.score
        return Judged(total if parts else None, parts)


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
