"""The budget of a thought: after so many tokens its end is forced, and the answer goes on.

An automaton over the tokens of one completion, waiting -> thinking -> closing -> answering. It
sees ids only; which ids open and close a thought is the caller's to say (`Thinking`).

What callers and the engine's thread share: submitted requests, and the queue they wait in.

    handle = engine.submit(prompt, params)        any thread
    for delta in handle: …                        or: async for delta in handle: …
    engine.step()                                 one thread

A completion is two lists that only the engine appends to. A reader remembers how far it has read,
so tokens cost nothing where nobody listens, and a slow reader gets several at once. No torch here.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from tessera.generate.engine import (
    ClosedError,
    Completion,
    FinishReason,
    GenerationError,
    QueueFullError,
    SamplingParams,
    Thinking,
)


class Stage(Enum):
    """Where a completion is: before the thought, in it, or behind it."""

    WAITING = 0
    THINKING = 1
    ANSWERING = 2


class Thought:
    """Follows one completion: `push` each token; `forced` is what the next must be, if anything."""

    def __init__(self, thinking: Thinking) -> None:
        self.thinking = thinking
        self.stage = Stage.WAITING if thinking.starts else Stage.THINKING
        self.tokens = 0  # of the thought so far
        self._tail: list[int] = []
        self._pending: list[int] = []
        self._memory = max(map(len, (*thinking.starts, *thinking.ends)))
        self._watch_budget()

    @property
    def forced(self) -> int | None:
        """The token that must come next; None where the model chooses."""
        return self._pending[-1] if self._pending else None

    def push(self, token: int) -> None:
        """The token that came."""
        if self.stage is Stage.ANSWERING:
            return
        self._tail = [*self._tail, token][-self._memory :]
        if self.stage is Stage.WAITING:
            if _ends_with(self._tail, self.thinking.starts):
                self.stage, self._tail = Stage.THINKING, []
                self._watch_budget()
            return
        self.tokens += 1
        if self._pending:
            self._pending.pop()
            if not self._pending:
                self.stage = Stage.ANSWERING
        elif _ends_with(self._tail, self.thinking.ends):
            self.stage = Stage.ANSWERING
        else:
            self._watch_budget()

    def _watch_budget(self) -> None:
        if self.stage is Stage.THINKING and self.tokens >= self.thinking.max_tokens:
            self._pending = self._remainder()[::-1]

    def _remainder(self) -> list[int]:
        """What closes the thought: of the end the model has begun, the rest; else a whole one."""
        begun = (
            (have, end)
            for end in self.thinking.ends
            for have in range(len(end) - 1, 0, -1)
            if self._tail[-have:] == list(end[:have])
        )
        have, end = max(begun, key=lambda pair: pair[0], default=(0, self.thinking.ends[0]))
        return list(end[have:])


def _ends_with(tail: list[int], sequences: tuple[tuple[int, ...], ...]) -> bool:
    return any(tuple(tail[-len(sequence) :]) == sequence for sequence in sequences)


Watch = Callable[[int], bool]
"""Told each token of a sample as it is chosen, by the engine's thread; True ends it there."""


class EngineError(RuntimeError):
    """A step failed while this request was in it; the cause says how."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What one sample gained since the last look; finish_reason comes with its last tokens."""

    sample: int
    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]]
    finish_reason: FinishReason | None


