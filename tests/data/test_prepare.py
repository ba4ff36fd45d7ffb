from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tessera.data.config import DataConfig
from tessera.data.documents import Documents
from tessera.data.problems import split_of
from tessera.data.readers import DataError
from tessera.data.store import TokenWriter, open_tokens
from tessera.data.tokenizer import load_tokenizer
from tessera.runs.files import RunError
from tessera.runs.run import read_json, read_table
from tests.data.conftest import kill_stage


def decoded(run: Path, split: str) -> list[str]:
    """The documents of a split, out of the token files."""
    tokenizer = load_tokenizer(run)
    ids, offsets = open_tokens(run / "tokens", split)
    pairs = zip(offsets[:-1], offsets[1:], strict=True)
    return [tokenizer.decode(ids[a:b].tolist()) for a, b in pairs]


def written(file: Path) -> list[str]:
    return [d.strip() for d in file.read_text().split("<|endoftext|>") if d.strip()]


def test_all_documents_arrive_in_one_split_each(prepare: Any, stories: Path) -> None:
    run = prepare(paths=str(stories), tokenizer="byte", heldout=0.1)
    train, heldout = decoded(run, "train"), decoded(run, "heldout")
    assert sorted(train + heldout) == sorted(written(stories))
    assert len(heldout) == 6
    assert train == [text for text in written(stories) if text in train], "file order is kept"


def test_the_split_depends_on_no_seed_and_no_order(
    prepare: Any, stories: Path, tmp_path: Path
) -> None:
    backwards = tmp_path / "backwards.jsonl"
    rows = [json.dumps({"text": text}) for text in reversed(written(stories))]
    backwards.write_text("\n".join(rows))
    runs = [
        prepare("a", paths=str(stories), tokenizer="byte", heldout=7),
        prepare("b", paths=[str(backwards)], tokenizer={"bpe": 300}, heldout=7, seed=3),
    ]
    assert len({tuple(sorted(decoded(run, "heldout"))) for run in runs}) == 1


def test_equal_documents_stay_on_one_side(prepare: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"document {i % 20}"}) for i in range(200)))
    run = prepare(paths=str(file), tokenizer="byte", heldout=15)
    train, heldout = decoded(run, "train"), decoded(run, "heldout")
    assert not set(train) & set(heldout) and len(heldout) >= 15 and len(train + heldout) == 200


def test_the_summary_counts(prepare: Any, stories: Path) -> None:
    run = prepare(paths=str(stories), tokenizer="byte", heldout=6)
    train, heldout = read_table(run, "summary")
    assert (train["split"], heldout["split"]) == ("train", "heldout")
    assert train["documents"] == 54 and heldout["documents"] == 6
    texts = decoded(run, "train")
    assert train["bytes"] == sum(len(text.encode()) for text in texts)
    assert train["tokens"] == train["bytes"] + 2 * 54, "a beginning and an end each"
    assert train["bytes_per_token"] == 1.0 and 0 < train["fill_512"] <= 1
    assert train["longest"] == 2 + max(len(text.encode()) for text in texts)


def test_a_heldout_file_of_its_own(prepare: Any, stories: Path, tmp_path: Path) -> None:
    other = tmp_path / "valid.txt"
    other.write_text("a text of its own<|endoftext|>" + written(stories)[3])
    run = prepare(paths=str(stories), heldout_paths=str(other), tokenizer="byte")
    assert decoded(run, "heldout") == written(other)
    assert decoded(run, "train") == written(stories)
    assert read_json(run, "data")["heldout_seen_in_train"] == 1


def test_tasks_bring_their_own_split(prepare: Any) -> None:
    run = prepare(tasks={"calc": 200, "sort": 40}, tokenizer={"bpe": 320}, heldout=0.1)
    for split, count in (("train", 240), ("heldout", 24)):
        texts = decoded(run, split)
        assert len(texts) == count
        assert {split_of(text.split("\n")[0]) for text in texts} == {split}
    again = prepare("again", tasks={"calc": 200, "sort": 40}, tokenizer="byte", heldout=24, seed=1)
    assert decoded(again, "heldout")[:20] == decoded(run, "heldout")[:20], "whatever the seed"
    assert decoded(again, "train")[:20] != decoded(run, "train")[:20]


