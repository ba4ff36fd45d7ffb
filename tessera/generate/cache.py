"""Prompts that are being read (`Prefill`), and the KV cache of the rows that decode (`Slots`).

    row 0   . . p p p p g g g |          p prompt, g generated, . nothing (masked)
    row 1   . . . . . p p g g |          | the cursor: where every row writes next
    row 2   p p p p p p p p g |

All rows of `Slots` end at the same column: they write with one slice copy instead of a scatter, and
with equal starts no mask is needed. A prompt longer than the cursor moves the live rows right. Live
rows are a prefix of the slots. A layer without attention has no entry.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from tessera.generate.packed import Packed
from tessera.model.attention import attend_decode, attend_last, decodes_by_products

MIN_SHARED = 16  # tokens that prompts must have in common for the prefix cache to be worth a copy


@dataclass
class Prefix:
    """Prompts that were read: kv `(N,T,2,K,D)` a layer, padded behind, and logits `(N,V)`."""

    lengths: list[int]
    layers: dict[int, Tensor]
    logits: Tensor

    def take(self, row: int) -> Prefix:
        length, one = self.lengths[row], slice(row, row + 1)
        layers = {layer: kv[one, :length].clone() for layer, kv in self.layers.items()}
        return Prefix([length], layers, self.logits[one].clone())


class Prefill:
    """Prompts on their way into the cache, read in chunks; the cut does not change the result.

    past: the KV of the only prompt's first tokens. keep: whether the KV is kept.
    """

    def __init__(
        self,
        packed: Packed,
        prompts: Sequence[Sequence[int]],
        past: Prefix | None = None,
        keep: bool = True,
    ) -> None:
        self.packed, self.prompts, self.keep = packed, prompts, keep
        self.lengths = [len(prompt) for prompt in prompts]
        longest = max(self.lengths)
        rows = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        self.tokens = torch.tensor(rows, device=packed.device)
        self.start = self.done = 0  # columns of the current chunk
        self.layers: dict[int, Tensor] = {}
        self.last: Tensor | None = None
        if past is not None:
            self.done = past.lengths[0]
            self._allocate()
            for layer, kv in past.layers.items():
                self.layers[layer][:, : self.done] = kv

    @property
    def finished(self) -> bool:
        return self.done == self.tokens.shape[1]

    def advance(self, budget: int) -> int:
        """Read about `budget` tokens more, padding included; how many prompt tokens that were."""
        rows, longest = self.tokens.shape
        width = min(longest - self.done, max(1, budget // rows))
        hidden = self.forward(width)
        if self.last is None:
            self.last = hidden.new_empty(rows, hidden.shape[-1])
        start, end = self.start, self.done
        ends = [i for i, length in enumerate(self.lengths) if start < length <= end]
        if ends:
            self.last[ends] = hidden[ends, [self.lengths[i] - 1 - start for i in ends]]
        return sum(min(length, end) - min(length, start) for length in self.lengths)

    def forward(self, width: int) -> Tensor:
        """Hidden states `(N,width,C)` of the next `width` columns."""
        if width < self.tokens.shape[1] and not self.layers:
            self._allocate()
        start = self.start = self.done
        self.done += width
        positions = torch.arange(start, self.done, device=self.packed.device)
        self.rotation = self.packed.rotation(positions)
        hidden = self.packed.forward(self.tokens[:, start : self.done].flatten(), self)
        return hidden.unflatten(0, (-1, width))

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        shape = (len(self.lengths), self.done - self.start)
        kv = kv.unflatten(0, shape)
        if layer in self.layers:
            self.layers[layer][:, self.start : self.done] = kv
            kv = self.layers[layer][:, : self.done]
        elif self.keep:  # the whole prompts in one pass
            self.layers[layer] = kv
        own, (k, v) = q.flatten(1, 2).unflatten(0, shape), kv.unbind(2)
        out = attend_last(own, k, v, self.packed.config.sliding_window, scale=1.0)
        return out.reshape(q.shape[0], -1)

    def prefix(self) -> Prefix:
        """What was read, once `finished`."""
        assert self.last is not None
        return Prefix(self.lengths, self.layers, self.packed.logits(self.last))

    def _allocate(self) -> None:
        packed = self.packed
        for layer, heads in packed.kv_heads.items():
            shape = (*self.tokens.shape, 2, heads, packed.config.head_dim)
            self.layers[layer] = torch.empty(shape, dtype=packed.dtype, device=packed.device)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (left, right) in pairs if left != right), min(len(a), len(b)))


class PrefixCache:
    """KV of recent prompts, at most `max_tokens` of them; the least recently used goes first."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._held: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()

    def find(self, prompt: Sequence[int]) -> Prefix | None:
        """KV of as much of the prompt as is known, always short of its last token."""
        best = max(self._held, key=lambda known: common(known, prompt), default=())
        length = min(common(best, prompt), len(prompt) - 1)
        if length < MIN_SHARED:
            return None
        self._held.move_to_end(best)
        held = self._held[best]
        layers = {layer: kv[:, :length] for layer, kv in held.layers.items()}
        return Prefix([length], layers, held.logits)

    def add(self, prompt: Sequence[int], prefix: Prefix, row: int) -> None:
        """Keep prompt `row` of `prefix`, instead of the prompts that it continues."""
        if not MIN_SHARED <= len(prompt) <= self.max_tokens:
            return
        tokens = tuple(prompt)
        for known in [k for k in self._held if tokens[: len(k)] == k]:
            del self._held[known]
        self._held[tokens] = prefix.take(row)
        while sum(map(len, self._held)) > self.max_tokens:
            self._held.popitem(last=False)