@dataclass(slots=True, eq=False)
class Sample:
    """One completion in the making, the engine's own.

    tokens: what must be read before the next token can be chosen; samples of one prompt hold
    the same list object, which is how the engine knows that they share it. limit: tokens of the
    whole completion. Once `done`, nothing of it changes.
    """

    handle: Handle
    index: int
    tokens: Sequence[int]
    params: SamplingParams
    key: int
    limit: int
    completion: Completion = field(default_factory=Completion)
    noise: list[float] = field(default_factory=list)
    thought: Thought | None = None
    watch: Watch | None = None
    cancelled: bool = False
    done: bool = False

    @property
    def longest(self) -> int:
        """Tokens that stand in the cache when the completion is as long as it may be."""
        return len(self.tokens) + self.limit - len(self.completion.token_ids)

    def overdue(self, now: float) -> FinishReason | None:
        """Why the sample must end now, whatever it was doing."""
        if self.cancelled:
            return "cancelled"
        return "timeout" if now >= self.handle.deadline else None

    def finish(self, reason: FinishReason) -> None:
        self.completion.finish_reason = reason
        self.done = True
        self.handle.ended()


def overdue(
    samples: Iterable[Sample], now: float
) -> tuple[list[Sample], list[tuple[Sample, FinishReason]]]:
    """Samples that may go on, and those that must end, with the reason."""
    left, ended = [], []
    for sample in samples:
        reason = sample.overdue(now)
        if reason is None:
            left.append(sample)
        else:
            ended.append((sample, reason))
    return left, ended


class Handle:
    """A submitted request. Iterating, with `for` or `async for`, gives a `Delta` at a time.

    As a context manager it cancels what is unfinished when the block is left.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        key: int = 0,
        room: int,
        timeout: float | None = None,
        watch: Callable[[], Watch] | None = None,
        on_finish: Callable[[], None] | None = None,
    ) -> None:
        self.prompt = list(prompt)
        self.deadline = math.inf if timeout is None else time.monotonic() + timeout
        self.error: BaseException | None = None
        self.cancelled: Callable[[], None] = lambda: None  # the queue's, once it waits there
        limit = min(params.max_tokens, room - len(prompt))
        self.samples = [
            Sample(
                self,
                index,
                self.prompt,
                params,
                key,
                limit,
                thought=None if params.thinking is None else Thought(params.thinking),
                watch=None if watch is None else watch(),
            )
            for index in range(params.n)
        ]
        self.wakers: list[Callable[[], None]] = []  # of who reads along; told of every token
        self._on_finish = on_finish
        self._unfinished = len(self.samples)
        self._finished = threading.Event()

    @property
    def done(self) -> bool:
        """Whether every sample has ended."""
        return self._finished.is_set()

    @property
    def completions(self) -> list[Completion]:
        """One a sample; they grow until `done`."""
        return [sample.completion for sample in self.samples]

    def cancel(self) -> None:
        """End every unfinished sample at the engine's next step, with what it has by then."""
        for sample in self.samples:
            sample.cancelled = True
        self.cancelled()

    def result(self, timeout: float | None = None) -> list[Completion]:
        """The completions, once all have ended.

        Raises TimeoutError after `timeout` seconds, and EngineError where a step failed.
        """
        if not self._finished.wait(timeout):
            raise TimeoutError(f"the request was not done after {timeout} s")
        self._check()
        return self.completions

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        if not self.done:
            self.cancel()

    def __iter__(self) -> Iterator[Delta]:
        news, reader = threading.Event(), _Reader(self.samples)
        self.wakers.append(news.set)
        try:
            while not reader.finished:
                news.clear()
                yield from reader.fresh()
                self._check()
                if not reader.finished:
                    news.wait()
        finally:
            self.wakers.remove(news.set)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        loop, news, reader = asyncio.get_running_loop(), asyncio.Event(), _Reader(self.samples)

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(news.set)
            except RuntimeError:  # the loop was closed under its reader: nobody is left to read
                self.cancel()

        self.wakers.append(wake)
        try:
            while not reader.finished:
                news.clear()
                for delta in reader.fresh():
                    yield delta
                self._check()
                if not reader.finished:
                    await news.wait()
        finally:
            self.wakers.remove(wake)

    def ended(self) -> None:
        """The engine's word that one sample more has ended."""
        self._unfinished -= 1
        if self._on_finish is not None:
            self._on_finish()
        if not self._unfinished:
            self._finished.set()
        self.wake()

    def wake(self) -> None:
        """Tell readers that there is something new."""
        for wake in tuple(self.wakers):
            wake()

    def fail(self, error: BaseException) -> None:
        """The engine's word that it could not go on with this request."""
        self.error = error
        for sample in self.samples:
            if not sample.done:
                sample.finish("cancelled")

    def _check(self) -> None:
        if self.error is not None:
            raise EngineError(f"the request failed in the engine: {self.error!r}") from self.error


