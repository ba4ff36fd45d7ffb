"""Prompts on their way into the cache: read in chunks, alone or several of similar length.

    a pass:   past (0 … start) | chunk (start … end)        of every prompt, padded at the end

A chunk's queries see the past and, causally, the chunk, so the cut changes nothing but when the
work is done: between two chunks the engine decodes. What was read is a `Prefix`; `PrefixCache`
keeps some, for later prompts that begin alike.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.generate.packed import Packed, Turn
from tessera.model.context import Context

SHARED = 16  # tokens that prompts must have in common for the cache to be worth a copy


@dataclass
class Prefix:
    """Prompts read but not yet placed: kv `(N,T,2,K,D)` a layer, and the logits `(N,V)` behind.

    Prompts stand at the left; behind a shorter one is padding nobody reads.
    """

    lengths: list[int]
    layers: dict[int, Tensor]
    logits: Tensor

    def take(self, row: int) -> Prefix:
        """One prompt alone, in memory of its own."""
        length, one = self.lengths[row], slice(row, row + 1)
        layers = {layer: kv[one, :length].clone() for layer, kv in self.layers.items()}
        return Prefix([length], layers, self.logits[one].clone())


class Prefill:
    """A pass over columns `start … start + width` of N sequences.

    layers: KV `(N,T,2,K,D)` a layer, of which the past is read and the chunk written. `keep` says
    whether to hold the KV where no `layers` are given.
    """

    def __init__(
        self,
        packed: Packed,
        rows: int,
        width: int,
        keep: bool,
        start: int = 0,
        layers: dict[int, Tensor] | None = None,
    ) -> None:
        self.shape, self.keep, self.start = (rows, width), keep, start
        positions = torch.arange(start, start + width, device=packed.device)
        self.turn: Turn = packed.turn(positions)
        self.mask = _mask(start, positions, packed.config.sliding_window)
        self.given, self.layers = layers is not None, layers or {}

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        kv = kv.unflatten(0, self.shape)
        if self.given:
            end = self.start + self.shape[1]
            self.layers[layer][:, self.start : end] = kv
            kv = self.layers[layer][:, :end]
        elif self.keep:
            self.layers[layer] = kv
        k, v = kv.unbind(2)
        out = F.scaled_dot_product_attention(
            q.flatten(1, 2).unflatten(0, self.shape).transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=self.mask,
            is_causal=self.mask is None,
            scale=1.0,
            enable_gqa=q.shape[2] > 1,
        )
        return out.transpose(1, 2).reshape(q.shape[0], -1)


def _mask(start: int, positions: Tensor, window: int | None) -> Tensor | None:
    """What rows at `positions` see of all columns up to the last; None where order decides."""
    if start == 0:
        return Context(positions, sliding_window=window).sliding_mask(len(positions))
    distance = positions[:, None] - torch.arange(start + len(positions), device=positions.device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


class Reading:
    """Prompts that are being read. past: what is known of the only prompt's first tokens."""

    def __init__(
        self, packed: Packed, prompts: Sequence[Sequence[int]], past: Prefix | None = None
    ) -> None:
        self.packed = packed
        self.lengths = [len(prompt) for prompt in prompts]
        self.tokens = padded(prompts, packed.device)
        self.done = 0
        self.layers: dict[int, Tensor] | None = None
        self.last = torch.empty(0)
        if past is not None:
            assert len(prompts) == 1 and past.lengths[0] < self.lengths[0]
            self.done = past.lengths[0]
            self._allocate(past.layers)

    @property
    def finished(self) -> bool:
        return self.done == self.tokens.shape[1]

    def advance(self, budget: int) -> int:
        """Read about `budget` tokens more, padding included; how many prompt tokens that were."""
        rows, longest = self.tokens.shape
        start, width = self.done, min(longest - self.done, max(1, budget // rows))
        if width < longest and self.layers is None:
            self._allocate()
        step = Prefill(self.packed, rows, width, True, start, self.layers)
        hidden = self.packed.forward(self.tokens[:, start : start + width].flatten(), step)
        self._keep_last(hidden.unflatten(0, (rows, width)), start)
        self.layers = step.layers
        self.done += width
        return sum(min(length, self.done) - min(length, start) for length in self.lengths)

    def _keep_last(self, hidden: Tensor, start: int) -> None:
        """Of each prompt that ends in this chunk, the hidden state of its last token."""
        if not self.last.numel():
            self.last = hidden.new_empty(len(self.lengths), hidden.shape[-1])
        width = hidden.shape[1]
        ends = [i for i, n in enumerate(self.lengths) if start < n <= start + width]
        if ends:
            self.last[ends] = hidden[ends, [self.lengths[i] - 1 - start for i in ends]]

    def prefix(self) -> Prefix:
        """What was read, once `finished`."""
        assert self.finished and self.layers is not None
        return Prefix(self.lengths, self.layers, self.packed.logits(self.last))

    def _allocate(self, past: dict[int, Tensor] | None = None) -> None:
        """Room for the KV of all that is to be read."""
        self.layers = {}
        for layer, heads in self.packed.kv_heads.items():
            shape = (*self.tokens.shape, 2, heads, self.packed.config.head_dim)
            self.layers[layer] = torch.empty(
                shape, dtype=self.packed.dtype, device=self.packed.device
            )
            if past is not None:
                self.layers[layer][:, : self.done] = past[layer]


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Tokens `(N,T)`, zeros behind the shorter rows."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    for i, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return i
    return min(len(a), len(b))


class PrefixCache:
    """KV of prompts read lately, at most `max_tokens` of them; the longest unused goes first."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._held: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()

    def find(self, prompt: Sequence[int]) -> Prefix | None:
        """KV of as much of the prompt as is known, always short of its last token."""
        best = max(self._held, key=lambda known: common(known, prompt), default=())
        length = min(common(best, prompt), len(prompt) - 1)
        if length < SHARED:
            return None
        self._held.move_to_end(best)
        held = self._held[best]
        layers = {layer: kv[:, :length] for layer, kv in held.layers.items()}
        return Prefix([length], layers, held.logits)

    def add(self, prompt: Sequence[int], prefix: Prefix, row: int) -> None:
        """Hold prompt `row` of `prefix`; what it continues is no longer held apart."""
        if not SHARED <= len(prompt) <= self.max_tokens:
            return
        tokens = tuple(prompt)
        for known in [k for k in self._held if tokens[: len(k)] == k]:
            del self._held[known]
        self._held[tokens] = prefix.take(row)
        while sum(map(len, self._held)) > self.max_tokens:
            self._held.popitem(last=False)

    def clear(self) -> None:
        self._held.clear()
