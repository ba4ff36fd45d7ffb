"""What callers and the engine's thread share: submitted requests, and the queue they wait in.

A completion is lists that only the engine appends to. A reader remembers how far it has read, so a
slow one gets several tokens at once. No torch here.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from tessera.generate.engine import (
    ClosedError,
    Completion,
    FinishReason,
    GenerationError,
    QueueFullError,
    SamplingParams,
    Thinking,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Gets each token of a sample in the engine's thread; True ends the sample with it.
StoppingCriterion = Callable[[int], bool]


class Grammar(Protocol):
    """Which tokens may come next in one sample."""

    def fill(self, bits: NDArray[np.int32], row: int) -> None:
        """Write them to bits `(B, V/32)`, 1 for those that may come, the lowest bit first."""

    def push(self, token: int) -> bool:
        """Take the token that came; whether nothing may follow it."""
        ...


class EngineError(RuntimeError):
    """A step failed while this request was in it; the cause says how."""


NOT_FINITE = "the model's logits are NaN: its weights are damaged, or too large for its dtype"


class NotFiniteError(EngineError):
    """Logits that are NaN, of which no token can be chosen."""


class ThoughtBudget:
    """Enforces the budget of one completion's thought: `push` each token; `forced` is the next."""

    def __init__(self, thinking: Thinking) -> None:
        self.thinking = thinking
        self.stage: Literal["before", "thinking", "answering"]
        self.stage = "before" if thinking.starts else "thinking"
        self.tokens = 0  # of the thought so far
        self._tail: list[int] = []
        self._pending: list[int] = []  # tokens to force, the next one last
        self._memory = max(map(len, (*thinking.starts, *thinking.ends)))
        self._check_budget()

    @property
    def forced(self) -> int | None:
        """The token that must come next; None where the model chooses."""
        return self._pending[-1] if self._pending else None

    def push(self, token: int) -> None:
        if self.stage == "answering":
            return
        self._tail = [*self._tail, token][-self._memory :]
        marks = self.thinking.starts if self.stage == "before" else self.thinking.ends
        found = any(tuple(self._tail[-len(mark) :]) == mark for mark in marks)
        if self.stage == "before":
            if found:
                self.stage, self._tail = "thinking", []
                self._check_budget()
            return
        self.tokens += 1
        if self._pending:
            self._pending.pop()
            found = not self._pending
        if found:
            self.stage = "answering"
        elif not self._pending:
            self._check_budget()

    def _check_budget(self) -> None:
        """Once the budget is spent: force the rest of the end that the model has begun, if any."""
        if self.stage != "thinking" or self.tokens < self.thinking.max_tokens:
            return
        begun = (
            (have, end)
            for end in self.thinking.ends
            for have in range(len(end) - 1, 0, -1)
            if self._tail[-have:] == list(end[:have])
        )
        have, end = max(begun, key=lambda pair: pair[0], default=(0, self.thinking.ends[0]))
        self._pending = list(end[have:])[::-1]


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

    tokens: what must be read before the next token can be chosen; samples of one prompt share the
    list object, and so its reading. limit: tokens of the whole completion.
    """

    handle: Handle
    index: int
    tokens: Sequence[int]
    params: SamplingParams
    limit: int
    completion: Completion = field(default_factory=Completion)
    noise: list[float] = field(default_factory=list)
    thought: ThoughtBudget | None = None
    stopping: StoppingCriterion | None = None
    grammar: Grammar | None = None
    cancelled: bool = False
    done: bool = False

    @property
    def longest(self) -> int:
        """Tokens that stand in the cache when the completion is as long as it may be."""
        return len(self.tokens) + self.limit - len(self.completion.token_ids)

    def expired(self, now: float) -> FinishReason | None:
        """Why the sample must end now, if it must."""
        if self.cancelled:
            return "cancelled"
        return "timeout" if now >= self.handle.deadline else None

    def finish(self, reason: FinishReason) -> None:
        self.completion.finish_reason = reason
        self.done = True
        self.handle.sample_finished(self)


def end_expired(samples: Iterable[Sample], now: float) -> list[Sample]:
    """Ends those that were cancelled or are late; returns the others."""
    left = []
    for sample in samples:
        if reason := sample.expired(now):
            sample.finish(reason)
        else:
            left.append(sample)
    return left


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
        samples: Sequence[int] | None = None,
        timeout: float | None = None,
        stopping: Callable[[], StoppingCriterion] | None = None,
        grammar: Callable[[], Grammar] | None = None,
        on_finish: Callable[[Sample], None] = lambda sample: None,
    ) -> None:
        self.prompt, self.key = list(prompt), key
        self.deadline = math.inf if timeout is None else time.monotonic() + timeout
        self.error: BaseException | None = None
        self.on_cancel: Callable[[], None] = lambda: None  # set by the queue
        self.samples = [
            Sample(
                self,
                index,
                self.prompt,
                params,
                min(params.max_tokens, room - len(prompt)),
                thought=None if params.thinking is None else ThoughtBudget(params.thinking),
                stopping=None if stopping is None else stopping(),
                grammar=None if grammar is None else grammar(),
            )
            for index in (range(params.n) if samples is None else samples)
        ]
        self.wakers: list[Callable[[], None]] = []  # of readers, called for every token
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
        self.on_cancel()

    def result(self, timeout: float | None = None) -> list[Completion]:
        """The completions, once all have ended.

        Raises TimeoutError after `timeout` seconds, and EngineError where a step failed.
        """
        if not self._finished.wait(timeout):
            raise TimeoutError(f"the request was not done after {timeout} s")
        self.check()
        return self.completions

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        if not self.done:
            self.cancel()

    def __iter__(self) -> Iterator[Delta]:
        changed, seen = threading.Event(), dict.fromkeys(self.samples, 0)
        with self.waking(changed.set):
            while seen:
                changed.clear()
                yield from self.deltas(seen)
                if seen:
                    changed.wait()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        async for _, delta in read_all([self]):
            yield delta

    @contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        self.wakers.append(wake)
        try:
            yield
        finally:
            self.wakers.remove(wake)

    def deltas(self, seen: dict[Sample, int]) -> Iterator[Delta]:
        """What is new since `seen` tokens of each sample; those that ended are removed from it."""
        for sample, start in tuple(seen.items()):
            done, completion = sample.done, sample.completion
            end = len(completion.token_ids)  # appended last of all that belongs to a token
            if done:
                del seen[sample]
            else:
                seen[sample] = end
            if done or end > start:
                yield Delta(
                    sample.index,
                    completion.token_ids[start:end],
                    completion.logprobs[start:end],
                    completion.top_logprobs[start:end],
                    completion.finish_reason if done else None,
                )
        self.check()

    def sample_finished(self, sample: Sample) -> None:
        self._unfinished -= 1
        self._on_finish(sample)
        if not self._unfinished:
            self._finished.set()
        self.wake()

    def wake(self) -> None:
        """Tell readers that there is something new."""
        for wake in tuple(self.wakers):
            wake()

    def fail(self, error: BaseException) -> None:
        """End the request because a step of the engine failed."""
        self.error = error
        for sample in self.samples:
            if not sample.done:
                sample.finish("cancelled")

    def check(self) -> None:
        """Raise EngineError where a step failed."""
        if isinstance(self.error, NotFiniteError):
            raise NotFiniteError(str(self.error))
        if self.error is not None:
            raise EngineError(f"the request failed in the engine: {self.error!r}") from self.error


async def read_all(handles: Sequence[Handle]) -> AsyncIterator[tuple[int, Delta]]:
    """What the requests gain, each with the place of its request, until all have ended."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()
    unread = {place: dict.fromkeys(handle.samples, 0) for place, handle in enumerate(handles)}

    def wake() -> None:
        try:
            loop.call_soon_threadsafe(changed.set)
        except RuntimeError:  # the loop was closed under its reader: nobody is left to read
            for handle in handles:
                handle.cancel()

    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle.waking(wake))
        while unread:
            changed.clear()
            for place, seen in tuple(unread.items()):
                for delta in handles[place].deltas(seen):
                    yield place, delta
                if not seen:
                    del unread[place]
            if unread:
                await changed.wait()


