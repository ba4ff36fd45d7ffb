"""Prepared documents as a source of batches: an endless list of rows, a pure function of the seed.

Epoch e of a source is a permutation drawn from (seed, e, name), cut into windows whose documents
are packed best-fit and whose rows are shuffled. Sources are interleaved by weight. Step s takes
rows s·R … (s+1)·R - 1 and rank r every `world`-th of them, so resuming needs no replay.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.data.batch import Batch, Sample, best_fit, chunks, collate, shift
from tessera.data.readers import DataError
from tessera.data.store import open_tokens, open_trained
from tessera.runs.run import read_json, read_manifest

ONE = 1 << 32


class Interleaving:
    """Rows of several sources as one endless list; shares: (K,), above 0, only ratios count.

    With shares p_1 … p_K of the rows, the first i rows hold

        n_1 = ⌊i·q_1 + ½⌋,  n_2 = ⌊(i - n_1)·q_2 + ½⌋,  …,  the last source has the rest,
        q_k = p_k / (p_k + … + p_K)

    of each. Every row raises one n_k by one, and n_k stays within about a row of i·p_k. Shares are
    integers over 2³², so the rounding of a machine decides nothing.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self.factors = [round(ONE * share / sum(shares[k:])) for k, share in enumerate(shares[:-1])]

    def counts(self, rows: int) -> list[int]:
        """How many of the first `rows` rows each source gives."""
        taken, left = [], rows
        for factor in self.factors:
            taken.append((left * factor + ONE // 2) // ONE)
            left -= taken[-1]
        return [*taken, left]

    def row(self, index: int) -> tuple[int, int]:
        """Which source gives row `index`, and the number of that row among its own."""
        before, after = self.counts(index), self.counts(index + 1)
        source = next(k for k, (a, b) in enumerate(zip(before, after, strict=True)) if b > a)
        return source, before[source]


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


class Part:
    """One source's split on disk, and the endless list of its rows, planned a window at a time.

    weight: share of the trained tokens that it is to have. trained: the mode of each id that is
    trained, else 0; None where all are. sizes: (sequence_length, row_length).
    """

    def __init__(
        self,
        name: str,
        weight: float,
        ids: NDArray[Any],
        offsets: NDArray[np.int64],
        trained: NDArray[np.uint8] | None,
        sizes: tuple[int, int],
        seed: int,
    ) -> None:
        self.name, self.weight, self.sizes = name, weight, sizes
        self.ids, self.offsets, self.trained = ids, offsets, trained
        self.documents = np.arange(self.num_documents)  # those that are read
        if trained is not None:
            lengths = np.diff(offsets) - 1
            (self.documents,) = np.nonzero(lengths <= sizes[0])
            if not len(self.documents):
                raise DataError(
                    f"no chat of {name or 'the data'} fits into sequence_length = {sizes[0]}; the "
                    f"shortest needs {lengths.min()}"
                )
        # By name: a source's own order is the same alone, in a mix, and in another mix.
        self._seed, self._stream = seed, [zlib.crc32(name.encode())] if name else []
        self.num_windows = max(1, round(len(self.documents) / WINDOW))
        self._firsts = {0: 0}  # the first row of each window that is known
        self._permutation: tuple[int, NDArray[np.int64]] | None = None
        self._window, self._rows = 0, self._plan(0)
        held = sum(stop - start - 1 for row in self._rows for start, stop in row)
        self.tokens_per_row = held / len(self._rows)

    @property
    def anchor(self) -> tuple[int, int]:
        """(window, its first row) of the row served last: all that resuming needs."""
        return self._window, self._firsts[self._window]

    def resume(self, window: int, first: int) -> None:
        """Jumps to a window without planning those before it."""
        self._firsts.setdefault(window, first)
        self._window, self._rows = window, self._plan(window)

    def row(self, index: int) -> Row:
        """Row `index`, in any order of them; a window that was not planned yet is."""
        if index < self.anchor[1]:
            self.resume(max(w for w, first in self._firsts.items() if first <= index), 0)
        while index >= self.anchor[1] + len(self._rows):
            window, first = self.anchor
            self.resume(window + 1, first + len(self._rows))
        return self._rows[index - self.anchor[1]]

    def _plan(self, window: int) -> list[Row]:
        epoch, part = divmod(window, self.num_windows)
        if self._permutation is None or self._permutation[0] != epoch:
            shuffled = self._generator(epoch).permutation(len(self.documents))
            self._permutation = epoch, self.documents[shuffled]
        documents = np.array_split(self._permutation[1], self.num_windows)[part]
        rows = plan_rows(self.offsets, documents, *self.sizes)
        return [rows[i] for i in self._generator(epoch, part).permutation(len(rows))]

    def _generator(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *numbers, *self._stream])

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_left_out(self) -> int:
        """Chats that are longer than a sequence: a part of one would be trained on no question."""
        return self.num_documents - len(self.documents)

    @functools.cached_property
    def num_predictions(self) -> int:
        """Trained predictions of one epoch."""
        if self.trained is None:
            return len(self.ids) - self.num_documents
        before = np.concatenate([[0], np.cumsum(self.trained > 0, dtype=np.int64)])
        return int((before[self.offsets[1:]] - before[self.offsets[:-1]])[self.documents].sum())

    @functools.cached_property
    def trained_per_row(self) -> float:
        """Trained predictions of a row, on average."""
        if self.trained is None:
            return self.tokens_per_row
        all_of_them = int((np.diff(self.offsets)[self.documents] - 1).sum())
        return self.tokens_per_row * (self.num_predictions / all_of_them)

    def sample(self, start: int, stop: int) -> Sample:
        """The predictions of ids[start:stop], which are of one document."""
        if self.trained is None:
            return shift(self.ids[start:stop])
        trained = self.trained[start:stop]
        return shift(self.ids[start:stop], trained > 0, int(trained.max(initial=0)))


class Documents:
    """A `Source` over one split of a finished data run, of all its sources.

    sequence_length: the most tokens that attend to each other; longer documents are cut.
    row_length: positions of a row, sequence_length unless given. A multiple of it loses less to
        padding where documents are nearly as long as a sequence (TinyStories at 512: 84 % of the
        positions hold tokens in rows of 512, 98.9 % in rows of 2048).
    tokens_per_step: positions of an optimizer step over all ranks, a multiple of row_length.
    microbatch_tokens: the most positions a batch may have; at least row_length.
    shard: (this rank, number of ranks).
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
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        status = read_manifest(path).status
        if status != "done":
            raise DataError(f"the data run {path} is not finished ({status}); run its recipe again")
        described = read_json(path, "data")
        if split not in described["splits"]:
            has = ", ".join(described["splits"])
            raise DataError(f'{path} has no split "{split}"; it has: {has}')
        self.pad_id = described["pad_id"]
        self.sequence_length, self.tokens_per_step = sequence_length, tokens_per_step
        self.row_length = row_length or sequence_length
        check_sizes(sequence_length, self.row_length, tokens_per_step, microbatch_tokens)
        self.rows_per_batch = microbatch_tokens // self.row_length
        self.split, self.seed = split, seed
        self.rank, self.world = shard
        self.parts: list[Part] = []
        sizes = sequence_length, self.row_length
        for name, one in described.get("sources", {"": {"weight": 1.0}}).items():
            home = path / "tokens" / name
            ids, offsets = open_tokens(home, split)
            if len(offsets) > 1:
                trained = open_trained(home, split)
                part = Part(name, one["weight"], ids, offsets, trained, sizes, seed)
                self.parts.append(part)
        if not self.parts:
            raise DataError(
                f'the split "{split}" of {path} holds no document; set `heldout` in its recipe to '
                "a share or a number of documents"
            )
        self.mix = Interleaving([part.weight / part.trained_per_row for part in self.parts])

    @property
    def rows_per_step(self) -> int:
        return self.tokens_per_step // self.row_length

    def batches(self, step: int) -> list[Batch]:
        """This rank's microbatches of one step, equally many on every rank."""
        first = step * self.rows_per_step
        return self._collate([self._row(i) for i in range(first, first + self.rows_per_step)])

    def _row(self, index: int) -> tuple[Part, Row]:
        source, own = self.mix.row(index)
        return self.parts[source], self.parts[source].row(own)

    def heldout_batches(
        self, max_tokens: int | None = None, *, source: str | None = None
    ) -> list[Batch]:
        """This rank's share of a fixed list for evaluation: every document once, file order.

        max_tokens: only the first documents with at most that many predictions (at least one), of
        several sources each by its weight. source: only that one's documents.
        """
        parts = [part for part in self.parts if source in (None, part.name)]
        if not parts:
            names = ", ".join(part.name for part in self.parts if part.name)
            names = names or "one without a name"
            raise DataError(f'no source "{source}" in the split "{self.split}"; it has: {names}')
        total = sum(part.weight for part in parts)
        rows: list[tuple[Part, Row]] = []
        for part in parts:
            ends = np.cumsum(np.diff(part.offsets)[part.documents] - 1)
            room = None if max_tokens is None else max_tokens * (part.weight / total)
            count = len(ends) if room is None else int(np.searchsorted(ends, room, "right"))
            documents = part.documents[: max(1, count)]
            rows += [(part, row) for row in plan_rows(part.offsets, documents, *part.sizes)]
        return self._collate(rows)

    def summary(self, steps: int) -> list[dict[str, Any]]:
        """A row for each source: what `steps` steps take of it.

        share: of the trained tokens. epochs: how often each of its documents is seen. fill: share
        of a row's positions that hold tokens, as in the first window.
        """
        taken = self.mix.counts(steps * self.rows_per_step)
        trained = [n * part.trained_per_row for n, part in zip(taken, self.parts, strict=True)]
        return [
            {
                "source": part.name,
                "weight": part.weight,
                "share": tokens / max(1.0, sum(trained)),
                "documents": part.num_documents,
                "tokens": len(part.ids),
                "trained": round(tokens),
                "epochs": tokens / part.num_predictions,
                "fill": part.tokens_per_row / self.row_length,
            }
            for part, tokens in zip(self.parts, trained, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Where each source's order stands (window, its first row), and what it is an order of."""
        anchors = {part.name: list(part.anchor) for part in self.parts}
        return {"anchors": anchors, "of": self._identity()}

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
        for part in self.parts:
            part.resume(*state["anchors"][part.name])

    def _identity(self) -> dict[str, Any]:
        return {
            "split": self.split,
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "row_length": self.row_length,
            "tokens_per_step": self.tokens_per_step,
            "sources": {p.name: [p.weight, p.num_documents, len(p.ids)] for p in self.parts},
        }

    def _collate(self, rows: Sequence[tuple[Part, Row]]) -> list[Batch]:
        mine = rows[self.rank :: self.world]
        share = -(-len(rows) // self.world)
        samples = [[part.sample(a, b) for a, b in row] for part, row in mine]
        samples += [[]] * (share - len(mine))
        return [
            collate(samples[i : i + self.rows_per_batch], self.row_length, self.pad_id)
            for i in range(0, share, self.rows_per_batch)
        ]


def heldout(
    path: Path,
    *,
    sequence_length: int,
    microbatch_tokens: int,
    tokens: int,
    source: str | None = None,
) -> list[Batch]:
    """The first held-out documents of a data run, at most `tokens` predictions: always the same."""
    documents = Documents(
        path,
        split="heldout",
        sequence_length=sequence_length,
        row_length=microbatch_tokens,
        tokens_per_step=microbatch_tokens,
        microbatch_tokens=microbatch_tokens,
        seed=0,
    )
    return documents.heldout_batches(tokens, source=source)


def check_sizes(
    sequence_length: int, row_length: int, tokens_per_step: int, microbatch_tokens: int
) -> None:
    """Raises DataError, naming the nearest that will do, for portions that no rows make up."""
    if row_length < sequence_length:
        raise DataError(
            f"sequence_length = {sequence_length} is longer than a row of {row_length} positions"
        )
    if tokens_per_step < 1 or tokens_per_step % row_length:
        near = max(1, round(tokens_per_step / row_length)) * row_length
        raise DataError(
            f"tokens_per_step = {tokens_per_step} is not made of whole rows of {row_length} "
            f"positions; the nearest is {near}"
        )
    if microbatch_tokens < row_length:
        raise DataError(
            f"microbatch_tokens = {microbatch_tokens} does not hold one row of {row_length}"
        )
