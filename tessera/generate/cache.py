"""Where generation remembers: a KV cache whose rows all end at the same column.

    row 0   . . p p p p g g g |          p prompt, g generated, . nothing (masked)
    row 1   . . . . . p p g g |          | the cursor: where every row writes next
    row 2   p p p p p p p p g |

Ending together, rows of any age write with one slice copy instead of a scatter, a sliding
window is the same columns for all of them, and with equal starts no mask is needed. A prompt
longer than the cursor moves the live rows right. Live rows are a prefix of the slots. A layer
without attention has no entry.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.generate.packed import Packed, Turn
from tessera.generate.reading import Prefix


class Decode:
    """A pass over one token a live row, at the cursor."""

    def __init__(self, slots: Slots, packed: Packed) -> None:
        self.caches, self.rows, self.cursor = slots.caches, len(slots.starts), slots.cursor
        window = packed.config.sliding_window or self.cursor + 1
        self.low = max(min(slots.starts), self.cursor + 1 - window)
        assert slots.row_starts is not None
        self.turn: Turn = packed.turn(self.cursor - slots.row_starts)
        self.mask = None
        if slots.mask is not None:
            self.mask = slots.mask[:, None, None, self.low : self.cursor + 1]

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        new_k, new_v = kv.unbind(1)
        keys, values = self.caches[layer]
        k, v = self._past(keys, new_k), self._past(values, new_v)
        return attend_few(q, k, v, self.mask).view(self.rows, -1)

    def _past(self, cache: Tensor, new: Tensor) -> Tensor:
        """`new` `(B,K,D)` written at the cursor; what a live row sees, `(B,K,D,S)`."""
        live = cache.narrow(0, 0, self.rows)
        live.select(3, self.cursor).copy_(new)
        return live.narrow(3, self.low, self.cursor + 1 - self.low)


def attend_few(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """A group's queries over the whole past. q `(B,K,G,D)`, k and v `(B,K,D,S)` -> `(B,K,G,D)`.

    The queries of a group stand where products expect query positions, so KV heads are never
    repeated. In float32 two batched products take 0.66 to 0.87 of SDPA's time from 8 rows on (CPU,
    3 us more at one); in half precision SDPA keeps the softmax in float32. mask `(B,1,1,S)`.
    """
    if q.dtype != torch.float32:
        k, v = k.transpose(2, 3), v.transpose(2, 3)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return out.contiguous()
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1)).view(*q.shape[:3], -1)
    if mask is not None:
        scores += mask
    values = v.flatten(0, 1).transpose(1, 2)
    return torch.bmm(scores.softmax(-1).flatten(0, 1), values).view_as(q)


class Slots:
    """Keys and values `(slots, K, D, columns)` of layers with attention, and who lives in them.

    In memory values are `(slots, K, columns, D)`, so that both products of attention read rows
    (keys in that order cost a fifth more); keys are too where SDPA wants them so.
    """

    def __init__(self, packed: Packed, max_tokens: int | None = None) -> None:
        """max_tokens: rows times columns held at most, where the live rows leave the choice."""
        config = packed.config
        self.max_tokens = max_tokens
        self.dim, self.dtype, self.device = config.head_dim, packed.dtype, packed.device
        self.heads = packed.kv_heads
        self.caches: dict[int, tuple[Tensor, Tensor]] = {}
        self.rows = self.columns = self.cursor = 0
        self.clear()

    def clear(self) -> None:
        """Forget all rows; the memory stays for the next."""
        self.cursor = 0
        self.starts: list[int] = []
        self._rows_changed()

    def free(self) -> None:
        """Forget all rows and give their memory back."""
        self.clear()
        self.caches.clear()
        self.rows = self.columns = 0

    def reserve(self, rows: int, columns: int) -> None:
        """Room for this many rows and columns, live ones included.

        It shrinks in one direction only where it must grow in the other and both are too much.
        """
        if rows <= self.rows and columns <= self.columns:
            return
        low = min(self.starts, default=self.cursor)
        columns = max(columns, self.cursor - low)
        more = max(rows, self.rows), max(columns, self.columns)
        if self.max_tokens is not None and more[0] * more[1] > self.max_tokens:
            more = max(rows, len(self.starts)), columns
        self._move(low, 0, more)

    def num_bytes(self) -> int:
        """Bytes held, over all layers."""
        return sum(cache.numel() * cache.element_size() for cache in self._tensors())

    def place(self, prefix: Prefix, source: list[int]) -> None:
        """New rows behind the live ones; row i gets prompt `source[i]` of `prefix`."""
        lengths = [prefix.lengths[i] for i in source]
        longest, first = max(lengths), len(self.starts)
        if not first:
            self.cursor = longest
        elif longest > self.cursor:
            low = min(self.starts)
            self._move(low, longest - (self.cursor - low))
        assert longest <= self.cursor <= self.columns and first + len(source) <= self.rows
        moved = _right_aligned(lengths, source, max(prefix.lengths), self.device)
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
            for cache in self._tensors():
                past = cache.narrow(3, first, self.cursor - first)
                past[row] = past[last]
            self.starts[row] = first
        self.starts.pop()
        self._rows_changed()

    def step(self, packed: Packed) -> Decode:
        """The pass that feeds the next token of every live row; moves the cursor."""
        if self.cursor == self.columns:
            self._make_room()
        if self.row_starts is None:
            self._prepare_rows()
        decode = Decode(self, packed)
        self.cursor += 1
        return decode

    def _rows_changed(self) -> None:
        self.row_starts: Tensor | None = None
        self.mask: Tensor | None = None

    def _prepare_rows(self) -> None:
        self.row_starts = torch.tensor(self.starts, device=self.device)
        if min(self.starts) < max(self.starts):
            past = torch.arange(self.columns, device=self.device) < self.row_starts[:, None]
            mask = torch.zeros(past.shape, dtype=self.dtype, device=self.device)
            self.mask = mask.masked_fill_(past, float("-inf"))

    def _make_room(self) -> None:
        """Move the rows left over columns nobody uses any more; grow where that frees little."""
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
        width = self.cursor - low
        for layer, heads in self.heads.items():
            old = self.caches.get(layer, ())
            if size is not None:
                self.caches[layer] = self._fresh(size[0], heads, size[1])
            live = len(self.starts)
            for cache, new in zip(old, self.caches[layer], strict=False):
                past = cache[:live, ..., low : self.cursor]
                new[:live, ..., to : to + width] = past.clone() if new is cache else past
        if size is not None:
            self.rows, self.columns = size
        self.cursor += to - low
        self.starts = [start + to - low for start in self.starts]
        self._rows_changed()

    def _fresh(self, rows: int, heads: int, columns: int) -> tuple[Tensor, Tensor]:
        # Zeros: a masked column is multiplied by 0, which a stray NaN would survive.
        shape = (rows, heads, columns, self.dim)
        keys, values = (
            torch.zeros(shape, dtype=self.dtype, device=self.device).transpose(2, 3)
            for _ in range(2)
        )
        if self.dtype == torch.float32:
            keys = keys.contiguous()
        return keys, values

    def _tensors(self) -> Iterator[Tensor]:
        return itertools.chain.from_iterable(self.caches.values())


def _right_aligned(
    lengths: list[int], source: list[int], width: int, device: torch.device
) -> Tensor:
    """Which of a `Prefix`'s `(N * width)` tokens stand where, once prompts end at the right."""
    behind = max(lengths) - torch.tensor(lengths, device=device)
    columns = torch.arange(max(lengths), device=device) - behind[:, None]
    first = torch.tensor(source, device=device)[:, None] * width
    return (first + columns.clamp_(min=0)).flatten()