class Slots:
    """Keys and values `(slots, K, D, columns)` of layers with attention, and the live rows.

    In memory values are `(slots, K, columns, D)`, so that both products of attention read rows
    (keys in that order cost a fifth more); keys are too where SDPA reads them. max_tokens: rows
    times columns held at most, as far as the live rows allow.
    """

    def __init__(self, packed: Packed, max_tokens: int | None = None) -> None:
        self.max_tokens = max_tokens
        self.dim, self.dtype, self.device = packed.config.head_dim, packed.dtype, packed.device
        self.heads = packed.kv_heads
        self.kind = self.heads, self.dim, self.dtype, self.device
        self.free()

    def free(self) -> None:
        """Forget all rows and give their memory back."""
        self.caches: dict[int, tuple[Tensor, Tensor]] = {}
        self.rows = self.columns = 0
        self.clear()

    def clear(self) -> None:
        """Forget all rows; the memory stays for the next."""
        self.cursor = 0
        self.starts: list[int] = []  # the first column of each live row
        self._rows_changed()

    def reserve(self, rows: int, columns: int) -> None:
        """Make room for this many rows and columns, live ones included; shrinks for max_tokens."""
        if rows <= self.rows and columns <= self.columns:
            return
        low = min(self.starts, default=self.cursor)
        columns = max(columns, self.cursor - low)
        more = max(rows, self.rows), max(columns, self.columns)
        if self.max_tokens is not None and more[0] * more[1] > self.max_tokens:
            more = max(rows, len(self.starts)), columns
        self._move(low, 0, more)

    def place(self, prefix: Prefix, source: list[int]) -> None:
        """New rows behind the live ones; row i gets prompt `source[i]` of `prefix`."""
        lengths = [prefix.lengths[i] for i in source]
        longest, first = max(lengths), len(self.starts)
        if not first:
            self.cursor = longest
        elif longest > self.cursor:
            low = min(self.starts)
            self._move(low, longest - (self.cursor - low))
        # Which of the prefix's (N * T) tokens stand where, once prompts end at the right.
        behind = longest - torch.tensor(lengths, device=self.device)
        columns = torch.arange(longest, device=self.device) - behind[:, None]
        begins = torch.tensor(source, device=self.device)[:, None] * max(prefix.lengths)
        moved = (begins + columns.clamp_(min=0)).flatten()
        for layer, kv in prefix.layers.items():
            rows = kv.flatten(0, 1).index_select(0, moved).unflatten(0, (len(source), longest))
            for cache, new in zip(self.caches[layer], rows.unbind(2), strict=True):
                target = cache.narrow(0, first, len(source))
                target = target.narrow(3, self.cursor - longest, longest)
                target.copy_(new.permute(0, 2, 3, 1))
        self.starts += [self.cursor - length for length in lengths]
        self._rows_changed()

    def drop(self, row: int) -> None:
        """Free a row; the last live one takes its place."""
        last = len(self.starts) - 1
        if row != last:
            first = self.starts[last]
            for cache in chain.from_iterable(self.caches.values()):
                past = cache.narrow(3, first, self.cursor - first)
                past[row] = past[last]
            self.starts[row] = first
        self.starts.pop()
        self._rows_changed()

    def decode(self, packed: Packed, tokens: Tensor) -> Tensor:
        """Hidden states `(B,C)` behind the next token of every live row; moves the cursor."""
        if self.cursor == self.columns:
            self._make_room()
        if self.row_starts is None:
            self.row_starts = torch.tensor(self.starts, device=self.device)
            if min(self.starts) < max(self.starts):
                before = torch.arange(self.columns, device=self.device) < self.row_starts[:, None]
                zeros = torch.zeros(before.shape, dtype=self.dtype, device=self.device)
                self.past = zeros.masked_fill_(before, float("-inf"))
        end = self.cursor + 1
        self.low = max(min(self.starts), end - (packed.config.sliding_window or end))
        self.rotation = packed.rotation(self.cursor - self.row_starts)
        self.mask = None if self.past is None else self.past[:, None, None, self.low : end]
        hidden = packed.forward(tokens, self)
        self.cursor = end
        return hidden

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        past = []
        for cache, new in zip(self.caches[layer], kv.unbind(1), strict=True):
            live = cache.narrow(0, 0, len(self.starts))
            live.select(3, self.cursor).copy_(new)
            past.append(live.narrow(3, self.low, self.cursor + 1 - self.low))
        k, v = past
        return attend_decode(q, k, v, self.mask).view(len(self.starts), -1)

    def _rows_changed(self) -> None:
        self.row_starts: Tensor | None = None
        self.past: Tensor | None = None  # (B, columns), added to scores; None with equal starts

    def _make_room(self) -> None:
        """Move the rows left over unused columns; grow where that frees little."""
        low = min(self.starts)
        if low >= self.columns // 8:
            self._move(low, 0)
            return
        rows, columns = self.rows, self.columns + self.columns // 2 + 16
        if self.max_tokens is not None and rows * columns > self.max_tokens:
            rows = len(self.starts)
            columns = min(columns, max(self.max_tokens // rows, self.columns - low + 1))
        self._move(low, 0, (rows, columns))

    def _move(self, low: int, to: int, size: tuple[int, int] | None = None) -> None:
        """Columns from `low` on become those from `to` on, in new caches where a size is given."""
        width, live = self.cursor - low, len(self.starts)
        for layer, heads in self.heads.items():
            old = self.caches.get(layer, ())
            if size is not None:
                # Zeros: a masked column is multiplied by 0, which a stray NaN would survive.
                shape = (size[0], heads, size[1], self.dim)
                keys, values = (
                    torch.zeros(shape, dtype=self.dtype, device=self.device).transpose(2, 3)
                    for _ in range(2)
                )
                keys = keys.contiguous() if decodes_by_products(self.device, self.dtype) else keys
                self.caches[layer] = keys, values
            for cache, new in zip(old, self.caches[layer], strict=False):
                past = cache[:live, ..., low : self.cursor]
                new[:live, ..., to : to + width] = past.clone() if new is cache else past
        if size is not None:
            self.rows, self.columns = size
        self.cursor += to - low
        self.starts = [start + to - low for start in self.starts]
        self._rows_changed()
