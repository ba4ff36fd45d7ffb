"""The batch, the shift and the packing.

A document is its ids d_0 … d_n and holds n predictions: tokens = d[:-1], labels = d[1:]. This file
is the only one that shifts. Everywhere else index t of a per-token stream describes the
prediction of `labels[t]`.

Rows are filled best-fit: each sample into the row whose free space it leaves smallest, the longest
first unless rows are much longer than samples. Samples never cross rows; one that is longer than
a row was cut before, in chunks that share one id (the label of the first is the first token of
the second), so that every prediction is made exactly once. Attention stays inside a document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tessera import dist
from tessera.model.context import Part
from tessera.model.placement import Layout

Ids = NDArray[np.integer[Any]]
# Plain documents; chats whose reasoning is off, and on; the trained part of a plain document.
TEXT, OFF, ON, PLAIN = 0, 1, 2, 3


@dataclass(slots=True)
class Batch:
    """One microbatch; all tensors (B, T).

    tokens, labels: ids, `labels[t]` is the token after `tokens[t]`.
    weight: float ≥ 0 of each prediction; 0 = not trained.
    positions: 0, 1, 2 … in every document.
    segments: document number within the row, 0, 1, 2 …; -1 = padding.
    mode: TEXT, OFF or ON, what kind of document each is of; None where all are TEXT.
    prefix: the segment whose tokens stand before each token's own, -1 for none: several answers
    to one prompt, whose positions go on from the prompt's; None where there are none.
    streams: more per-token numbers, by name, for objectives that ask for them.
    part: of which rows these tokens are a part; None for whole rows.
    """

    tokens: Tensor
    labels: Tensor
    weight: Tensor
    positions: Tensor
    segments: Tensor
    mode: Tensor | None = None
    prefix: Tensor | None = None
    streams: dict[str, Tensor] = field(default_factory=dict)
    part: Part | None = None

    @property
    def num_tokens(self) -> int:
        """Positions that are not padding."""
        return int((self.segments >= 0).sum())

    def each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch of what `function` makes of each tensor."""

        def made(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: function(one) for key, one in value.items()}
            if isinstance(value, Part):
                return value.each(function)
            return None if value is None else function(value)

        return Batch(**{f.name: made(getattr(self, f.name)) for f in fields(self)})

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        ahead = dist.copies_ahead(torch.device(device))
        return self.each(lambda tensor: tensor.to(device, non_blocking=ahead))

    def shared(self, layout: Layout) -> Batch:
        """This process's part of rows that its context group has in common; else the batch itself.

        Rows are padded to a length that divides.
        """
        if layout.context == 1:
            return self
        mesh = layout.context_mesh()
        missing = -self.tokens.shape[1] % (2 * mesh.size())
        rows = self.each(lambda tensor: F.pad(tensor, (0, missing)))
        rows.segments = F.pad(self.segments, (0, missing), value=-1)
        part = Part(mesh, rows.positions, rows.segments, rows.prefix)
        own = rows.each(lambda tensor: torch.cat([tensor[:, a:b] for a, b in part.spans], 1))
        own.part = part
        return own

    def summed(self, value: Tensor) -> Tensor:
        """What parts of rows add up to, in every process of them; without a gradient."""
        if self.part is None:
            return value
        total = value.detach().clone()
        torch.distributed.all_reduce(total, group=self.part.mesh.get_group())
        return total


class Source(Protocol):
    """Where a trainer gets its batches.

    `batches(step)` gives this rank's microbatches of one optimizer step. Every rank gets equally
    many; a rank with less to do gets rows of weight 0.
    """

    def batches(self, step: int) -> list[Batch]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class MeasuredSource(Protocol):
    """A source that makes its batches itself and measures how that went.

    metrics: numbers for metrics.jsonl, the same in every process. timings: seconds.
    """

    def metrics(self) -> dict[str, float]: ...
    def timings(self) -> dict[str, float]: ...


@dataclass(frozen=True, slots=True)
class Sample:
    """What stands in a row as one segment: three aligned (n,) arrays, and its mode."""

    tokens: Ids
    labels: Ids
    weight: NDArray[np.float32]
    mode: int = TEXT

    def __len__(self) -> int:
        return len(self.tokens)


