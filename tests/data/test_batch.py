from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.data.batch import ON, TEXT, Batch, Sample, best_fit, chunks, collate, fill, pack, shift

quick = settings(max_examples=60, deadline=None, database=None, derandomize=True)
corpora = st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=40), min_size=1, max_size=12)


def predictions(batch: Batch) -> Counter[tuple[tuple[int, ...], int]]:
    """(everything the model may see, what it is to say), as attention by segments implies."""
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    for tokens, labels, weight, segments in zip(
        batch.tokens, batch.labels, batch.weight, batch.segments, strict=True
    ):
        for t in range(len(tokens)):
            if weight[t] > 0:
                seen = tokens[: t + 1][segments[: t + 1] == segments[t]]
                found[tuple(seen.tolist()), int(labels[t])] += 1
    return found


@quick
@given(corpora, st.integers(40, 64))
def test_packing_makes_every_prediction_of_every_document_once(
    documents: list[list[int]], length: int
) -> None:
    expected = Counter(
        (tuple(document[: t + 1]), document[t + 1])
        for document in documents
        for t in range(len(document) - 1)
    )
    assert predictions(pack(documents, length)) == expected


@quick
@given(corpora, st.integers(1, 12))
def test_cutting_long_documents_loses_no_prediction(
    documents: list[list[int]], length: int
) -> None:
    batch = pack(documents, length)
    pairs = Counter(
        zip(
            batch.tokens[batch.weight > 0].tolist(),
            batch.labels[batch.weight > 0].tolist(),
            strict=True,
        )
    )
    assert pairs == Counter(pair for d in documents for pair in zip(d, d[1:], strict=False))


@quick
@given(corpora, st.integers(1, 50))
def test_positions_and_segments_number_the_tokens_and_documents_of_a_row(
    documents: list[list[int]], length: int
) -> None:
    batch = pack(documents, length)
    for row in range(len(batch.tokens)):
        segments, positions = batch.segments[row], batch.positions[row]
        numbers = torch.unique_consecutive(segments[segments >= 0]).tolist()
        assert numbers == list(range(len(numbers))), "documents are numbered in order, from 0"
        assert not bool((segments[:-1] < 0).logical_and(segments[1:] >= 0).any()), "padding is last"
        for number in numbers:
            assert positions[segments == number].tolist() == list(
                range(int((segments == number).sum()))
            )
    assert bool(((batch.weight > 0) == (batch.segments >= 0)).all())


@quick
@given(st.lists(st.integers(1, 32), min_size=1, max_size=60))
def test_best_fit_places_each_sample_once_and_leaves_no_two_rows_that_fit_in_one(
    lengths: list[int],
) -> None:
    rows = best_fit(lengths, 32)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 32 for row in rows)
    sums = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(sums) < 2 or sums[0] + sums[1] > 32, "two rows that fit into one were left apart"
    assert best_fit(lengths, 32) == rows


def test_best_fit_takes_the_tightest_row() -> None:
    assert best_fit([6, 7, 3, 4], 10) == [[1, 2], [0, 3]]
    assert fill([6, 7, 3, 4], 10) == 1.0
    assert fill([6, 6], 10) == 0.6


def test_best_fit_refuses_what_no_row_holds() -> None:
    with pytest.raises(ValueError, match="11 tokens cannot stand in a row of 10"):
        best_fit([11], 10)


def test_chunks_share_the_one_label() -> None:
    assert chunks(10, 4) == [(0, 5), (4, 9), (8, 10)]
    assert chunks(5, 4) == [(0, 5)]
    assert chunks(1, 4) == []


def test_a_weight_stands_with_the_prediction_of_its_id() -> None:
    sample = shift([5, 6, 7], weight=[9.0, 0.0, 2.0])
    assert sample.tokens.tolist() == [5, 6]
    assert sample.labels.tolist() == [6, 7]
    assert sample.weight.tolist() == [0.0, 2.0]
    with pytest.raises(ValueError, match="2 weights for 3 ids"):
        shift([5, 6, 7], weight=[1.0, 1.0])


def test_an_empty_row_is_padding_of_weight_zero() -> None:
    batch = collate([[], [shift([1, 2, 3])]], 4, pad_id=7)
    assert batch.tokens.tolist() == [[7, 7, 7, 7], [1, 2, 7, 7]]
    assert batch.labels.tolist() == [[7, 7, 7, 7], [2, 3, 7, 7]]
    assert batch.weight.sum(1).tolist() == [0.0, 2.0]
    assert batch.segments.tolist() == [[-1] * 4, [0, 0, -1, -1]]
    assert batch.num_tokens == 2
    assert batch.weight.dtype == torch.float32
    assert batch.tokens.dtype == batch.segments.dtype == torch.int64


def test_moving_a_batch_keeps_all_streams() -> None:
    batch = collate([[Sample(np.array([1]), np.array([2]), np.ones(1, np.float32))]], 2, 0)
    moved = batch.to("cpu")
    assert torch.equal(moved.labels, batch.labels) and torch.equal(moved.weight, batch.weight)


def test_a_batch_tells_the_mode_of_its_documents_where_one_is_no_plain_text() -> None:
    text, on = shift([1, 2, 3]), shift([4, 5, 6, 7], [0, 0, 1, 1], ON)
    plain, mixed = collate([[text]], 6, 0), collate([[text, on]], 6, 0)
    assert plain.mode is None and plain.to("cpu").mode is None
    assert mixed.mode is not None and mixed.mode.tolist() == [[TEXT] * 2 + [ON] * 3 + [TEXT]]
    assert mixed.weight.tolist() == [[1, 1, 0, 1, 1, 0]]
    moved = mixed.to("cpu").mode
    assert moved is not None and moved.tolist() == mixed.mode.tolist()
