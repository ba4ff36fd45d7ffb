"""The live rows of an engine: what each is to do next, and what it has been given.

Row i of the `Slots` belongs to `live[i]`. Parameters, noise and seen tokens of all rows become
tensors once and stand until the rows change; choosing a token for every row is then the same few
kernels whatever the rows ask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.generate.cache import Slots
from tessera.generate.engine import FinishReason
from tessera.generate.packed import Packed
from tessera.generate.reading import Prefix
from tessera.generate.requests import Sample
from tessera.generate.sampling import Choice, Plan, choose, uniforms


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
