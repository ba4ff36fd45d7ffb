"""The built-in engine: continuous batching over a per-layer KV cache, on any torch device.

A `_Call` is one `generate`: a queue of requests, longest prompts first, so that prompts of
similar length are read together and a later one always fits behind the cursor; live requests,
one a row of the `Slots`; and a loop that admits, decodes one token a row, and retires. Samples
of one prompt share its prefill.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from tessera.generate.engine import (
    Completion,
    GenerationError,
    Progress,
    SamplingParams,
    check_sequences,
)
from tessera.generate.packed import Packed
from tessera.generate.sampling import choose, uniforms
from tessera.generate.slots import Prefill, Prefix, Slots
from tessera.model.transformer import Transformer

PREFILL_TOKENS = 2**14  # in one pass, padding included: bounds the activations' memory
SCORE_LOGITS = 2**24  # held at once while scoring
SIMILAR = 0.75  # prompts at least this long, relative to the longest, share a pass


def clock(device: torch.device) -> float:
    """Seconds for measuring an engine's work: of the wall, or of this thread where it does it all.

    On a CPU with one torch thread the two agree when nothing else runs, and on a shared machine
    the thread's own seconds leave out what others took.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time() if alone else time.perf_counter()


@dataclass(slots=True)
class Stats:
    """What an engine did since it was made or `reset`, seconds by `clock`; a prompt counts once.

    each_step: gathers the seconds of every decode step, where it is a list.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0.0
    each_step: list[float] | None = None


@dataclass(slots=True)
class _Request:
    prompt: int
    sample: int
    tokens: Sequence[int]
    limit: int
    completion: Completion
    noise: list[float] = field(default_factory=list)


class TorchEngine:
    """An `Engine` over a `Transformer` in this process.

    max_batch_size: rows decoded together. max_tokens: cap on rows times their longest possible
    length, to bound the cache; None for no cap. The engine holds a snapshot of the weights:
    after a training step, `sync`. The cache is kept between calls and freed by `close`.
    """

    def __init__(
        self, module: Transformer, *, max_batch_size: int = 64, max_tokens: int | None = None
    ) -> None:
        if max_batch_size < 1:
            raise GenerationError(f"max_batch_size is {max_batch_size}; it must be at least 1")
        self.max_batch_size = max_batch_size
        self.max_tokens = max_tokens
        self.stats = Stats()
        self.version = 0
        self.packed = Packed(module)
        self.slots = Slots(self.packed)

    def sync(self, module: Transformer, version: int) -> None:
        """Take the weights `module` has now, whatever its architecture."""
        old, self.packed, self.version = self.packed, Packed(module), version
        if not self.packed.same_shape(old):
            self.slots = Slots(self.packed)

    def close(self) -> None:
        del self.packed, self.slots

    def reset_stats(self) -> None:
        self.stats = Stats()

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        keys: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.generate`. A completion also ends at max_position_embeddings."""
        room = self.packed.config.max_position_embeddings
        check_sequences(prompts, "prompt", self.packed.config.vocab_size, room - 1)
        if keys is not None and len(keys) != len(prompts):
            raise GenerationError(f"{len(prompts)} prompts, but {len(keys)} keys: give one each")
        if not prompts:
            return []
        call = _Call(self, prompts, params, keys or range(len(prompts)), progress)
        try:
            return call.run()
        finally:
            self.slots.clear()

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `Engine.score`."""
        config = self.packed.config
        check_sequences(sequences, "sequence", config.vocab_size, config.max_position_embeddings)
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        scores: list[list[float]] = [[] for _ in sequences]
        while order:
            count = _similar([len(sequences[i]) for i in order])
            group, order = order[:count], order[count:]
            rows = [sequences[i] for i in group]
            for i, values in zip(group, self._score(rows), strict=True):
                scores[i] = values
        return scores

    def _score(self, rows: list[Sequence[int]]) -> list[list[float]]:
        tokens, hidden, _ = self.read(rows, keep=False)
        lengths = [len(row) for row in rows]
        width = tokens.shape[1]
        inside = [i * width + t for i, n in enumerate(lengths) for t in range(n - 1)]
        flat = torch.tensor(inside, dtype=torch.long, device=tokens.device)
        targets = tokens.flatten()[flat + 1]
        chunk = max(1, SCORE_LOGITS // self.packed.config.vocab_size)
        parts = []
        for where, target in zip(flat.split(chunk), targets.split(chunk), strict=True):
            logits = self.packed.logits(hidden[where]).float()
            parts += logits.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1).tolist()
        values = iter(parts)
        return [[next(values) for _ in range(n - 1)] for n in lengths]

    def read(
        self, rows: Sequence[Sequence[int]], keep: bool
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """One pass over whole sequences: tokens `(N,T)`, hidden `(N*T,C)`, KV a layer."""
        longest = max(len(row) for row in rows)
        padded = [[*row, *[0] * (longest - len(row))] for row in rows]
        tokens = torch.tensor(padded, device=self.packed.device)
        step = Prefill(self.packed, len(rows), longest, keep)
        return tokens, self.packed.forward(tokens.flatten(), step), step.layers

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Prefix:
        """Read prompts, to be placed into slots."""
        tokens, hidden, layers = self.read(prompts, keep=True)
        lengths = [len(prompt) for prompt in prompts]
        last = [i * tokens.shape[1] + n - 1 for i, n in enumerate(lengths)]
        self.stats.prefill_tokens += sum(lengths)
        return Prefix(lengths, layers, self.packed.logits(hidden[last]))


class _Call:
    """One `generate`."""

    def __init__(
        self,
        engine: TorchEngine,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        keys: Sequence[int],
        progress: Progress | None,
    ) -> None:
        self.engine, self.params, self.keys, self.progress = engine, params, keys, progress
        self.stop = frozenset(params.stop_token_ids)
        room = engine.packed.config.max_position_embeddings
        self.done = [[Completion(version=engine.version) for _ in range(params.n)] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        self.queue = deque(
            _Request(i, sample, prompts[i], min(params.max_tokens, room - len(prompts[i])), done)
            for i in order
            for sample, done in enumerate(self.done[i])
        )
        self.total, self.finished = len(self.queue), 0
        self.live: list[_Request] = []
        self.next_tokens: Tensor | None = None
        self.spare: tuple[int, Prefix] | None = None
        self._reserve()

    def _reserve(self) -> None:
        longest = len(self.queue[0].tokens)
        limit = min(
            self.params.max_tokens, self.engine.packed.config.max_position_embeddings - longest
        )
        self.rows = min(self.engine.max_batch_size, self.total)
        if self.engine.max_tokens is not None:
            self.rows = max(1, min(self.rows, self.engine.max_tokens // (longest + limit)))
        self.engine.slots.reserve(self.rows, longest + min(limit, max(256, longest)))

    def run(self) -> list[list[Completion]]:
        while self.queue or self.live:
            while self._worth_admitting():
                self._admit()
            if self.live:
                self._decode()
        return self.done

    def _worth_admitting(self) -> bool:
        """Prompts are read a few at a time: a pass over one costs nearly that over several."""
        free = self.rows - len(self.live)
        return free > 0 and free >= min(len(self.queue), max(1, self.rows // 8)) > 0

    def _admit(self) -> None:
        """Fill one stretch of free rows with the next similar prompts."""
        start = clock(self.engine.packed.device)
        group, prefix = self._next_group()
        prompts = list(dict.fromkeys(request.prompt for request in group))
        if prefix is None:
            by_prompt = {request.prompt: request.tokens for request in group}
            prefix = self.engine.prefill([by_prompt[prompt] for prompt in prompts])
        source = [prompts.index(request.prompt) for request in group]
        self.spare = None
        if self.queue and self.queue[0].prompt == prompts[-1]:
            self.spare = prompts[-1], prefix.take(len(prompts) - 1)
        self.engine.slots.place(prefix, source)
        first = len(self.live)
        self.live += group
        self._accept(first, prefix.logits[source])
        self.engine.stats.prefill_seconds += clock(self.engine.packed.device) - start

    def _next_group(self) -> tuple[list[_Request], Prefix | None]:
        """Requests for the free rows, and their prefix where it was read before."""
        free = self.rows - len(self.live)
        if self.spare is not None:
            prompt, prefix = self.spare
            count = sum(request.prompt == prompt for request in islice(self.queue, free))
        else:
            prefix = None
            count = _similar([len(request.tokens) for request in islice(self.queue, free)])
        group = [self.queue.popleft() for _ in range(count)]
        if self.params.temperature > 0:
            for r in group:
                r.noise = uniforms(self.params.seed, self.keys[r.prompt], r.sample, r.limit)
        return group, prefix

    def _decode(self) -> None:
        """Feed every live row its last token, and choose the next."""
        start = clock(self.engine.packed.device)
        packed, stats = self.engine.packed, self.engine.stats
        tokens = self.next_tokens
        if tokens is None:
            last = [request.completion.token_ids[-1] for request in self.live]
            tokens = torch.tensor(last, device=packed.device)
        stats.decode_steps += 1
        stats.decode_tokens += len(self.live)
        logits = packed.logits(packed.forward(tokens, self.engine.slots.step(packed)))
        self._accept(0, logits)
        seconds = clock(self.engine.packed.device) - start
        stats.decode_seconds += seconds
        if stats.each_step is not None:
            stats.each_step.append(seconds)

    def _accept(self, first: int, logits: Tensor) -> None:
        """Choose a token from each row of logits; rows from `first` on; retire what ends."""
        requests = self.live[first:]
        tokens, logprobs = choose(logits, self.params, self._noise(requests, logits.device))
        self.next_tokens = tokens if first == 0 else None
        ended = []
        values = zip(requests, tokens.tolist(), logprobs.tolist(), strict=True)
        for row, (request, token, logprob) in enumerate(values, first):
            completion = request.completion
            completion.token_ids.append(token)
            completion.logprobs.append(logprob)
            if token in self.stop:
                completion.finish_reason = "stop"
                ended.append(row)
            elif len(completion.token_ids) == request.limit:
                ended.append(row)
        if ended:
            self._retire(ended)

    def _noise(self, requests: list[_Request], device: torch.device) -> Tensor | None:
        if self.params.temperature == 0:
            return None
        noise = [request.noise[len(request.completion.token_ids)] for request in requests]
        return torch.tensor(noise, dtype=torch.float64, device=device)

    def _retire(self, rows: list[int]) -> None:
        for row in reversed(rows):  # from the back, so that the last live row is never an ended one
            self.engine.slots.drop(row)
            last = self.live.pop()
            if row < len(self.live):
                self.live[row] = last
        self.next_tokens = None
        self.finished += len(rows)
        if self.progress is not None:
            self.progress(self.finished, self.total)


def _similar(lengths: list[int]) -> int:
    """How many of these descending lengths share a pass: similar, and few enough tokens."""
    fits = max(1, PREFILL_TOKENS // lengths[0])
    near = sum(length >= SIMILAR * lengths[0] for length in lengths)
    return min(fits, near)
