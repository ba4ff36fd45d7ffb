"""All attention kernels, and which of them runs where.

    NVIDIA from Ampere, half precision    flash attention over runs (torch.nn.attention.varlen)
    CPU, bfloat16                         `cpu.attention` over runs of similar length, a row each
    every other device and precision      SDPA over the same

A run is consecutive tokens of one document, with the earlier tokens that they see: of a packed row
its documents; of answers that share a prompt each with the prompt before it; of a part of a row
(context parallelism) what of each document lies in it, with the document's beginning before it.
Both kernels' memory is linear in the tokens: nothing holds a (T, T) mask of a long row.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from tessera.model.context import Context, Part, zigzag
from tessera.model.cpu import attention, by_tiles

MASK = 2**22  # elements of a mask that may be there at once
FEWEST = 256  # queries that share a mask: fewer would make products too small


def has_flash(q: Tensor) -> bool:
    """Whether flash attention over runs takes these queries; ROCm's was never tried."""
    return (
        q.device.type == "cuda"
        and torch.version.hip is None
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def attend(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
    """Causal attention inside each document. q `(B,T,H,D)`, k and v `(B,T,K,D)` -> `(B,T,H,D)`."""
    flash, part = has_flash(q), context.part
    if part is None and (context.segments is None or (not flash and context.simple)):
        return attend_last(q, k, v, context.sliding_window)
    if flash not in context.plans:
        context.plans[flash] = (_Sequences if flash else _Rows).of(context)
    plan: _Sequences | _Rows = context.plans[flash]
    k, v = (x.flatten(0, 1) for x in (k, v)) if part is None else _all_parts(k, v, part)
    out = plan.attend(q.flatten(0, 1), k, v, context.sliding_window)
    return out.unflatten(0, context.positions.shape)


def attend_last(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None = None
) -> Tensor:
    """Causal attention of a row's last T tokens. q `(B,T,H,D)`, k and v `(B,S,K,D)` -> as q."""
    rows, count, length = len(q), q.shape[1], k.shape[1]
    if has_flash(q):
        ends = (torch.arange(rows + 1, device=q.device, dtype=torch.int32) for _ in range(2))
        queries, keys = (end * size for end, size in zip(ends, (count, length), strict=True))
        plan = _Sequences(None, queries, keys, count, length)
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return plan.attend(q, k, v, window, scale).unflatten(0, (rows, count))
    if count == length and (window is None or length <= window):
        return _sdpa(q, k, v, None, scale)

    def seen(queries: slice, keys: slice) -> Tensor:
        own = torch.arange(queries.start, queries.stop, device=q.device) + (length - count)
        distance = own[:, None] - torch.arange(keys.start, keys.stop, device=q.device)
        return (distance >= 0) & (distance < (window or length))

    return _masked(q, k, v, seen, window=window, scale=scale)


def decodes_by_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `attend_decode` is two batched products, which read keys in the order (D, S)."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and device.type == "cpu")


def attend_decode(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Queries over the whole past: q `(B,K,G,D)`, k, v `(B,K,D,S)`, mask `(B,1,1,S)` -> as q.

    The queries of a group stand where query positions do, so KV heads are never repeated. On a CPU
    two batched products take 0.66 to 0.87 of SDPA's time in float32 from 8 rows on (3 us more at
    one), and 0.45 in bfloat16; in half precision SDPA rounds the scores less.
    """
    if not decodes_by_products(q.device, q.dtype):
        k, v = k.transpose(2, 3), v.transpose(2, 3)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return out.contiguous()
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1)).view(*q.shape[:3], -1)
    if mask is not None:
        scores += mask
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1).transpose(1, 2)).view_as(q)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    if by_tiles(q):
        return attention(q, k, v, mask, scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.device.type != "cpu":
        # SDPA's memory-efficient kernel, for float32 and masks, wants as many KV heads as query
        # heads, and without it SDPA would hold all scores.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        grouped = False
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)


# (queries, keys) -> which of those keys each of those queries sees, `(…, queries, keys)`
Seen = Callable[[slice, slice], Tensor]


def _masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Seen,
    *,
    rows: int = 1,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of the last of the keys' tokens, in portions of queries where masks are large.

    A portion's mask is made again in the backward pass. rows: of a mask. window: how far back a
    query sees, if that is known from the order of the keys.
    """
    count, length = q.shape[1], k.shape[1]
    if rows * count * length <= MASK:
        return _sdpa(q, k, v, seen(slice(0, count), slice(0, length)), scale)
    most = max(window, FEWEST) if window else length
    size = min(most, max(FEWEST, MASK // (rows * min(length, 2 * most))))

    def portion(start: int) -> Tensor:
        stop = min(start + size, count)
        first = max(0, length - count + start + 1 - window) if window else 0
        queries, keys = slice(start, stop), slice(first, length - count + stop)
        return _sdpa(q[:, queries], k[:, keys], v[:, keys], seen(queries, keys), scale)

    starts = range(0, count, size)
    if not torch.is_grad_enabled():
        return torch.cat([portion(start) for start in starts], 1)
    again = [checkpoint(portion, s, use_reentrant=False, preserve_rng_state=False) for s in starts]
    return torch.cat(again, 1)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Run:
    """Own tokens [start, end) of the flattened `(B*T)`; their keys begin at `key` of the flattened
    whole rows, and see those of `before`, in order, too."""

    start: int
    end: int
    key: int
    before: tuple[range, ...]

    def keys(self) -> list[range]:
        return [*self.before, range(self.key, self.key + self.end - self.start)]


def _runs(context: Context) -> list[_Run]:
    """The runs of a context, in the order of its tokens."""
    whole = context.part or context
    assert whole.segments is not None
    rows, length = whole.segments.shape
    spans = context.part.spans if context.part else [(0, length)]
    segments = whole.segments.flatten()
    change = torch.ones_like(segments, dtype=torch.bool)
    change[1:] = segments[1:] != segments[:-1]
    change[::length] = True
    begins = change.nonzero().flatten()
    numbers = segments[begins].tolist()
    none = [-1] * len(numbers)
    prefixes = none if whole.prefix is None else whole.prefix.flatten()[begins].tolist()
    starts = begins.tolist()
    ends = [*starts[1:], rows * length]
    known = {(s // length, n): range(s, e) for s, e, n in zip(starts, ends, numbers, strict=True)}
    found, at = [], 0
    for first, last in ((r * length + a, r * length + b) for r in range(rows) for a, b in spans):
        document = bisect_right(starts, first) - 1
        key = first
        while key < last:
            start, stop = starts[document], min(ends[document], last)
            before: list[range] = []
            if numbers[document] >= 0:  # what padding sees, nobody reads
                if prefixes[document] >= 0:
                    before.append(known[start // length, prefixes[document]])
                before.append(range(start, key))
            found.append(_Run(at, at + stop - key, key, _last(before, context.sliding_window)))
            at, key, document = at + stop - key, stop, document + 1
    return found


def _last(before: Sequence[range], window: int | None) -> tuple[range, ...]:
    """The tokens that are not too far back for the one behind them."""
    left, kept = sum(map(len, before)) if window is None else window - 1, []
    for span in reversed(before):
        kept.append(span[max(0, len(span) - left) :])
        left -= len(kept[-1])
    return tuple(span for span in reversed(kept) if span)


def _indices(spans: Sequence[range]) -> Tensor:
    return torch.cat([torch.arange(s.start, s.stop) for s in spans or [range(0)]])


def _places(index: Tensor, context: Context) -> Tensor:
    """Where tokens of the flattened whole rows are among the keys, as `_all_parts` orders them."""
    if context.part is not None:
        rows, length = context.part.segments.shape
        world = context.part.mesh.size()
        order = [torch.arange(*s) for rank in range(world) for s in zigzag(length, rank, world)]
        index = torch.cat(order).argsort()[index % length] * rows + index // length
    return index.to(context.positions.device)


def _all_parts(k: Tensor, v: Tensor, part: Part) -> tuple[Tensor, ...]:
    """`(T*B,K,D)` of whole rows from each process's part `(B,T,K,D)`; gradients are summed."""
    both = torch.cat((k, v), 2).transpose(0, 1).contiguous()
    own = DTensor.from_local(both, part.mesh, [Shard(0)], run_check=False)
    whole = own.redistribute(placements=[Replicate()])
    return whole.to_local(grad_placements=[Partial()]).flatten(0, 1).chunk(2, 1)


@dataclass(frozen=True)
class _Sequences:
    """Runs as flash attention takes them: one behind the other, with the places where they end.

    keys: the keys of all runs, None where these are the tokens themselves, in order. A run's
    queries are its last keys, so that the kernel's causal order, aligned at the end, is right.
    """

    keys: Tensor | None
    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, context: Context) -> _Sequences:
        runs = _runs(context)
        spans = [run.keys() for run in runs]
        sizes = [[r.end - r.start for r in runs], [sum(map(len, span)) for span in spans]]
        counts = torch.tensor([[0, *row] for row in sizes], dtype=torch.int32)
        ends = counts.cumsum(1, dtype=torch.int32).to(context.positions.device)
        plain = context.part is None and not any(run.before for run in runs)
        keys = None if plain else _places(_indices(sum(spans, [])), context)
        return cls(keys, ends[0], ends[1], max(sizes[0]), max(sizes[1]))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None = None
    ) -> Tensor:
        if self.keys is not None:
            k, v = k[self.keys], v[self.keys]
        found = varlen_attn(
            q,
            k,
            v,
            self.query_ends,
            self.key_ends,
            self.most_queries,
            self.most_keys,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=q.shape[1] != k.shape[1],
        )
        assert isinstance(found, Tensor)
        return found


@dataclass(frozen=True)
class _Group:
    """Runs of similar length as rows, padded at the end.

    queries: `(N, T)` into the own tokens. keys: `(N, P + T)` into all keys, what stands before each
    run, padded, and the run. positions: theirs. before: `(N, P)`, what is no padding of it.
    """

    queries: Tensor
    keys: Tensor
    positions: Tensor
    before: Tensor

    @classmethod
    def of(cls, runs: Sequence[_Run], context: Context) -> _Group:
        device = context.positions.device
        queries, _ = _padded([[range(run.start, run.end)] for run in runs])
        own, _ = _padded([run.keys()[-1:] for run in runs])
        before, there = _padded([run.before for run in runs])
        keys = torch.cat((before, own), 1)
        positions = (context.part or context).positions.flatten()[keys.to(device)]
        return cls(queries.to(device), _places(keys, context), positions, there.to(device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        q, k, v = _rows(q, self.queries), _rows(k, self.keys), _rows(v, self.keys)
        if not self.before.shape[1]:
            return attend_last(q, k, v, window)
        return _masked(q, k, v, lambda a, b: self._seen(a, b, window), rows=len(q))

    def _seen(self, queries: slice, keys: slice, window: int | None) -> Tensor:
        """`(N, 1, queries, keys)`: what is there of `before`, and each token's own past."""
        first, device = self.before.shape[1], self.before.device
        own = torch.arange(queries.start, queries.stop, device=device)
        past = own[:, None] >= torch.arange(keys.stop - first, device=device)
        before = self.before[:, None].expand(-1, len(own), -1)
        seen = torch.cat((before, past.expand(len(before), -1, -1)), -1)
        if window is not None:
            at = self.positions[:, first + queries.start : first + queries.stop, None]
            seen = seen & (at - self.positions[:, None, : keys.stop] < window)
        return seen[:, None]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x[index.flatten()].unflatten(0, index.shape)


@dataclass(frozen=True)
class _Rows:
    """Runs as SDPA takes them, and where each token sits in the groups' outputs together."""

    groups: tuple[_Group, ...]
    inverse: Tensor

    @classmethod
    def of(cls, context: Context) -> _Rows:
        """Those with tokens before them stand apart, behind all others."""
        runs = sorted(_runs(context), key=lambda r: (bool(r.before), r.start - r.end))
        groups, inverse = [], torch.empty(context.positions.numel(), dtype=torch.long)
        offset = 0
        for chosen in _alike(runs):
            width = chosen[0].end - chosen[0].start
            for row, run in enumerate(chosen):
                place = offset + row * width
                inverse[run.start : run.end] = torch.arange(place, place + run.end - run.start)
            groups.append(_Group.of(chosen, context))
            offset += len(chosen) * width
        return cls(tuple(groups), inverse.to(context.positions.device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        parts = [group.attend(q, k, v, window).flatten(0, 1) for group in self.groups]
        return torch.cat(parts)[self.inverse]


def _alike(runs: Sequence[_Run], slack: float = 0.75) -> Iterator[list[_Run]]:
    """Sorted runs in groups, each at least `slack` times as long as its group's longest, so that
    there are few calls of a kernel, and little padding."""
    group: list[_Run] = []
    for run in runs:
        if group and bool(run.before) == bool(group[0].before):
            if run.end - run.start >= slack * (group[0].end - group[0].start):
                group.append(run)
                continue
        if group:
            yield group
        group = [run]
    if group:
        yield group


def _padded(spans: Sequence[Sequence[range]]) -> tuple[Tensor, Tensor]:
    """A row of indices for each of the given spans, padded behind, and which are no padding."""
    rows = [_indices(row) for row in spans]
    lengths = torch.tensor([len(row) for row in rows])
    inside = torch.arange(int(lengths.max())) < lengths[:, None]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), inside
