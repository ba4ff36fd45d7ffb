"""Several sources in one order: the weights hold, resuming replays nothing, ranks are disjoint."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.data import documents as module
from tessera.data.documents import Documents, Interleaving, heldout
from tessera.data.readers import DataError
from tests.data.test_documents import Rows, equal, order_spans, rows

quick = settings(max_examples=100, deadline=None, database=None, derandomize=True)
SIZES: dict[str, Any] = {
    "sequence_length": 64,
    "tokens_per_step": 8 * 64,
    "microbatch_tokens": 128,
    "seed": 5,
}
WEIGHTS = {"long": 0.2, "short": 0.5, "sums": 0.3}
MARKS = {"long": "L", "short": "Z", "sums": " "}  # a sign of that source alone


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW", 16)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Any]:
    """Documents that fill rows badly, well, and not at all evenly; 18, 90 and 60 of them."""
    files = {"long": ["L" * (36 + i) for i in range(18)], "short": ["Z" * i for i in range(1, 91)]}
    for name, texts in files.items():
        lines = [json.dumps({"text": text}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    table: dict[str, Any] = {name: {"paths": str(tmp_path / f"{name}.jsonl")} for name in files}
    table["sums"] = {"tasks": {"calc": 60}}
    return {name: {**one, "weight": WEIGHTS[name] * 7, "heldout": 3} for name, one in table.items()}


@pytest.fixture
def mixed(prepare: Any, sources: dict[str, Any]) -> Path:
    return prepare(sources=sources, tokenizer="byte")


shares = st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=6)


@quick
@given(shares, st.integers(0, 10**9))
def test_an_interleaving_is_even_and_complete(weights: list[float], first: int) -> None:
    """Each row is one source's next, and no source strays from its share."""
    mix = Interleaving(weights)
    wanted = np.array(weights) / sum(weights)
    for index in range(first, first + 20):
        source, own = mix.row(index)
        before, after = mix.counts(index), mix.counts(index + 1)
        assert sum(before) == index and own == before[source]
        assert [b - a for a, b in zip(before, after, strict=True)] == [
            int(k == source) for k in range(len(weights))
        ]
        rounding = index * len(weights) / 2**32
        assert np.abs(before - wanted * index).max() <= len(weights) / 2 + rounding


def test_the_mix_is_of_trained_tokens(mixed: Path) -> None:
    """By rows `long` would get too little: they hold fewer tokens than those of `short`."""
    source = Documents(mixed, **SIZES)
    trained: Counter[str] = Counter()
    for step in range(300):
        for index in range(step * 8, step * 8 + 8):
            part, row = source._row(index)
            assert row is not None, "the data repeats"
            trained[part.name] += sum(stop - start - 1 for start, stop in row)
    total = sum(trained.values())
    assert total == sum(sum(float(b.weight.sum()) for b in source.batches(s)) for s in range(300))
    for row in source.summary(300):
        share = trained[row["source"]] / total
        assert share == pytest.approx(WEIGHTS[row["source"]], rel=0.03)
        assert row["share"] == pytest.approx(WEIGHTS[row["source"]], rel=0.005)
        assert row["trained"] == pytest.approx(trained[row["source"]], rel=0.03)
    held = {part.name: part.tokens_per_row for part in source.parts}
    assert held["long"] < 0.9 * held["short"]


def test_the_mix_holds_in_every_stretch(mixed: Path) -> None:
    mix = Documents(mixed, **SIZES).mix
    for first in range(0, 400, 8):
        taken = np.subtract(mix.counts(first + 40), mix.counts(first))
        expected = np.subtract(mix.counts(40_000), mix.counts(0)) / 1000
        assert np.abs(taken - expected).max() <= 2


def test_an_epoch_of_a_source_makes_each_of_its_predictions_once(mixed: Path) -> None:
    for part in Documents(mixed, **SIZES).parts:
        documents = zip(part.offsets[:-1], part.offsets[1:], strict=True)
        expected = sorted(t for start, stop in documents for t in range(start, stop - 1))
        for epoch in (0, 1, 2):
            spans = order_spans(part, epoch)
            assert sorted(t for a, b in spans for t in range(a, b - 1)) == expected


def test_a_small_source_with_a_large_weight_begins_anew_sooner(mixed: Path) -> None:
    epochs = {row["source"]: row["epochs"] for row in Documents(mixed, **SIZES).summary(100)}
    tokens = {part.name: part.num_predictions for part in Documents(mixed, **SIZES).parts}
    ratio = {name: WEIGHTS[name] / tokens[name] for name in WEIGHTS}
    for name in WEIGHTS:
        assert epochs[name] / epochs["sums"] == pytest.approx(ratio[name] / ratio["sums"], rel=0.02)


def test_rows_hold_one_source_each(mixed: Path) -> None:
    kinds: Counter[str] = Counter()
    for step in range(20):
        for batch in Documents(mixed, **SIZES).batches(step):
            for tokens in batch.tokens.tolist():
                text = bytes(t - 3 for t in tokens if t >= 3).decode()
                kinds["".join(name for name, mark in MARKS.items() if mark in text)] += 1
    assert set(kinds) <= {*WEIGHTS, ""} and kinds["short"] > kinds["long"]


