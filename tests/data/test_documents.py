from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tessera.data import documents as module
from tessera.data.batch import Batch
from tessera.data.documents import Documents, Part
from tessera.data.readers import DataError
from tessera.data.store import open_tokens

ROWS = 8
SIZES: dict[str, Any] = {
    "sequence_length": 64,
    "tokens_per_step": ROWS * 64,
    "microbatch_tokens": 128,
    "seed": 5,
}
Rows = Counter[tuple[int, ...]]


@pytest.fixture
def data(prepare: Any, stories: Path) -> Path:
    return prepare(paths=str(stories), tokenizer="byte", heldout=6)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW", 16)


def rows(batches: Iterable[Batch]) -> Rows:
    """The rows that train anything, whatever batch they are in."""
    streams = ("tokens", "labels", "segments", "positions")
    return Counter(
        tuple(torch.cat([getattr(batch, name)[b] for name in streams]).tolist())
        for batch in batches
        for b in range(len(batch.tokens))
        if batch.weight[b].sum() > 0
    )


def equal(a: list[Batch], b: list[Batch]) -> bool:
    fields = ("tokens", "labels", "weight", "positions", "segments")
    return len(a) == len(b) and all(
        torch.equal(getattr(x, f), getattr(y, f)) for x, y in zip(a, b, strict=True) for f in fields
    )


def spans(source: Documents, epoch: int = 0) -> list[tuple[int, int]]:
    """Every piece of one epoch."""
    return order_spans(source.parts[0], epoch)


def order_spans(order: Part, epoch: int) -> list[tuple[int, int]]:
    first = epoch * order.num_windows
    windows = range(first, first + order.num_windows)
    return [span for window in windows for row in order._plan(window) for span in row]


def test_an_epoch_makes_every_prediction_once(data: Path) -> None:
    source = Documents(data, **SIZES)
    documents = zip(source.parts[0].offsets[:-1], source.parts[0].offsets[1:], strict=True)
    expected = sorted(t for start, stop in documents for t in range(start, stop - 1))
    for epoch in (0, 1, 3):
        assert sorted(t for a, b in spans(source, epoch) for t in range(a, b - 1)) == expected
    assert spans(source, 0) != spans(source, 1)
    assert source.parts[0].num_windows > 2


def test_order_is_a_function_of_the_seed(data: Path) -> None:
    def first(seed: int) -> list[Batch]:
        return Documents(data, **{**SIZES, "seed": seed}).batches(0)

    assert equal(first(5), first(5)) and not equal(first(5), first(6))


def test_a_step_can_be_asked_for_in_any_order(data: Path) -> None:
    source, steps = Documents(data, **SIZES), list(range(40))
    forwards = [source.batches(step) for step in steps]
    assert all(equal(forwards[step], source.batches(step)) for step in (39, 0, 17, 16, 25, 3))


@pytest.mark.parametrize("at", [0, 1, 2, 7, 13, 31])
def test_resuming_gives_the_undisturbed_batches(data: Path, at: int) -> None:
    source = Documents(data, **SIZES)
    for step in range(at):
        source.batches(step)
    state = source.state_dict()
    undisturbed = [source.batches(step) for step in range(at, at + 12)]

    resumed = Documents(data, **SIZES)
    resumed.load_state_dict(state)
    assert all(equal(a, resumed.batches(at + i)) for i, a in enumerate(undisturbed))
    assert equal(resumed.batches(0), Documents(data, **SIZES).batches(0)), "also backwards"


def test_a_state_of_another_order_is_refused(data: Path) -> None:
    state = Documents(data, **SIZES).state_dict()
    other = Documents(data, **{**SIZES, "seed": 6})
    with pytest.raises(DataError, match="seed was 5, is 6"):
        other.load_state_dict(state)


@pytest.mark.parametrize("world", [2, 3, 8, 11])
def test_ranks_partition_the_rows_of_a_step(data: Path, world: int) -> None:
    alone = Documents(data, **SIZES)
    ranks = [Documents(data, **SIZES, shard=(r, world)) for r in range(world)]
    for step in (0, 5, 9):
        shares = [source.batches(step) for source in ranks]
        assert len({len(share) for share in shares}) == 1
        assert sum((rows(share) for share in shares), Rows()) == rows(alone.batches(step))


