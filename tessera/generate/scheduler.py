"""The live rows of an engine: what each is to do next, and what it has been given.

Row i of the `Slots` belongs to `live[i]`. Parameters, noise and seen tokens of all rows become
tensors once and stand until the rows change; choosing a token for every row is then the same few
kernels whatever the rows ask.

What the engine does next: who is admitted, how far prompts are read, when rows decode.

    Waiting (a queue)  ->  Reading (chunks of prompts)  ->  Batch (one token a row and step)

While rows decode, a step reads at most `chunk_tokens` of prompts, so a long one delays them by
that much and no more; with no row to delay, all free rows are filled first. Samples of one prompt
share its reading, whether they are admitted together or not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.generate.cache import Prefix, PrefixCache, Reading, Slots, common
from tessera.generate.engine import FinishReason
from tessera.generate.packed import Packed
from tessera.generate.requests import Sample, Waiting, overdue
from tessera.generate.sampling import Choice, Plan, choose, uniforms
from tessera.generate.stats import Stats, clock


class Batch:
    """Rows that decode together."""

    def __init__(self, slots: Slots, device: torch.device) -> None:
        self.slots, self.device = slots, device
        self.live: list[Sample] = []
        self._rows_changed()

    def __len__(self) -> int:
        return len(self.live)

    def join(self, samples: Sequence[Sample], prefix: Prefix, source: list[int]) -> None:
        """New rows behind the live ones, each with its first token; sample i read `source[i]`."""
        self.slots.place(prefix, source)
        first = len(self.live)
        self.live += samples
        for sample in samples:
            if sample.params.temperature > 0 and not sample.noise:
                seed, limit = sample.params.seed, sample.limit
                sample.noise = uniforms(seed, sample.key, sample.index, limit)
        self._rows_changed()
        fresh = _Rows(samples, prefix.logits.shape[-1], self.device)
        self._accept(first, fresh.choose(prefix.logits[source]))

    def decode(self, packed: Packed) -> None:
        """Feed every row its last token, and choose the next."""
        tokens = self.next_tokens
        if tokens is None:
            last = [sample.completion.token_ids[-1] for sample in self.live]
            tokens = torch.tensor(last, device=self.device)
        logits = packed.logits(packed.forward(tokens, self.slots.step(packed)))
        if self.rows is None:
            self.rows = _Rows(self.live, logits.shape[-1], self.device)
        choice = self.rows.choose(logits)
        self.next_tokens = choice.tokens
        self._accept(0, choice)

    def end(self, now: float) -> None:
        """End the rows that were cancelled or are late."""
        self._retire(
            [
                (row, reason)
                for row, sample in enumerate(self.live)
                if (reason := sample.overdue(now)) is not None
            ]
        )

    def clear(self) -> list[Sample]:
        """Empty every row; whose they were."""
        samples, self.live = self.live, []
        self.slots.clear()
        self._rows_changed()
        return samples

    def _rows_changed(self) -> None:
        self.rows: _Rows | None = None
        self.next_tokens: Tensor | None = None

    def _accept(self, first: int, choice: Choice) -> None:
        """Give each sample from row `first` on its token; retire those that end with it."""
        ended: list[tuple[int, FinishReason]] = []
        tops = _as_lists(choice.top, len(self.live) - first)
        values = zip(
            self.live[first:], choice.tokens.tolist(), choice.logprobs.tolist(), tops, strict=True
        )
        for row, (sample, token, logprob, top) in enumerate(values, first):
            completion = sample.completion
            if sample.params.logprobs:
                completion.top_logprobs.append(top[: sample.params.logprobs])
            completion.logprobs.append(logprob)
            completion.token_ids.append(token)
            if sample.thought is not None:
                sample.thought.push(token)
            if token in sample.params.stop_token_ids or _watched(sample, token):
                ended.append((row, "stop"))
            elif len(completion.token_ids) >= sample.limit:
                ended.append((row, "length"))
            elif sample.handle.wakers:
                sample.handle.wake()
        self._retire(ended)

    def _retire(self, rows: list[tuple[int, FinishReason]]) -> None:
        gone: list[tuple[Sample, FinishReason]] = []
        for row, reason in reversed(rows):  # from the back: the last row is never an ended one
            gone.append((self.live[row], reason))
            self.slots.drop(row)
            last = self.live.pop()
            if row < len(self.live):
                self.live[row] = last
        if rows:
            self._rows_changed()
        for sample, reason in gone:
            sample.finish(reason)


class _Rows:
    """What a list of samples asks of its logits, as tensors."""

    def __init__(self, samples: Sequence[Sample], vocab_size: int, device: torch.device) -> None:
        self.samples, self.device = tuple(samples), device
        self.plan = Plan.of([sample.params for sample in samples], device)
        self.thoughts = any(sample.thought is not None for sample in samples)
        self.seen: Tensor | None = None
        if self.plan.penalty is not None:
            self.seen = torch.zeros(len(samples), vocab_size, dtype=torch.bool, device=device)
            for row, sample in zip(self.seen, samples, strict=True):
                if sample.params.repetition_penalty != 1:
                    held = [*sample.tokens, *sample.completion.token_ids]
                    row[torch.tensor(held, device=device)] = True

    def choose(self, logits: Tensor) -> Choice:
        noise = forced = None
        if self.plan.sampled:
            drawn = [s.noise[len(s.completion.token_ids)] if s.noise else 0.0 for s in self.samples]
            noise = torch.tensor(drawn, dtype=torch.float64, device=self.device)
        if self.thoughts:
            wanted = [None if s.thought is None else s.thought.forced for s in self.samples]
            if any(token is not None for token in wanted):
                ids = [-1 if token is None else token for token in wanted]
                forced = torch.tensor(ids, device=self.device)
        choice = choose(logits, self.plan, noise, seen=self.seen, forced=forced)
        if self.seen is not None:
            self.seen.scatter_(1, choice.tokens[:, None], True)
        return choice


def _as_lists(top: tuple[Tensor, Tensor] | None, rows: int) -> Sequence[list[tuple[int, float]]]:
    """The likeliest tokens of each row as (id, log-prob) pairs."""
    if top is None:
        return [[]] * rows
    ids, values = (x.tolist() for x in top)
    return [list(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]


def _watched(sample: Sample, token: int) -> bool:
    """Whether the sample's watch ends it here. A watch that fails takes nobody with it."""
    if sample.watch is None:
        return False
    try:
        return sample.watch(token)
    except Exception as error:  # noqa: BLE001 - the caller's code; the caller is told
        sample.handle.error = error
        return True


