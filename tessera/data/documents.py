"""Prepared documents as a source of batches, in an order that is a pure function of the seed.

Epoch e is a permutation of the documents drawn from (seed, e), cut into windows of a few thousand.
A window's documents are packed into rows best-fit (batch.py) and its rows are shuffled. Rows of all
epochs form one endless list; step s takes rows s·R … (s+1)·R - 1 and rank r every `world`-th of
them. So a batch depends on (seed, step, rank) alone, and resuming needs no replay: planning a
window reads lengths, not tokens.
"""

from __future__ import annotations

import bisect
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.data.batch import Batch, Sample, best_fit, chunks, collate, shift
from tessera.data.readers import DataError
from tessera.data.store import open_tokens
from tessera.run import read_json, read_manifest

WINDOW = 4096  # documents packed together: windows of 64 lose 4 % of the fill
Span = tuple[int, int]  # ids[start:stop] of the token file: a document or a chunk of one
Row = list[Span]


def plan_rows(
    offsets: NDArray[np.int64], documents: NDArray[np.int64], sequence_length: int, row_length: int
) -> list[Row]:
    """Rows that hold all predictions of `documents`, in pieces of at most `sequence_length`.

    Rows of many pieces take them in the given, random order: a row of only the longest ones
    would be a batch of one kind of text.
    """
    spans = [
        (int(offsets[i]) + start, int(offsets[i]) + stop)
        for i in documents
        for start, stop in chunks(int(offsets[i + 1] - offsets[i]), sequence_length)
    ]
    lengths = [stop - start - 1 for start, stop in spans]
    rows = best_fit(lengths, row_length, longest_first=row_length < 4 * sequence_length)
    return [[spans[i] for i in row] for row in rows]


class Order:
    """The endless list of rows, planned a window at a time; `row(i)` in any order of i."""

    def __init__(
        self,
        offsets: NDArray[np.int64],
        sequence_length: int,
        row_length: int,
        seed: int,
        repeat: bool = True,
    ) -> None:
        self.offsets, self.seed, self.repeat = offsets, seed, repeat
        self.sequence_length, self.row_length = sequence_length, row_length
        self.num_windows = max(1, round((len(offsets) - 1) / WINDOW))
        self._windows, self._firsts = [0], [0]  # known first rows of windows, both ascending
        self._permutation: tuple[int, NDArray[np.int64]] | None = None
        self._at, self._rows = 0, self._plan(0)

    @property
    def anchor(self) -> tuple[int, int]:
        """(window, its first row) of the row served last: all that resuming needs."""
        return self._windows[self._at], self._firsts[self._at]

    def resume(self, window: int, first: int) -> None:
        """Jumps to a window without planning those before it."""
        if window not in self._windows:
            at = bisect.bisect(self._windows, window)
            self._windows.insert(at, window)
            self._firsts.insert(at, first)
        self._at = self._windows.index(window)
        self._rows = self._plan(window)

    def row(self, index: int) -> Row | None:
        """Row `index`, None behind the end of the only epoch."""
        if index < self._firsts[self._at]:
            at = bisect.bisect(self._firsts, index) - 1
            self.resume(self._windows[at], self._firsts[at])
        while index >= self._firsts[self._at] + len(self._rows):
            window, first = self.anchor
            if not self.repeat and window + 1 >= self.num_windows:
                return None
            self.resume(window + 1, first + len(self._rows))
        return self._rows[index - self._firsts[self._at]]

    def _plan(self, window: int) -> list[Row]:
        epoch, part = divmod(window, self.num_windows)
        if self._permutation is None or self._permutation[0] != epoch:
            shuffled = np.random.default_rng([self.seed, epoch]).permutation(len(self.offsets) - 1)
            self._permutation = epoch, shuffled
        documents = np.array_split(self._permutation[1], self.num_windows)[part]
        rows = plan_rows(self.offsets, documents, self.sequence_length, self.row_length)
        order = np.random.default_rng([self.seed, epoch, part]).permutation(len(rows))
        return [rows[i] for i in order]


