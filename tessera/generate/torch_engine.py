"""The built-in engine: continuous batching over a per-layer KV cache, on any torch device.

`submit` from any thread, and `step` until idle, which `EngineThread` does; `as_completed` fills the
queue as it empties.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from tessera.generate.cache import Prefill, Slots
from tessera.generate.engine import (
    ClosedError,
    Completed,
    Completion,
    GenerationError,
    GenerationRequest,
    SamplingParams,
    Working,
    check_sequences,
    generate,
)
from tessera.generate.packed import Packed
from tessera.generate.requests import Grammar, Handle, Sample, StoppingCriterion, Waiting
from tessera.generate.scheduler import Scheduler, Stats, similar
from tessera.model.config import ModelConfig
from tessera.model.placement import Placement
from tessera.model.transformer import Transformer

SCORE_LOGITS = 2**24  # held at once while scoring
AHEAD = 16  # batches of requests that are sorted by length together
WORKING_SECONDS = 1.0  # between two calls of `working`
IDLE_SECONDS = 0.5  # between two looks at the clock when nothing waits
MAX_FAILURES = 5  # steps in a row that may fail before an engine counts as broken


class TorchEngine:
    """An `Engine` over a `Transformer` in this process.

    max_batch_size: rows decoded together. max_tokens: cap on rows times their longest possible
    length, to bound the cache; None for no cap. max_queue: samples that may wait for a row before
    `submit` raises QueueFullError. chunk_tokens: of prompts, read between two decode steps.
    prefix_cache_tokens: of prompts, whose KV is kept for later ones that begin alike. int8: large
    weights rounded to int8, on a CPU, best with the rest in bfloat16. placement: see `Packed`;
    the processes of a tensor group make the same calls, and get the same.

    The engine holds a snapshot of the weights: after a training step, `sync`. The cache is kept
    between calls and freed by `close`. Any thread may submit, cancel and read completions; calls
    of `step`, `generate`, `score` and `sync` take turns.
    """

    def __init__(
        self,
        module: Transformer,
        *,
        max_batch_size: int = 64,
        max_tokens: int | None = None,
        max_queue: int | None = None,
        chunk_tokens: int = 512,
        prefix_cache_tokens: int = 0,
        int8: bool = False,
        placement: Placement | None = None,
    ) -> None:
        for name, value in (("max_batch_size", max_batch_size), ("chunk_tokens", chunk_tokens)):
            if value < 1:
                raise GenerationError(f"{name} is {value}; it must be at least 1")
        self._pack = partial(Packed, int8=int8, placement=placement)
        packed, self.waiting = self._pack(module), Waiting(max_queue)
        self._lock, self._next = threading.Lock(), threading.Lock()
        self._open: Scheduler | None = Scheduler(
            packed, self.waiting, max_batch_size, max_tokens, chunk_tokens, prefix_cache_tokens
        )

    @property
    def _scheduler(self) -> Scheduler:
        if self._open is None:
            raise ClosedError("the engine is closed: make another")
        return self._open

    @property
    def config(self) -> ModelConfig:
        return self._scheduler.config

    @property
    def slots(self) -> Slots:
        """The KV cache."""
        return self._scheduler.slots

    @property
    def stats(self) -> Stats:
        return self._scheduler.stats

    def reset_stats(self) -> None:
        self._scheduler.stats = Stats()

    @property
    def running(self) -> int:
        """Samples that decode now; `len(engine.waiting)` more wait."""
        return len(self._scheduler.live)

    @property
    def idle(self) -> bool:
        """Whether nothing waits, is read or decodes."""
        return self._open is None or self._open.idle

    def request(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        key: int = 0,
        timeout: float | None = None,
        stopping: Callable[[], StoppingCriterion] | None = None,
        grammar: Callable[[], Grammar] | None = None,
    ) -> Handle:
        """A request that waits for `queue`.

        key: as in `generate`. timeout: seconds from now after which it ends, wherever it is.
        stopping, grammar: make those of each sample. They run in the stepping thread; they must be
        quick, and must not call the engine. Raises GenerationError.
        """
        room = self._check([prompt], params)
        return Handle(
            prompt,
            params,
            key=key,
            room=room,
            timeout=timeout,
            stopping=stopping,
            grammar=grammar,
        )

    def queue(self, handles: Sequence[Handle]) -> None:
        """Queue requests, all or none; their completions grow while some thread calls `step`.

        Raises GenerationError, QueueFullError, and ClosedError after `close`.
        """
        self.waiting.put(handles)

    def submit(self, prompt: Sequence[int], params: SamplingParams, **how: Any) -> Handle:
        """`request` with a `queue` of its own, and what both raise."""
        handle = self.request(prompt, params, **how)
        self.queue([handle])
        return handle

    @torch.inference_mode()
    def step(self) -> bool:
        """Admit, read and decode once; whether there is more to do.

        An exception fails the requests that were being read or decoded; the engine goes on with
        those that wait.
        """
        with self._turn():
            try:
                self._scheduler.step()
            except BaseException as error:
                for sample in self._scheduler.evict():
                    sample.handle.fail(error)
                raise
            return not self.idle

    def as_completed(
        self, requests: Iterable[GenerationRequest], working: Working | None = None
    ) -> Generator[Completed, None, None]:
        """See `Engine.as_completed`. A completion also ends at max_position_embeddings."""
        batch, flying = self._scheduler.max_batch_size, set[Handle]()
        ended: deque[tuple[GenerationRequest, Sample]] = deque()
        coming = _by_length(requests, AHEAD * batch)
        told, unfinished = time.monotonic(), 0
        try:
            while True:
                while unfinished < 2 * batch:  # as many wait as decode: no row stays empty
                    if (request := next(coming, None)) is None:
                        break
                    handle = self._handle(request, ended)
                    flying.add(handle)
                    self.waiting.put([handle], bounded=False)
                    unfinished += len(handle.samples)
                if not unfinished:
                    return
                self.step()
                if working and (ended or time.monotonic() - told >= WORKING_SECONDS):
                    told = time.monotonic()
                    working(*self._under_way())
                while ended:
                    request, sample = ended.popleft()
                    unfinished -= 1
                    if sample.handle.done:
                        flying.discard(sample.handle)
                    sample.handle.check()
                    yield request, sample.index, sample.completion
        finally:
            for handle in flying:
                handle.cancel()
            if flying:
                with self._turn():
                    self._scheduler.end_expired()

    def check(self, requests: Sequence[GenerationRequest]) -> None:
        """See `Engine.check`."""
        prompts = [request.prompt for request in requests]
        for params in dict.fromkeys(request.params for request in requests):
            self._check(prompts, params)

    def _handle(
        self, request: GenerationRequest, ended: deque[tuple[GenerationRequest, Sample]]
    ) -> Handle:
        return Handle(
            request.prompt,
            request.params,
            key=request.key,
            room=self._check([request.prompt], request.params),
            samples=request.samples,
            stopping=request.stopping,
            on_finish=lambda sample: ended.append((request, sample)),
        )

    def _under_way(self) -> tuple[int, int]:
        """Tokens of the samples that decode, and how many these are."""
        live = tuple(self._scheduler.live)
        return sum(len(sample.completion.token_ids) for sample in live), len(live)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        keys: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.generate`."""
        return generate(self, prompts, params, keys)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `Engine.score`."""
        config = self.config
        check_sequences(sequences, "sequence", config.vocab_size, config.max_position_embeddings)
        return [logprobs for logprobs, _ in self.score_greedy(sequences)]

    def score_greedy(
        self, sequences: Sequence[Sequence[int]]
    ) -> list[tuple[list[float], list[bool]]]:
        """(`score`, whether each of those tokens is the likeliest after its prefix).

        A sequence may have max_position_embeddings + 1 tokens: its last one is not read.
        """
        return [(logprobs, greedy) for logprobs, greedy, _ in self._scored(sequences, 0)]

    def score_top(self, sequences: Sequence[Sequence[int]], count: int) -> list[tuple[list, list]]:
        """(`score`, the likeliest tokens there), as `Completion` has both.

        In chunks, as prompts are read, between which other requests go on.
        """
        return [(logprobs, top) for logprobs, _, top in self._scored(sequences, count, True)]

    @torch.inference_mode()
    def _scored(
        self, sequences: Sequence[Sequence[int]], top: int, chunks: bool = False
    ) -> list[Scored]:
        longest = self.config.max_position_embeddings + 1
        check_sequences(sequences, "sequence", self.config.vocab_size, longest)
        scores = [Scored([], [], []) for _ in sequences]
        scored = (i for i, tokens in enumerate(sequences) if len(tokens) > 1)
        order = sorted(scored, key=lambda i: -len(sequences[i]))
        while order:
            count = similar([len(sequences[i]) for i in order])
            group, order = order[:count], order[count:]
            rows = [sequences[i] for i in group]
            width = max(map(len, rows)) - 1
            if chunks:
                width = min(width, max(1, self._scheduler.chunk_tokens // len(rows)))
            prefill = Prefill(self._scheduler.packed, [row[:-1] for row in rows], keep=False)
            while not prefill.finished:
                with self._turn():
                    _score(prefill, rows, [scores[i] for i in group], width, top)
        return scores

    def sync(self, module: Transformer, version: int) -> None:
        """Take the weights `module` has now, whatever its architecture.

        Requests in flight keep the tokens they have and go on as if those had been given with
        the prompt: the new weights read both anew, so that each next token is the new model's.
        Raises GenerationError where such a request need not fit the new model.
        """
        with self._turn():
            for name in () if self.idle else ("vocab_size", "max_position_embeddings"):
                have, given = getattr(self.config, name), getattr(module.config, name)
                if given < have:
                    raise GenerationError(
                        f"requests in flight may need {name} {have}, and the new model has {given}"
                    )
            evicted = self._scheduler.evict()
            for sample in evicted:
                if sample.completion.token_ids:
                    sample.tokens = [*sample.handle.prompt, *sample.completion.token_ids]
            self.waiting.put_back(evicted)
            self._scheduler.load(partial(self._pack, module), version)

    def sleep(self) -> None:
        """See `Engine.sleep`: gives weights and cache back where nothing is in flight."""
        with self._turn():
            if self.idle:
                self._scheduler.evict()
                self._scheduler.unload()

    def close(self) -> None:
        """End what is in flight, refuse what comes, and give back the memory."""
        self.waiting.close()
        with self._turn():
            if self._open is not None:
                for sample in (*self._open.evict(), *self.waiting.take(len(self.waiting))):
                    sample.finish("cancelled")
                self._open = None

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the engine. A thread that waits holds `_next`, so that a stepping loop yields."""
        with self._next:
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def _check(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> int:
        """Tokens that prompt and completion may have together. Raises GenerationError."""
        vocab_size, room = self.config.vocab_size, self.config.max_position_embeddings
        check_sequences(prompts, "prompt", vocab_size, room - 1)
        if params.thinking is not None:
            check_sequences(params.thinking.ends, "end of thought", vocab_size, room)
        if bad := [token for token, _ in params.logit_bias if not 0 <= token < vocab_size]:
            raise GenerationError(f"logit_bias names token {bad[0]} of {vocab_size}")
        return room


def _by_length(requests: Iterable[GenerationRequest], ahead: int) -> Iterator[GenerationRequest]:
    """The longest prompts first, as far as one reads ahead: similar ones are read together."""
    coming = iter(requests)
    while window := list(itertools.islice(coming, ahead)):
        yield from sorted(window, key=lambda one: -len(one.prompt))


class Scored(NamedTuple):
    """Of one sequence: log-probs, whether each was the largest, the likeliest tokens there."""

    logprobs: list[float]
    greedy: list[bool]
    top: list[list[tuple[int, float]]]


def _score(
    prefill: Prefill, rows: list[Sequence[int]], scores: list[Scored], width: int, top: int
) -> None:
    """Read `width` columns more, and add what they say to the scores of the rows."""
    packed, start = prefill.packed, prefill.done
    width = min(width, prefill.tokens.shape[1] - start)
    hidden = prefill.forward(width).flatten(0, 1)
    inside = [
        (row, column)
        for row, length in enumerate(prefill.lengths)
        for column in range(start, min(length, prefill.done))
    ]
    flat = torch.tensor([row * width + t - start for row, t in inside], device=packed.device)
    targets = torch.tensor([rows[row][t + 1] for row, t in inside], device=packed.device)
    owners, chunk = iter(inside), max(1, SCORE_LOGITS // packed.config.vocab_size)
    for where, target in zip(flat.split(chunk), targets.split(chunk), strict=True):
        logits = packed.logits(hidden[where]).float()
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(-1, target[:, None]).squeeze(-1).tolist()
        greedy = (logits.argmax(-1) == target).tolist()
        values, ids = logprobs.topk(min(top, logits.shape[-1]), dim=-1)
        likeliest = zip(ids.tolist(), values.tolist(), strict=True)
        for logprob, flag, pair in zip(chosen, greedy, likeliest, strict=True):
            score = scores[next(owners)[0]]
            score.logprobs.append(logprob)
            score.greedy.append(flag)
            score.top.append(list(zip(*pair, strict=True)))


class EngineThread:
    """Steps `engine` while there is something to do, inside a `with` block or until `stop`.

    A failed step fails the requests in it (`EngineError` at their readers), is passed to on_error,
    and the thread goes on; after MAX_FAILURES in a row the engine is closed.
    """

    def __init__(
        self, engine: TorchEngine, on_error: Callable[[Exception], None] = lambda error: None
    ) -> None:
        self.engine, self._on_error = engine, on_error
        self.error: Exception | None = None  # what broke the engine
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tessera-engine", daemon=True)

    def __enter__(self) -> EngineThread:
        self._thread.start()
        return self

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self, *error: object) -> None:
        """End the thread after its step, cancel what is in flight, and close the engine."""
        self._stop.set()
        self.engine.waiting.close()
        if self._thread.ident is not None:
            self._thread.join()
        self.engine.close()

    __exit__ = stop

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                busy, failures = self.engine.step(), 0
            except Exception as error:
                failures, busy = failures + 1, True
                self._on_error(error)
                if failures == MAX_FAILURES:
                    self.error = error
                    self.engine.close()
                    return
            if not busy:
                self.engine.waiting.wait(IDLE_SECONDS)