class Waiting:
    """Samples that wait for a row, in the order they came. limit: of samples; None for none."""

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise GenerationError(f"max_queue is {limit}; it must be at least 1, None for no limit")
        self.limit = limit
        self._queue: deque[Sample] = deque()
        self._changed = threading.Condition(threading.RLock())
        self._closed = False
        self._sweep_at = math.inf  # the earliest time at which a sample may expire

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, handles: Sequence[Handle], *, bounded: bool = True) -> None:
        """Append the samples of requests, all or none. Raises QueueFullError, ClosedError."""
        samples = [sample for handle in handles for sample in handle.samples]
        with self._changed:
            if self._closed:
                raise ClosedError("the engine takes no more requests: it is closed or draining")
            have, count, limit = len(self._queue), len(samples), self.limit
            if bounded and limit is not None and count > limit:
                raise GenerationError(
                    f"{count} samples were asked for, but the queue holds {limit} in all: "
                    "lower n, or send fewer prompts at once"
                )
            if bounded and limit is not None and have + count > limit:
                raise QueueFullError(
                    f"the queue is full: {have} of {limit} places are taken and {count} were "
                    "asked for; try again later"
                )
            for handle in handles:
                handle.on_cancel = self._sweep_soon
                self._sweep_at = min(self._sweep_at, handle.deadline)
            self._queue.extend(samples)
            self._changed.notify_all()

    def put_back(self, samples: Sequence[Sample]) -> None:
        """Put samples that were taken to the front, in this order."""
        with self._changed:
            self._queue.extendleft(reversed(samples))

    def first(self, count: int) -> list[Sample]:
        """The next samples, left where they are."""
        with self._changed:
            return list(itertools.islice(self._queue, count))

    def take(self, count: int) -> list[Sample]:
        with self._changed:
            return [self._queue.popleft() for _ in range(count)]

    def sweep(self, now: float) -> None:
        """End and remove the samples that were cancelled or are late."""
        if now < self._sweep_at:
            return
        with self._changed:
            self._sweep_at = math.inf
            self._queue = deque(end_expired(self._queue, now))
            self._sweep_at = min((self._sweep_at, *(s.handle.deadline for s in self._queue)))

    def wait(self, timeout: float) -> bool:
        """Whether a sample waits, or comes within `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._queue), timeout)

    def close(self) -> None:
        """Refuse new requests; those that wait stay."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _sweep_soon(self) -> None:
        with self._changed:
            self._sweep_at = -math.inf
            self._changed.notify_all()
