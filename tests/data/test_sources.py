"""The stage with several sources: what each is told, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tessera.data.config import DataConfig
from tessera.data.documents import Documents
from tessera.data.readers import DataError
from tessera.runs.recipe import RecipeError, validate
from tessera.runs.run import read_json, read_table

SIZES: dict[str, Any] = {"sequence_length": 64, "tokens_per_step": 512, "microbatch_tokens": 64}


def lines(path: Path, texts: list[str], broken: int = 0, field: str = "text") -> str:
    rows = [json.dumps({field: text}) for text in texts] + ['{"text": '] * broken
    path.write_text("\n".join(rows))
    return str(path)


@pytest.fixture
def table(stories: Path, tmp_path: Path) -> dict[str, Any]:
    code = lines(tmp_path / "code.jsonl", [f"x = {i}" for i in range(40)], field="content")
    return {
        "web": {"paths": str(stories), "weight": 3.0, "heldout": 6},
        "code": {"paths": code, "field": "content", "heldout": 4},
        "sums": {"tasks": {"calc": 50}, "weight": 0.5, "heldout": 0.1},
    }


def test_each_source_is_read_by_its_own_keys_and_split_apart(
    prepare: Any, table: dict[str, Any], stories: Path
) -> None:
    run = prepare(sources=table, tokenizer="byte")
    found = {(row["source"], row["split"]): row["documents"] for row in read_table(run, "summary")}
    assert found == {
        ("code", "train"): 36, ("code", "heldout"): 4, ("sums", "train"): 50,
        ("sums", "heldout"): 5, ("web", "train"): 54, ("web", "heldout"): 6,
    }  # fmt: skip
    alone = prepare("alone", paths=str(stories), tokenizer="byte", heldout=6)
    for split in ("train", "heldout"):
        assert (run / f"tokens/web/{split}.npy").read_bytes() == (
            alone / f"tokens/{split}.npy"
        ).read_bytes()


def test_the_summary_tells_weights_and_when_a_source_begins_anew(
    prepare: Any, table: dict[str, Any]
) -> None:
    run = prepare(sources=table, tokenizer="byte")
    train = {row["source"]: row for row in read_table(run, "summary") if row["split"] == "train"}
    assert {name: row["weight"] for name, row in train.items()} == {
        "code": pytest.approx(1 / 4.5, abs=1e-6),
        "sums": pytest.approx(0.5 / 4.5, abs=1e-6),
        "web": pytest.approx(3 / 4.5, abs=1e-6),
    }
    for row in train.values():
        assert row["repeats_after"] == pytest.approx(row["tokens"] / row["weight"], rel=1e-4)
    source = Documents(run, **SIZES, seed=0)
    for row in source.summary(200):
        passes = row["trained"] / (train[row["source"]]["tokens"] - row["documents"])
        assert row["epochs"] == pytest.approx(passes, rel=1e-3) and 0 < row["fill"] <= 1


def test_a_bpe_is_trained_on_the_training_documents_of_all(
    prepare: Any, table: dict[str, Any]
) -> None:
    run = prepare(sources=table, tokenizer={"bpe": 330})
    assert all(row["bytes_per_token"] > 1.2 for row in read_table(run, "summary"))
    again = prepare("again", sources=dict(reversed(table.items())), tokenizer={"bpe": 330})
    for name in ("tokenizer/tokenizer.json", "tokens/code/train.npy"):
        assert (run / name).read_bytes() == (again / name).read_bytes()


def test_broken_records_are_counted_by_source(
    prepare: Any, table: dict[str, Any], tmp_path: Path
) -> None:
    """A small rotten source is not hidden by a large good one."""
    table["web"] = {"paths": lines(tmp_path / "web.jsonl", [f"w {i}" for i in range(195)], 5)}
    run = prepare(sources=table, tokenizer="byte", max_bad=0.03)
    bad = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["source"], row["line"]) for row in bad] == [("web", i) for i in range(196, 201)]
    described = read_json(run, "data")
    assert described["quarantined"] == 5
    assert {k: v["quarantined"] for k, v in described["sources"].items()} == {
        "code": 0, "sums": 0, "web": 5,
    }  # fmt: skip
    table["code"]["paths"] = lines(tmp_path / "rotten.jsonl", ["a", "b"], 1, field="content")
    with pytest.raises(DataError, match=r"(?s)source code: 1 of 3 records.*rotten\.jsonl:3: "):
        prepare("rotten", sources=table, tokenizer="byte", max_bad=0.03)


def test_documents_held_out_here_and_trained_on_there_are_counted(
    prepare: Any, stories: Path
) -> None:
    both = {"a": {"paths": str(stories), "heldout": 5}, "b": {"paths": str(stories), "heldout": 3}}
    run = prepare(sources=both, tokenizer="byte")
    assert read_json(run, "data")["heldout_seen_in_train"] == 2, "b trains on two that a holds out"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"code": {"paths": "EMPTY"}}, "source code: no document in .*empty.txt: every record is"),
        ({"code": {"paths": "STORIES", "heldout": 60}}, "source code: heldout asks for 60 of 60"),
        ({"code": {"paths": "no.txt"}}, 'no data files at "no.txt"'),
        ({"code": {"paths": "CODE"}}, 'has no field "text"; it has: content'),
    ],
)
def test_errors_name_the_source_or_the_file(
    prepare: Any,
    table: dict[str, Any],
    stories: Path,
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
) -> None:
    (tmp_path / "empty.txt").write_text("\n<|endoftext|>")
    places = {
        "EMPTY": str(tmp_path / "empty.txt"), "STORIES": str(stories),
        "CODE": table["code"]["paths"],
    }  # fmt: skip
    code = {**change["code"], "paths": places.get(change["code"]["paths"], "no.txt")}
    with pytest.raises(DataError, match=message):
        prepare(sources={**table, "code": code}, tokenizer="byte")


def test_a_source_of_single_tokens_is_refused(prepare: Any, tmp_path: Path) -> None:
    single = {"one": {"paths": lines(tmp_path / "a.jsonl", list("abcd")), "heldout": 1}}
    with pytest.raises(DataError, match="source one: no document has two tokens"):
        prepare(sources=single, tokenizer="byte", bos=False, end="none")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"sources": {"a": {"paths": "x", "weight": 0}}}, "data.sources.a.weight: "),
        ({"sources": {"a": {"paths": "x", "weight": -1.5}}}, "greater than 0"),
        ({"sources": {"a": {"paths": "x", "wieght": 1}}}, "unknown key; did you mean 'weight'?"),
        ({"sources": {"a": {"weight": 1}}}, "data.sources.a: nothing to read: set `paths`, `data"),
        ({"sources": {"a/b": {"paths": "x"}}}, "'a/b' names no directory"),
        ({"sources": {"a": {"paths": "x"}}, "field": "y"}, "`field` stands beside `sources`; move"),
        ({"sources": {"a": {"paths": "x"}}, "paths": "y"}, "`paths` stands beside `sources`"),
        ({"paths": "x", "weight": 1.0}, "data.weight: unknown key"),
        ({"source": {"a": {"paths": "x"}}}, "did you mean 'sources'"),
        ({}, "nothing to read: set `paths`"),
        ({"paths": "x", "cache": {"gib": -1}}, "data.cache.gib"),
    ],
)
def test_recipes_that_are_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        validate(DataConfig, table, "data")
    assert message in str(error.value)


def test_all_files_of_all_sources_are_part_of_the_fingerprint(
    table: dict[str, Any], stories: Path
) -> None:
    config = DataConfig(sources=table, tokenizer="byte")
    assert config.files == [Path(table["code"]["paths"]), stories]