PREFILL_TOKENS = 2**14  # in one pass, padding included: bounds the activations' memory
SIMILAR = 0.75  # prompts at least this long, relative to the longest, share a pass


@dataclass(frozen=True)
class Limits:
    """Rows at most, tokens of the cache at most (None: no cap), tokens of a chunk."""

    rows: int
    tokens: int | None
    chunk: int


@dataclass
class _Read:
    """Prompts being read, and who waits for them."""

    samples: list[Sample]
    prompts: list[Sequence[int]]
    reading: Reading


class Scheduler:
    """Moves samples from `waiting` to their ends. One thread at a time."""

    def __init__(
        self, packed: Packed, limits: Limits, waiting: Waiting, known: PrefixCache | None
    ) -> None:
        self.limits, self.waiting, self.known = limits, waiting, known
        self.stats = Stats()
        self._read: _Read | None = None
        self._spare: tuple[Sequence[int], Prefix] | None = None
        self.load(packed)

    def load(self, packed: Packed) -> None:
        """Other weights, where nothing is read or decoded; the cache's memory stays if it fits."""
        assert self._read is None and self._spare is None
        if not hasattr(self, "slots") or not packed.same_shape(self.packed):
            self.slots = Slots(packed, self.limits.tokens)
            self.batch = Batch(self.slots, packed.device)
        self.packed = packed
        if self.known is not None:
            self.known.clear()

    @property
    def idle(self) -> bool:
        return not (self.batch.live or self._read or len(self.waiting))

    def step(self, version: int) -> None:
        """End what is overdue, read, decode."""
        self.end_overdue()
        self._read_prompts(version)
        if self.batch.live:
            self._decode()

    def evict(self) -> list[Sample]:
        """Stop reading and decoding; whose work that was, rows first."""
        samples = self.batch.clear()
        if self._read is not None:
            samples += self._read.samples
        self._read = self._spare = None
        return samples

    def end_overdue(self) -> None:
        """End what was cancelled or is late, wherever it is."""
        now = time.monotonic()
        self.waiting.sweep(now)
        self.batch.end(now)
        if self._read is None:
            return
        self._read.samples, ended = overdue(self._read.samples, now)
        if not self._read.samples:
            self._read = None
        for sample, reason in ended:
            sample.finish(reason)

    def _decode(self) -> None:
        start = clock(self.packed.device)
        self.stats.decode_steps += 1
        self.stats.decode_tokens += len(self.batch.live)
        self.batch.decode(self.packed)
        seconds = clock(self.packed.device) - start
        self.stats.decode_seconds += seconds
        if self.stats.each_step is not None:
            self.stats.each_step.append(seconds)

    def _read_prompts(self, version: int) -> None:
        """Fill free rows: all of them where none decodes, else as far as one chunk goes."""
        budget = self.limits.chunk if self.batch.live else None
        start = clock(self.packed.device)
        while (budget is None or budget > 0) and (self._read is not None or self._admit(version)):
            if self._read is not None:
                read = self._advance(budget or PREFILL_TOKENS, version)
                budget = None if budget is None else budget - read
            now = clock(self.packed.device)
            self.stats.prefill_seconds += now - start
            start = now

    def _advance(self, budget: int, version: int) -> int:
        """Read on; tokens of the pass, padding included."""
        assert self._read is not None
        reading = self._read.reading
        before = reading.done
        self.stats.prefill_tokens += reading.advance(budget)
        if reading.finished:
            read, self._read = self._read, None
            prefix = reading.prefix()
            if self.known is not None:
                for row, prompt in enumerate(read.prompts):
                    self.known.add(prompt, prefix, row)
            self._join(read.samples, read.prompts, prefix, version)
        return (reading.done - before) * len(reading.lengths)

    def _admit(self, version: int) -> bool:
        """Whether some of those that wait were admitted: they are read, or have been already."""
        count = self._admissible()
        if not count:
            return False
        group = self.waiting.take(count)
        prompts = list({id(sample.tokens): sample.tokens for sample in group}.values())
        if self._spare is not None and self._spare[0] is prompts[0]:
            self._join(group, prompts, self._spare[1], version)
            return True
        self._spare = None
        past = self.known.find(prompts[0]) if self.known is not None else None
        if past is not None:
            self.stats.cached_tokens += past.lengths[0]
        self._read = _Read(group, prompts, Reading(self.packed, prompts, past))
        return True

    def _join(
        self, samples: list[Sample], prompts: list[Sequence[int]], prefix: Prefix, version: int
    ) -> None:
        """Rows for samples whose prompts were read; what those behind them need is kept."""
        place = {id(prompt): row for row, prompt in enumerate(prompts)}
        self._spare = None
        behind = self.waiting.first(1)
        if behind and behind[0].tokens is prompts[-1]:
            self._spare = prompts[-1], prefix.take(len(prompts) - 1)
        for sample in samples:
            if not sample.completion.token_ids:
                sample.completion.version = version
        self.batch.join(samples, prefix, [place[id(sample.tokens)] for sample in samples])

    def _admissible(self) -> int:
        """How many of those that wait are admitted now, as one group; 0 for none yet.

        A few at a time: a pass over one prompt costs nearly that over several.
        """
        live, waiting = self.batch.live, len(self.waiting)
        rows = min(self.limits.rows, len(live) + waiting)
        free = self.limits.rows - len(live)
        if not waiting or free < min(waiting, max(1, rows // 8)):
            return 0
        group = self.waiting.first(free)
        group = group[: self._together([sample.tokens for sample in group])]
        if self.limits.tokens is not None:
            longest = max(sample.longest for sample in (*live, *group))
            rows = max(1, min(rows, self.limits.tokens // longest))
        group = group[: max(0, rows - len(live))]
        if group:
            self._reserve(group, rows)
        return len(group)

    def _reserve(self, group: list[Sample], rows: int) -> None:
        longest = max(len(sample.tokens) for sample in group)
        if self.batch.live:
            if rows > self.slots.rows:  # one row more at a time would move them all each time
                rows = min(self.limits.rows, max(rows, 2 * self.slots.rows))
            self.slots.reserve(rows, longest)
            return
        room = max(256, longest)
        columns = max(min(sample.longest, len(sample.tokens) + room) for sample in group)
        self.slots.reserve(rows, columns)

    def _together(self, prompts: list[Sequence[int]]) -> int:
        """How many of the first prompts share a pass, or what was read before."""
        first = prompts[0]
        same = _leading(prompts, lambda prompt: prompt is first)
        if self._spare is not None and self._spare[0] is first:
            return same
        count = similar([len(prompt) for prompt in prompts])
        if self.known is None:
            return count
        if self.known.find(first) is not None:
            return same
        # What begins like the first waits for it, and then finds that in the cache.
        return _leading(prompts[:count], lambda p: p is first or 2 * common(first, p) < len(p))


def _leading(prompts: Sequence[Sequence[int]], wanted) -> int:
    """How many of the first prompts are wanted, up to the first that is not."""
    return next((i for i, prompt in enumerate(prompts) if not wanted(prompt)), len(prompts))


def similar(lengths: Sequence[int]) -> int:
    """How many of the first lengths share a pass: similar, and few enough tokens."""
    least = most = lengths[0]
    for i, length in enumerate(lengths):
        least, most = min(least, length), max(most, length)
        if least < SIMILAR * most or (i and (i + 1) * most > PREFILL_TOKENS):
            return i
    return len(lengths)