class _Reader:
    """How far one reader of some samples has come."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.seen = {sample: 0 for sample in samples}

    @property
    def finished(self) -> bool:
        return not self.seen

    def fresh(self) -> Iterator[Delta]:
        for sample, start in tuple(self.seen.items()):
            done, completion = sample.done, sample.completion
            end = len(completion.token_ids)  # appended last of all that belongs to a token
            if done:
                del self.seen[sample]
            else:
                self.seen[sample] = end
            if done or end > start:
                yield Delta(
                    sample.index,
                    completion.token_ids[start:end],
                    completion.logprobs[start:end],
                    completion.top_logprobs[start:end],
                    completion.finish_reason if done else None,
                )


class Waiting:
    """Samples that wait for a row, in the order they came. limit: of samples; None for none."""

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise GenerationError(f"max_queue is {limit}; it must be at least 1, None for no limit")
        self.limit = limit
        self._queue: deque[Sample] = deque()
        self._news = threading.Condition(threading.RLock())
        self._closed = False
        self._sweep_at = math.inf

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, handles: Iterable[Handle], *, bounded: bool = True) -> None:
        """Append the samples of requests, all or none. Raises QueueFullError, ClosedError."""
        handles = list(handles)
        samples = [sample for handle in handles for sample in handle.samples]
        with self._news:
            if self._closed:
                raise ClosedError("the engine takes no more requests: it is closed or draining")
            if bounded and self.limit is not None:
                self._check_room(len(samples), self.limit)
            for handle in handles:
                handle.cancelled = self._cancelled
                self._sweep_at = min(self._sweep_at, handle.deadline)
            self._queue.extend(samples)
            self._news.notify_all()

    def _check_room(self, count: int, limit: int) -> None:
        if count > limit:
            raise GenerationError(
                f"{count} samples were asked for, but the queue holds {limit} in all: lower n"
            )
        if len(self._queue) + count > limit:
            raise QueueFullError(
                f"the queue is full: {len(self._queue)} of {limit} places are taken and {count} "
                "were asked for; try again later"
            )

    def put_back(self, samples: Iterable[Sample]) -> None:
        """To the front, in this order; they had their turn before, so no bound applies."""
        with self._news:
            self._queue.extendleft(reversed(list(samples)))

    def first(self, count: int) -> list[Sample]:
        """The next samples, left where they are."""
        with self._news:
            return list(itertools.islice(self._queue, count))

    def take(self, count: int) -> list[Sample]:
        with self._news:
            return [self._queue.popleft() for _ in range(count)]

    def sweep(self, now: float) -> None:
        """End and remove the samples that were cancelled or are late."""
        if now < self._sweep_at:
            return
        with self._news:
            left, ended = overdue(self._queue, now)
            self._queue = deque(left)
            self._sweep_at = min((s.handle.deadline for s in self._queue), default=math.inf)
        for sample, reason in ended:
            sample.finish(reason)

    def wait(self, timeout: float) -> bool:
        """Whether a sample waits, or comes within `timeout` seconds."""
        with self._news:
            return self._news.wait_for(lambda: bool(self._queue), timeout)

    def close(self) -> None:
        """Refuse what comes from now on; what waits stays."""
        with self._news:
            self._closed = True
            self._news.notify_all()

    def _cancelled(self) -> None:
        with self._news:
            self._sweep_at = -math.inf
            self._news.notify_all()
