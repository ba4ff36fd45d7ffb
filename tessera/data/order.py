"""The order of one source's rows: endless, and a pure function of the seed.

Epoch e is a permutation of the documents drawn from (seed, e), cut into windows of a few thousand.
A window's documents are packed into rows best-fit (batch.py) and its rows are shuffled. Rows of all
epochs form one endless list. Planning a window reads lengths, not tokens, and any row is found
without those before it, given the number of its window's first row.
"""

from __future__ import annotations

import bisect

import numpy as np
from numpy.typing import NDArray

from tessera.data.batch import best_fit, chunks

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
    """The endless list of a source's rows, planned a window at a time; `row(i)` in any order of i.

    stream: numbers that set this order apart from others of the same seed.
    documents: those that are read, all unless given.
    """

    def __init__(
        self,
        offsets: NDArray[np.int64],
        sequence_length: int,
        row_length: int,
        seed: int,
        repeat: bool = True,
        stream: tuple[int, ...] = (),
        documents: NDArray[np.int64] | None = None,
    ) -> None:
        self.offsets, self.seed, self.repeat, self.stream = offsets, seed, repeat, stream
        self.sequence_length, self.row_length = sequence_length, row_length
        self.documents = documents
        self._num_documents = len(offsets) - 1 if documents is None else len(documents)
        self.num_windows = max(1, round(self._num_documents / WINDOW))
        self._windows, self._firsts = [0], [0]  # known first rows of windows, both ascending
        self._permutation: tuple[int, NDArray[np.int64]] | None = None
        self._at, self._rows = 0, self._plan(0)
        held = sum(stop - start - 1 for row in self._rows for start, stop in row)
        self.tokens_per_row = held / len(self._rows)

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
            shuffled = self._generator(epoch).permutation(self._num_documents)
            chosen = shuffled if self.documents is None else self.documents[shuffled]
            self._permutation = epoch, chosen
        documents = np.array_split(self._permutation[1], self.num_windows)[part]
        rows = plan_rows(self.offsets, documents, self.sequence_length, self.row_length)
        order = self._generator(epoch, part).permutation(len(rows))
        return [rows[i] for i in order]

    def _generator(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *numbers, *self.stream])