@pytest.mark.parametrize("microbatch", [64, 192, 320, 512, 5000])
def test_accumulation_changes_no_row(data: Path, microbatch: int) -> None:
    reference = Documents(data, **SIZES)
    other = Documents(data, **{**SIZES, "microbatch_tokens": microbatch})
    for step in range(6):
        batches = other.batches(step)
        assert rows(batches) == rows(reference.batches(step))
        assert all(batch.tokens.numel() <= microbatch for batch in batches)
        assert sum(batch.tokens.numel() for batch in batches) == SIZES["tokens_per_step"]


def test_long_rows_hold_the_same_predictions_with_less_padding(data: Path) -> None:
    long = Documents(data, **{**SIZES, "microbatch_tokens": 256}, row_length=256)
    assert sorted(spans(long)) == sorted(spans(Documents(data, **SIZES)))
    batch = long.batches(0)[0]
    assert batch.tokens.shape == (1, 256)
    assert int(batch.positions[batch.segments >= 0].max()) < 64


def test_heldout_batches_are_fixed(data: Path) -> None:
    def tokens(**changes: Any) -> Rows:
        source = Documents(data, split="heldout", **{**SIZES, **changes})
        return rows(source.heldout_batches())

    assert tokens() == tokens(seed=9) == tokens(microbatch_tokens=64)
    ranks = [
        Documents(data, split="heldout", **SIZES, shard=(r, 3)).heldout_batches() for r in range(3)
    ]
    assert sum(map(rows, ranks), Rows()) == tokens()
    assert len({len(share) for share in ranks}) == 1


def test_heldout_batches_up_to_a_number_of_tokens(data: Path) -> None:
    source = Documents(data, split="heldout", **SIZES)
    lengths = np.diff(source.parts[0].offsets) - 1

    def weight(limit: int | None) -> int:
        return int(sum(batch.weight.sum() for batch in source.heldout_batches(limit)))

    assert weight(None) == lengths.sum()
    assert weight(int(lengths[:3].sum())) == lengths[:3].sum()
    assert weight(int(lengths[:3].sum()) - 1) == lengths[:2].sum()
    assert weight(1) == lengths[0], "at least one document"


def test_the_last_token_predicts_the_end(prepare: Any, stories: Path) -> None:
    ends = {}
    for end in ("eos", "bos", "none"):
        run = prepare(end, paths=str(stories), tokenizer="byte", heldout=0, end=end)
        ids, offsets = open_tokens(run / "tokens", "train")
        ends[end] = {int(ids[stop - 1]) for stop in offsets[1:]}
        assert {int(ids[start]) for start in offsets[:-1]} == {1}
        batch = Documents(run, **SIZES).batches(0)[0]
        assert 2 not in batch.tokens[batch.weight > 0] or end == "none"
    assert ends["eos"] == {2} and ends["bos"] == {1} and not ends["none"] & {0, 1, 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens_per_step": 500}, "whole rows of 64 positions; the nearest is 512"),
        ({"microbatch_tokens": 63}, "does not hold one row of 64"),
        ({"row_length": 32}, "sequence_length = 64 is longer than a row of 32"),
        ({"split": "test"}, 'no split "test"; it has: train, heldout'),
    ],
)
def test_settings_that_do_not_fit(data: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Documents(data, **{**SIZES, **changes})


def test_an_unfinished_run_is_refused(data: Path) -> None:
    manifest = data / "run.json"
    manifest.write_text(re.sub('"done"', '"running"', manifest.read_text()))
    with pytest.raises(DataError, match=r"not finished \(running\)"):
        Documents(data, **SIZES)


def test_damaged_token_files_are_refused(data: Path) -> None:
    file = data / "tokens/train.npy"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(DataError, match="damaged"):
        Documents(data, **SIZES)
    file.unlink()
    with pytest.raises(DataError, match="not there; run the data stage again"):
        Documents(data, **SIZES)


def test_no_heldout_documents(prepare: Any, stories: Path) -> None:
    run = prepare(paths=str(stories), tokenizer="byte", heldout=0)
    with pytest.raises(DataError, match="holds no document; set `heldout`"):
        Documents(run, split="heldout", **SIZES)