@pytest.mark.parametrize("at", [0, 1, 3, 10, 47])
def test_resuming_gives_the_undisturbed_batches(mixed: Path, at: int) -> None:
    source = Documents(mixed, **SIZES)
    for step in range(at):
        source.batches(step)
    state = json.loads(json.dumps(source.state_dict()))  # as a checkpoint keeps it
    undisturbed = [source.batches(step) for step in range(at, at + 12)]

    resumed = Documents(mixed, **SIZES)
    planned = []
    for part in resumed.parts:
        plan = part._plan
        part._plan = lambda w, plan=plan, name=part.name: planned.append(name) or plan(w)  # type: ignore[method-assign]
    resumed.load_state_dict(state)
    assert all(equal(a, resumed.batches(at + i)) for i, a in enumerate(undisturbed[:1]))
    assert len(planned) <= 2 * len(resumed.parts), "windows before the saved step are not planned"
    assert all(equal(a, resumed.batches(at + i)) for i, a in enumerate(undisturbed))
    assert equal(resumed.batches(0), Documents(mixed, **SIZES).batches(0)), "also backwards"


@pytest.mark.parametrize("world", [2, 3, 8, 11])
def test_ranks_partition_the_rows_of_a_step(mixed: Path, world: int) -> None:
    alone = Documents(mixed, **SIZES)
    ranks = [Documents(mixed, **SIZES, shard=(r, world)) for r in range(world)]
    for step in (0, 5, 40):
        shared = [source.batches(step) for source in ranks]
        assert len({len(share) for share in shared}) == 1
        assert sum((rows(share) for share in shared), Rows()) == rows(alone.batches(step))


def test_a_state_goes_on_with_another_number_of_ranks(mixed: Path) -> None:
    source = Documents(mixed, **SIZES, shard=(1, 2))
    source.batches(9)
    ranks = [Documents(mixed, **SIZES, shard=(r, 4)) for r in range(4)]
    for one in ranks:
        one.load_state_dict(source.state_dict())
    whole = rows(Documents(mixed, **SIZES).batches(10))
    assert sum((rows(one.batches(10)) for one in ranks), Rows()) == whole


def test_a_sources_own_order_is_the_same_in_every_mix(
    prepare: Any, sources: dict[str, Any], mixed: Path
) -> None:
    """Another weight, another source: what a source gives, and in which order, stays."""
    sources["short"]["weight"] = 40.0
    del sources["sums"]
    other = Documents(prepare("other", sources=sources, tokenizer="byte"), **SIZES)
    for part in other.parts:
        same = next(p for p in Documents(mixed, **SIZES).parts if p.name == part.name)
        assert [part.row(i) for i in range(50)] == [same.row(i) for i in range(50)]


def test_the_order_of_the_tables_does_not_matter(
    prepare: Any, sources: dict[str, Any], mixed: Path
) -> None:
    backwards = dict(reversed(sources.items()))
    other = Documents(prepare("backwards", sources=backwards, tokenizer="byte"), **SIZES)
    assert all(equal(other.batches(s), Documents(mixed, **SIZES).batches(s)) for s in (0, 3))


def test_one_named_source_trains_on_all_that_a_flat_table_does(prepare: Any, stories: Path) -> None:
    flat = prepare("flat", paths=str(stories), tokenizer="byte", heldout=6)
    only = {"only": {"paths": str(stories), "heldout": 6}}
    named = prepare("named", sources=only, tokenizer="byte")
    for split in ("train", "heldout"):
        for end in ("npy", "offsets.npy"):
            ours = (flat / f"tokens/{split}.{end}").read_bytes()
            assert ours == (named / f"tokens/only/{split}.{end}").read_bytes()


def test_heldout_by_source_and_by_weight(mixed: Path) -> None:
    source = Documents(mixed, split="heldout", **SIZES)
    by_source = [rows(source.heldout_batches(source=name)) for name in WEIGHTS]
    assert all(by_source) and sum(by_source, Rows()) == rows(source.heldout_batches())
    for name, one in zip(WEIGHTS, by_source, strict=True):
        part = next(p for p in source.parts if p.name == name)
        assert part.num_documents == 3
        batches = source.heldout_batches(source=name)
        assert sum(float(b.weight.sum()) for b in batches) == part.num_predictions, one
    some = source.heldout_batches(200)
    assert 0 < sum(float(b.weight.sum()) for b in some) <= 200
    ranks = [Documents(mixed, split="heldout", **SIZES, shard=(r, 2)) for r in range(2)]
    shared = [rows(one.heldout_batches(200)) for one in ranks]
    assert sum(shared, Rows()) == rows(some)
    cut: dict[str, Any] = {"sequence_length": 64, "microbatch_tokens": 128, "tokens": 10_000}
    assert rows(heldout(mixed, **cut, source="sums"))
    with pytest.raises(DataError, match=r'no source "sms".*it has: long, short, sums'):
        source.heldout_batches(source="sms")


def test_a_source_without_heldout_documents_is_left_out_there(
    prepare: Any, sources: dict[str, Any]
) -> None:
    sources["long"]["heldout"] = 0
    run = prepare("none", sources=sources, tokenizer="byte")
    assert [part.name for part in Documents(run, **SIZES).parts] == ["long", "short", "sums"]
    held = Documents(run, split="heldout", **SIZES)
    assert [part.name for part in held.parts] == ["short", "sums"]


def test_a_state_of_another_mix_is_refused(
    prepare: Any, sources: dict[str, Any], mixed: Path
) -> None:
    state = Documents(mixed, **SIZES).state_dict()
    sources["long"]["weight"] = 9.0
    other = Documents(prepare("other", sources=sources, tokenizer="byte"), **SIZES)
    with pytest.raises(DataError, match=r"sources was .*0\.2.* is "):
        other.load_state_dict(state)