def test_the_same_run_again_is_the_same_bytes(prepare: Any, stories: Path) -> None:
    table: dict[str, Any] = {"paths": str(stories), "tokenizer": {"bpe": 300}, "tasks": {"calc": 9}}
    runs = [prepare(name, **table) for name in ("a", "b")]
    for name in ("tokens/train.npy", "tokens/heldout.npy", "tokenizer/tokenizer.json"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()


def test_limit_takes_the_first_documents(prepare: Any, stories: Path) -> None:
    run = prepare(paths=str(stories), tokenizer="byte", limit=10, heldout=0)
    assert decoded(run, "train") == written(stories)[:10]


def test_a_models_tokenizer_is_taken_and_kept(prepare: Any, shared: Path) -> None:
    model = shared / "models/stories260k"
    text = shared / "data/tinystories/valid_5_stories.txt"
    run = prepare(model=model, paths=str(text), heldout=1, end="bos")
    kept, original = load_tokenizer(run), load_tokenizer(model)
    assert (kept.bos_id, kept.eos_ids, kept.pad_id) == (1, (2, 1), 2)
    assert kept.encode("Once upon a time") == original.encode("Once upon a time")
    ids, offsets = open_tokens(run / "tokens", "train")
    assert ids.dtype == np.uint16 and {int(ids[stop - 1]) for stop in offsets[1:]} == {1}


def test_fill_of_real_stories(prepare: Any, shared: Path) -> None:
    """Floor: most pieces are over 256 tokens, so a row of 512 holds one of them."""
    text = shared / "data/tinystories/train_head_2316_stories.txt"
    run = prepare(model=shared / "models/stories260k", paths=str(text), end="bos")
    assert read_table(run, "summary")[0]["fill_512"] > 0.84
    sizes: dict[str, Any] = {"tokens_per_step": 2048, "microbatch_tokens": 2048, "seed": 0}
    source = Documents(run, sequence_length=512, row_length=2048, **sizes)
    batches = [batch for step in range(100) for batch in source.batches(step)]
    assert sum(batch.num_tokens for batch in batches) > 0.98 * 2048 * 100


def test_broken_records_are_quarantined_up_to_a_share(prepare: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": f"document {i}"}) for i in range(99)]
    file.write_text("\n".join([*rows[:50], '{"text": ', *rows[50:]]))
    run = prepare(paths=str(file), tokenizer="byte", max_bad=0.01)
    (bad,) = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert (bad["line"], bad["excerpt"]) == (51, '{"text": ') and "not JSON" in bad["reason"]
    assert read_json(run, "data")["quarantined"] == 1
    with pytest.raises(DataError, match=r"(?s)1 of 100 records.*a\.jsonl:51: not JSON"):
        prepare("strict", paths=str(file), tokenizer="byte", max_bad=0.001)
    file.write_text("\n".join([rows[0], '{"text": '] * 5))  # told before that all are alike
    with pytest.raises(DataError, match="5 of 10 records are broken"):
        prepare("alike", paths=str(file), tokenizer="byte")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"tokenizer": "byte", "paths": "no.txt"}, 'no data files at "no.txt"'),
        ({"paths": "STORIES"}, "neither is set"),
        ({"paths": "STORIES", "tokenizer": "nowhere/at/all"}, "no such file or directory"),
        ({"paths": "STORIES", "tokenizer": "byte", "heldout": 60}, "leaves none to train on"),
        ({"paths": "EMPTY", "tokenizer": "byte"}, "no document in .*empty.txt"),
    ],
)
def test_errors(
    prepare: Any, stories: Path, tmp_path: Path, table: dict[str, Any], message: str
) -> None:
    (tmp_path / "empty.txt").write_text(" \n<|endoftext|>\n")
    places = {"STORIES": str(stories), "EMPTY": str(tmp_path / "empty.txt")}
    table = {**table, "paths": places.get(table["paths"], table["paths"])}
    with pytest.raises(ValueError, match=message):
        prepare(**table)


def test_an_end_the_tokenizer_does_not_know(prepare: Any, stories: Path, shared: Path) -> None:
    nameless = str(shared / "data/tokenizers/torchtune_2k")
    for key, table in (
        ("bos = true", {"bos": True, "end": "none"}),
        ('end = "eos"', {"bos": False}),
    ):
        with pytest.raises(DataError, match=f"{key}: the tokenizer names no such token"):
            prepare(key[:3], paths=str(stories), tokenizer=nameless, **table)
    prepare("fine", paths=str(stories), tokenizer=nameless, bos=False, end="none")


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"paths": "a", "heldout": 1.0},
        {"paths": "a", "heldout": -1},
        {"tasks": {"calc": 0}},
        {"tasks": {"clac": 10}},
        {"paths": "a", "tokenizer": {"bpe": 10}},
        {"paths": "a", "tokenizer": {"bqe": 1000}},
        {"paths": "a", "shuffle": True},
    ],
)
def test_configs_that_are_refused(table: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DataConfig(**table)


def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / ".train.npy.tmp").symlink_to("/dev/full")
    with (
        pytest.raises(RunError, match="No space left"),
        TokenWriter(tmp_path, "train", 9) as writer,
    ):
        writer.add(np.tile(np.arange(9), 20_000), np.array([180_000]))
        writer.finish()
    assert not list(tmp_path.glob("*.npy")) and not (tmp_path / ".train.npy.tmp").is_symlink()


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    with TokenWriter(tmp_path, "train", 70_000) as writer:
        writer.add(np.array([69_999, 1]), np.array([2]))
        writer.finish()
    ids, offsets = open_tokens(tmp_path, "train")
    assert ids.dtype == np.uint32 and ids.tolist() == [69_999, 1] and offsets.tolist() == [0, 2]
    assert np.load(tmp_path / "train.npy").tolist() == [69_999, 1]


def test_killed_at_any_moment_and_started_again(prepare: Any, tmp_path: Path) -> None:
    table: dict[str, Any] = {"tasks": {"calc": 3000}, "tokenizer": {"bpe": 300}}
    whole = prepare("whole", **table)
    kill_stage(tmp_path / "runs/killed", table, (0.05, 0.2))
    killed = prepare("killed", **table) if not _done(tmp_path) else tmp_path / "runs/killed"
    for name in ("tokens/train.npy", "tokens/heldout.npy", "tokenizer/tokenizer.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert not list(killed.rglob("*.tmp"))


def _done(tmp_path: Path) -> bool:
    manifest = tmp_path / "runs/killed/run.json"
    return manifest.is_file() and json.loads(manifest.read_text())["status"] == "done"
