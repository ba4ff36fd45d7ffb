"""What the engine does next: who is admitted, how far prompts are read, when rows decode.

    Waiting (a queue)  ->  Prefill (chunks of prompts)  ->  live rows (one token a row and step)

While rows decode, a step reads at most `chunk_tokens` of prompts, so a long one delays them by
that much and no more. Samples of one prompt share its reading, however they are admitted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from tessera import dist
from tessera.generate.cache import Prefill, Prefix, PrefixCache, Slots, common
from tessera.generate.engine import FinishReason
from tessera.generate.packed import Packed
from tessera.generate.requests import NOT_FINITE, NotFiniteError, Sample, Waiting, end_expired
from tessera.generate.sampling import Chosen, Sampler, joined, uniforms
from tessera.model.cpu import rows_together

PREFILL_TOKENS = 2**14  # in one pass, padding included: bounds the activations' memory
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
    """Counts since an engine was made or `reset_stats`, seconds by `clock`; a prompt counts once.

    cached_tokens: of prompts, found in the prefix cache. not_finite: samples that ended because
    their logits were NaN. each_step: a list that gets the seconds of every decode step.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0.0
    cached_tokens: int = 0
    not_finite: int = 0
    each_step: list[float] | None = None


class _Rows:
    """The sampling state of some samples as tensors, valid until the rows change."""

    def __init__(self, samples: Sequence[Sample], vocab_size: int, packed: Packed) -> None:
        self.samples, self.packed = tuple(samples), packed
        self.device = device = packed.device
        self.size = rows_together(len(samples), vocab_size, device)
        params = [sample.params for sample in samples]
        starts, top = range(0, len(params), self.size), max(one.logprobs for one in params)
        self.samplers = [Sampler(params[i : i + self.size], device, top) for i in starts]
        self.thoughts = any(sample.thought is not None for sample in samples)
        self.grammars = any(sample.grammar is not None for sample in samples)
        self.seen: Tensor | None = None
        if any(one.repetition_penalty != 1 for one in params):
            self.seen = torch.zeros(len(samples), vocab_size, dtype=torch.bool, device=device)
            for row, sample in zip(self.seen, samples, strict=True):
                if sample.params.repetition_penalty != 1:
                    held = [*sample.tokens, *sample.completion.token_ids]
                    row[torch.tensor(held, device=device)] = True
        self.counts: Tensor | None = None
        if any(one.frequency_penalty or one.presence_penalty for one in params):
            self.counts = torch.zeros(len(samples), vocab_size, device=device)
            for row, sample in zip(self.counts, samples, strict=True):
                said = torch.tensor(sample.completion.token_ids, dtype=torch.long, device=device)
                row += torch.bincount(said, minlength=vocab_size)

    def choose(self, logits: Tensor) -> Chosen:
        noise = forced = None
        if any(sampler.groups for sampler in self.samplers):
            drawn = [s.noise[len(s.completion.token_ids)] if s.noise else 0.0 for s in self.samples]
            wide = dist.widest_float(self.device)
            noise = torch.tensor(drawn, dtype=wide, device=self.device)
        if self.thoughts:
            wanted = [None if s.thought is None else s.thought.forced for s in self.samples]
            if any(token is not None for token in wanted):
                ids = [-1 if token is None else token for token in wanted]
                forced = torch.tensor(ids, device=self.device)
        given = (logits, noise, self.seen, self.counts, forced, self._allowed(logits.shape[-1]))
        none = [None] * len(self.samplers)
        portions = [none if x is None else x.split(self.size) for x in given]
        parts = [one.choose(*of) for one, *of in zip(self.samplers, *portions, strict=True)]
        chosen = self.packed.agreed(joined(parts))
        if self.seen is not None:
            self.seen.scatter_(1, chosen.tokens[:, None], True)
        if self.counts is not None:
            self.counts[torch.arange(len(self.samples)), chosen.tokens] += 1
        return chosen

    def _allowed(self, vocab_size: int) -> Tensor | None:
        """Which tokens the grammars of the samples allow; None where no sample has one."""
        if not self.grammars:
            return None
        bits = np.full((len(self.samples), -(-vocab_size // 32)), -1, dtype=np.int32)
        for row, sample in enumerate(self.samples):
            if sample.grammar is not None:
                try:
                    sample.grammar.fill(bits, row)
                except Exception as error:  # noqa: BLE001 - harms no other sample
                    bits[row] = -1
                    sample.handle.error, sample.cancelled = error, True
        flags = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")[:, :vocab_size]
        return torch.from_numpy(flags).bool().to(self.device)


class Scheduler:
    """Moves samples from `waiting` to their ends. One thread at a time.

    Row i of `slots` belongs to `live[i]`.
    """

    def __init__(
        self,
        packed: Packed,
        waiting: Waiting,
        max_batch_size: int,
        max_tokens: int | None,
        chunk_tokens: int,
        prefix_cache_tokens: int,
    ) -> None:
        self.packed, self.config, self.waiting = packed, packed.config, waiting
        self.max_batch_size, self.max_tokens = max_batch_size, max_tokens
        self.chunk_tokens = chunk_tokens
        self.prefixes = PrefixCache(prefix_cache_tokens) if prefix_cache_tokens else None
        self.stats, self.version = Stats(), 0
        self.slots = Slots(packed, max_tokens)
        self.live: list[Sample] = []
        self._rows: _Rows | None = None  # of `live`, until it changes
        self._next_tokens: Tensor | None = None  # that `live` decodes, until it changes
        self._prefill: Prefill | None = None
        self._reading: list[Sample] = []  # who waits for `_prefill`
        self._last_read: tuple[Sequence[int], Prefix] | None = None  # for more samples of a prompt

    def load(self, pack: Callable[[], Packed], version: int) -> None:
        """Other weights, after `evict`; the cache's memory stays if it fits.

        pack: makes them once the old ones are gone, so that both are never in memory.
        """
        self.version = version
        self._forget_weights()
        self.packed = packed = pack()
        self.config, slots = packed.config, Slots(packed, self.max_tokens)
        if slots.kind != self.slots.kind:
            self.slots = slots

    def unload(self) -> None:
        """Give the memory back, after `evict`, until `load`."""
        self._forget_weights()
        self.slots.free()

    def _forget_weights(self) -> None:
        self.__dict__.pop("packed", None)
        if self.prefixes is not None:
            self.prefixes = PrefixCache(self.prefixes.max_tokens)

    @property
    def idle(self) -> bool:
        return not (self.live or self._prefill or len(self.waiting))

    def step(self) -> None:
        """End what has expired, read, decode."""
        self.end_expired()
        self._read_prompts()
        if self.live:
            self._decode()

    def evict(self) -> list[Sample]:
        """Stop reading and decoding; returns the samples, rows first."""
        samples = self.live + self._reading
        self.live, self._prefill, self._reading, self._last_read = [], None, [], None
        self.slots.clear()
        self._rows = self._next_tokens = None
        return samples

    def end_expired(self) -> None:
        """End what was cancelled or is late, wherever it is."""
        now = time.monotonic()
        self.waiting.sweep(now)
        self._retire([(i, why) for i, one in enumerate(self.live) if (why := one.expired(now))])
        self._reading = end_expired(self._reading, now)
        if not self._reading:
            self._prefill = None

    def _decode(self) -> None:
        """Feed every row its last token, and choose the next."""
        start = clock(self.packed.device)
        self.stats.decode_steps += 1
        self.stats.decode_tokens += len(self.live)
        tokens = self._next_tokens
        if tokens is None:
            last = [sample.completion.token_ids[-1] for sample in self.live]
            tokens = torch.tensor(last, device=self.slots.device)
        logits = self.packed.logits(self.slots.decode(self.packed, tokens))
        if self._rows is None:
            self._rows = _Rows(self.live, logits.shape[-1], self.packed)
        chosen = self._rows.choose(logits)
        self._next_tokens = chosen.tokens
        self._accept(0, chosen)
        seconds = clock(self.packed.device) - start
        self.stats.decode_seconds += seconds
        if self.stats.each_step is not None:
            self.stats.each_step.append(seconds)

    def _accept(self, first: int, chosen: Chosen) -> None:
        """Give each sample from row `first` on its token; retire those that end with it."""
        ended: list[tuple[int, FinishReason]] = []
        tops: Sequence[list[tuple[int, float]]] = [[]] * (len(self.live) - first)
        if chosen.top is not None:
            ids, values = (x.tolist() for x in chosen.top)
            tops = [list(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]
        rows = zip(
            self.live[first:], chosen.tokens.tolist(), chosen.logprobs.tolist(), tops, strict=True
        )
        for row, (sample, token, logprob, top) in enumerate(rows, first):
            completion = sample.completion
            if logprob != logprob:  # NaN: the logits are
                sample.handle.error = NotFiniteError(NOT_FINITE)
                sample.handle.cancel()  # its other samples, too
                self.stats.not_finite += 1
                ended.append((row, "cancelled"))
                continue
            if sample.params.logprobs:
                completion.top_logprobs.append(top[: sample.params.logprobs])
            completion.logprobs.append(logprob)
            completion.token_ids.append(token)
            if sample.thought is not None:
                sample.thought.push(token)
            if token in sample.params.stop_token_ids or _stops(sample, token):
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
            self._rows = self._next_tokens = None
        for sample, reason in gone:
            sample.finish(reason)

    def _read_prompts(self) -> None:
        """Fill free rows: all of them where none decodes, else as far as one chunk goes."""
        budget = self.chunk_tokens if self.live else None
        start = clock(self.packed.device)
        while budget is None or budget > 0:
            if self._prefill is None and not self._admit():
                return
            if self._prefill is not None:
                read = self._advance(self._prefill, budget or PREFILL_TOKENS)
                budget = None if budget is None else budget - read
            now = clock(self.packed.device)
            self.stats.prefill_seconds += now - start
            start = now

    def _advance(self, prefill: Prefill, budget: int) -> int:
        """Read on; tokens of the pass, padding included."""
        before = prefill.done
        self.stats.prefill_tokens += prefill.advance(budget)
        if prefill.finished:
            samples, self._prefill, self._reading = self._reading, None, []
            prefix = prefill.prefix()
            if self.prefixes is not None:
                for row, prompt in enumerate(prefill.prompts):
                    self.prefixes.add(prompt, prefix, row)
            self._join(samples, prefill.prompts, prefix)
        return (prefill.done - before) * len(prefill.lengths)

    def _admit(self) -> bool:
        """Whether some of those that wait were admitted: they are read, or have been already."""
        group = self.waiting.take(self._admissible())
        if not group:
            return False
        prompts = list({id(sample.tokens): sample.tokens for sample in group}.values())
        if self._last_read is not None and self._last_read[0] is prompts[0]:
            self._join(group, prompts, self._last_read[1])
            return True
        self._last_read = None
        past = self.prefixes.find(prompts[0]) if self.prefixes is not None else None
        if past is not None:
            self.stats.cached_tokens += past.lengths[0]
        self._prefill, self._reading = Prefill(self.packed, prompts, past), group
        return True

    def _join(
        self, samples: list[Sample], prompts: Sequence[Sequence[int]], prefix: Prefix
    ) -> None:
        """Rows and first tokens for samples whose prompts were read; those behind may need it."""
        place = {id(prompt): row for row, prompt in enumerate(prompts)}
        self._last_read = None
        behind = self.waiting.first(1)
        if behind and behind[0].tokens is prompts[-1]:
            self._last_read = prompts[-1], prefix.take(len(prompts) - 1)
        source, first = [place[id(sample.tokens)] for sample in samples], len(self.live)
        self.slots.place(prefix, source)
        self.live += samples
        for sample in samples:
            if not sample.completion.token_ids:
                sample.completion.version = self.version
            params = sample.params
            if params.temperature > 0 and not sample.noise:
                sample.noise = uniforms(params.seed, sample.handle.key, sample.index, sample.limit)
        self._rows = self._next_tokens = None
        rows = _Rows(samples, prefix.logits.shape[-1], self.packed)
        self._accept(first, rows.choose(prefix.logits[source]))

    def _admissible(self) -> int:
        """How many of those that wait are admitted now, as one group; 0 for none yet.

        A few at a time: a pass over one prompt costs nearly that over several.
        """
        live, waiting, slots = self.live, len(self.waiting), self.slots
        rows = min(self.max_batch_size, len(live) + waiting)
        free = self.max_batch_size - len(live)
        if not waiting or free < min(waiting, max(1, rows // 8)):
            return 0
        group = self.waiting.first(free)
        group = group[: self._together([sample.tokens for sample in group])]
        if self.max_tokens is not None:
            longest = max(sample.longest for sample in (*live, *group))
            rows = max(1, min(rows, self.max_tokens // longest))
        group = group[: max(0, rows - len(live))]
        if not group:
            return 0
        longest = max(len(sample.tokens) for sample in group)
        if live:
            if rows > slots.rows:  # one row more at a time would move them all each time
                rows = min(self.max_batch_size, max(rows, 2 * slots.rows))
            slots.reserve(rows, longest)
        else:
            room = max(256, longest)
            slots.reserve(rows, max(min(one.longest, len(one.tokens) + room) for one in group))
        return len(group)

    def _together(self, prompts: list[Sequence[int]]) -> int:
        """How many of the first prompts share a pass, or what was read before."""
        first = prompts[0]
        same = sum(1 for _ in takewhile(lambda prompt: prompt is first, prompts))
        if self._last_read is not None and self._last_read[0] is first:
            return same
        count = similar([len(prompt) for prompt in prompts])
        if self.prefixes is None:
            return count
        if self.prefixes.find(first) is not None:
            return same
        # A prompt that begins like the first waits for it, and then finds that in the cache.
        other = takewhile(lambda p: p is first or 2 * common(first, p) < len(p), prompts[:count])
        return sum(1 for _ in other)


def _stops(sample: Sample, token: int) -> bool:
    """Whether the sample's grammar or criterion ends it. One that fails harms no other sample."""
    try:
        if sample.grammar is not None and sample.grammar.push(token):
            return True
        return sample.stopping is not None and sample.stopping(token)
    except Exception as error:  # noqa: BLE001 - the caller's code; its handle raises the error
        sample.handle.error = error
        return True


def similar(lengths: Sequence[int]) -> int:
    """How many of the first lengths share a pass: similar, and few enough tokens."""
    least = most = lengths[0]
    for i, length in enumerate(lengths):
        least, most = min(least, length), max(most, length)
        if least < SIMILAR * most or (i and (i + 1) * most > PREFILL_TOKENS):
            return i
    return len(lengths)