class Documents:
    """A `Source` over one split of a finished data run.

    sequence_length: the most tokens that attend to each other; longer documents are cut.
    row_length: positions of a row, sequence_length unless given. A multiple of it loses less to
        padding where documents are nearly as long as a sequence (TinyStories at 512: 84 % of the
        positions hold tokens in rows of 512, 99.9 % in rows of 2048).
    tokens_per_step: positions of an optimizer step over all ranks, a multiple of row_length.
    microbatch_tokens: the most positions a batch may have; at least row_length.
    repeat=False: one epoch, its last step filled up with rows of weight 0.
    """

    def __init__(
        self,
        path: Path,
        *,
        split: str = "train",
        sequence_length: int,
        tokens_per_step: int,
        microbatch_tokens: int,
        seed: int,
        row_length: int | None = None,
        rank: int = 0,
        world: int = 1,
        repeat: bool = True,
    ) -> None:
        if not 0 <= rank < world:
            raise DataError(f"rank {rank} of {world} processes; ranks count from 0")
        self.ids, self.offsets, self.pad_id = _open(Path(path), split)
        self.sequence_length, self.tokens_per_step = sequence_length, tokens_per_step
        self.row_length = row_length or sequence_length
        _check_sizes(sequence_length, self.row_length, tokens_per_step, microbatch_tokens)
        self.rows_per_batch = microbatch_tokens // self.row_length
        self.split, self.seed, self.rank, self.world = split, seed, rank, world
        self.order = Order(self.offsets, sequence_length, self.row_length, seed, repeat)

    def batches(self, step: int) -> list[Batch]:
        """This rank's microbatches of one step, equally many on every rank.

        Raises DataError behind the last step of a source that does not repeat.
        """
        rows_per_step = self.tokens_per_step // self.row_length
        first = step * rows_per_step
        rows = [self.order.row(i) for i in range(first, first + rows_per_step)]
        if rows[0] is None:
            raise DataError(
                f"step {step + 1} is behind the end of the data, which is read once; "
                f"lower `steps`, or let the data repeat"
            )
        return self._collate([row or [] for row in rows])

    def heldout_batches(self, max_tokens: int | None = None) -> list[Batch]:
        """This rank's share of a fixed list for evaluation: every document once, file order.

        max_tokens: only the first documents with at most that many predictions (at least one).
        The predictions do not depend on seed, microbatches or ranks.
        """
        ends = np.cumsum(np.diff(self.offsets) - 1)
        count = len(ends) if max_tokens is None else int(np.searchsorted(ends, max_tokens, "right"))
        documents = np.arange(max(1, count))
        return self._collate(
            plan_rows(self.offsets, documents, self.sequence_length, self.row_length)
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands and what it is an order of."""
        window, first_row = self.order.anchor
        return {"window": window, "first_row": first_row, "of": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state, with any number of ranks and any microbatch size.

        Raises DataError when the state belongs to other data or another order.
        """
        mine, saved = self._identity(), state["of"]
        changed = [f"{k} was {saved.get(k)}, is {v}" for k, v in mine.items() if saved.get(k) != v]
        if changed:
            raise DataError(
                f"the saved state is of another order of documents ({'; '.join(changed)}); "
                "undo the change or begin the run again"
            )
        self.order.resume(state["window"], state["first_row"])

    def _identity(self) -> dict[str, Any]:
        return {
            "split": self.split,
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "row_length": self.row_length,
            "tokens_per_step": self.tokens_per_step,
            "documents": len(self.offsets) - 1,
            "tokens": len(self.ids),
        }

    def _collate(self, rows: list[Row]) -> list[Batch]:
        mine = rows[self.rank :: self.world]
        share = -(-len(rows) // self.world)
        samples = [[self._sample(span) for span in row] for row in mine]
        samples += [[]] * (share - len(mine))
        return [
            collate(samples[i : i + self.rows_per_batch], self.row_length, self.pad_id)
            for i in range(0, share, self.rows_per_batch)
        ]

    def _sample(self, span: Span) -> Sample:
        return shift(self.ids[span[0] : span[1]])


def heldout(
    path: Path, *, sequence_length: int, microbatch_tokens: int, tokens: int
) -> list[Batch]:
    """The first held-out documents of a data run, at most `tokens` predictions: always the same.

    Rows of `microbatch_tokens` positions, pieces of at most `sequence_length`.
    """
    source = Documents(
        path,
        split="heldout",
        sequence_length=sequence_length,
        row_length=microbatch_tokens,
        tokens_per_step=microbatch_tokens,
        microbatch_tokens=microbatch_tokens,
        seed=0,
    )
    return source.heldout_batches(tokens)


def _open(path: Path, split: str) -> tuple[NDArray[Any], NDArray[np.int64], int]:
    status = read_manifest(path).status
    if status != "done":
        raise DataError(f"the data run {path} is not finished ({status}); run its recipe again")
    described = read_json(path, "data")
    if split not in described["splits"]:
        raise DataError(f'{path} has no split "{split}"; it has: {", ".join(described["splits"])}')
    ids, offsets = open_tokens(path / "tokens", split)
    if len(offsets) < 2:
        raise DataError(
            f'the split "{split}" of {path} holds no document; set `heldout` in its recipe to a '
            "share or a number of documents"
        )
    return ids, offsets, described["pad_id"]


def _check_sizes(
    sequence_length: int, row_length: int, tokens_per_step: int, microbatch_tokens: int
) -> None:
    if row_length < sequence_length:
        raise DataError(
            f"row_length = {row_length} does not hold sequence_length = {sequence_length}"
        )
    if tokens_per_step < 1 or tokens_per_step % row_length:
        near = max(1, round(tokens_per_step / row_length)) * row_length
        raise DataError(
            f"tokens_per_step = {tokens_per_step} is not made of whole rows of {row_length} "
            f"positions; the nearest is {near}"
        )
    if microbatch_tokens < row_length:
        raise DataError(
            f"microbatch_tokens = {microbatch_tokens} does not hold one row of {row_length} "
            "positions; raise it to that at least"
        )