def shift(
    ids: Ids | Sequence[int],
    weight: Sequence[float] | NDArray[Any] | None = None,
    mode: int = TEXT,
) -> Sample:
    """The sample of n + 1 ids: n predictions.

    weight: (n + 1,), one an id: how much the prediction *of* that id counts; the first is unused.
    """
    array = np.asarray(ids)
    trained = np.ones(len(array), np.float32) if weight is None else np.asarray(weight, np.float32)
    if len(trained) != len(array):
        raise ValueError(f"{len(trained)} weights for {len(array)} ids; give one for each id")
    return Sample(array[:-1], array[1:], trained[1:], mode)


def chunks(num_ids: int, sequence_length: int) -> list[tuple[int, int]]:
    """Spans [start, stop) of ids whose shifted samples hold each prediction exactly once."""
    starts = range(0, num_ids - 1, sequence_length)
    return [(start, min(start + sequence_length + 1, num_ids)) for start in starts]


def best_fit(
    lengths: Sequence[int] | Ids, sequence_length: int, longest_first: bool = True
) -> list[list[int]]:
    """Rows of sample indices, no row longer than `sequence_length`. Deterministic.

    `longest_first` fills best where samples are nearly as long as rows, and puts samples of one
    length together; without it rows mix whatever the given order mixes.
    `free` has bit s set while a row with s free places exists, so the smallest sufficient space
    is the lowest set bit at or above the sample's length.
    """
    rows: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(sequence_length + 1)]
    free = 0
    order = -np.asarray(lengths, np.int64) if longest_first else np.zeros(len(lengths))
    for index in np.argsort(order, kind="stable").tolist():
        length = int(lengths[index])
        if not 0 < length <= sequence_length:
            raise ValueError(
                f"a sample of {length} tokens cannot stand in a row of {sequence_length}"
            )
        above = free >> length
        if above:
            space = length + (above & -above).bit_length() - 1
            row = by_space[space].pop()
            free &= ~(1 << space) if not by_space[space] else -1
        else:
            space, row = sequence_length, len(rows)
            rows.append([])
        rows[row].append(index)
        by_space[space - length].append(row)
        free |= 1 << (space - length) if space > length else 0
    return rows


def fill(lengths: Sequence[int] | Ids, sequence_length: int) -> float:
    """Share of a packing's positions that hold tokens, for samples of these lengths."""
    rows = best_fit(lengths, sequence_length)
    return float(np.sum(lengths)) / (len(rows) * sequence_length) if rows else 0.0


def collate(rows: Sequence[Sequence[Sample]], sequence_length: int, pad_id: int) -> Batch:
    """The batch of given rows: B = len(rows), T = sequence_length. An empty row is all padding."""
    shape = (len(rows), sequence_length)
    tokens, labels = np.full(shape, pad_id, np.int64), np.full(shape, pad_id, np.int64)
    weight, segments = np.zeros(shape, np.float32), np.full(shape, -1, np.int64)
    positions, mode = np.zeros(shape, np.int64), np.full(shape, TEXT, np.int8)
    for b, row in enumerate(rows):
        end = 0
        for segment, sample in enumerate(row):
            start, end = end, end + len(sample)
            tokens[b, start:end], labels[b, start:end] = sample.tokens, sample.labels
            weight[b, start:end], segments[b, start:end] = sample.weight, segment
            positions[b, start:end], mode[b, start:end] = np.arange(len(sample)), sample.mode
        positions[b, end:] = np.arange(sequence_length - end)
    arrays = map(torch.from_numpy, (tokens, labels, weight, positions, segments))
    return Batch(*arrays, mode=torch.from_numpy(mode) if mode.any() else None)


def pack(
    documents: Iterable[Ids | Sequence[int]], sequence_length: int, *, pad_id: int = 0
) -> Batch:
    """All predictions of all documents in one batch, packed best-fit."""
    samples = [
        shift(np.asarray(document)[start:stop])
        for document in documents
        for start, stop in chunks(len(document), sequence_length)
    ]
    rows = best_fit([len(sample) for sample in samples], sequence_length)
    return collate([[samples[i] for i in row] for row in rows], sequence_length, pad_id)
