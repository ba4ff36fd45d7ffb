"""Hugging Face datasets, as far as they go without a network."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tessera.data.config import DataConfig
from tessera.data.dataset import DatasetPart, dataset_identity, local_dataset, read_dataset
from tessera.data.readers import Bad, DataError, Record
from tessera.runs.run import read_json
from tests.data.test_prepare import decoded

TEXTS = [f"row {i} " * (1 + i % 7) for i in range(60)]

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None,
    reason="needs the optional library: pip install 'tessera[datasets]'",
)


def part(home: Path, **changes: Any) -> DatasetPart:
    fields: dict[str, Any] = {
        "subset": None, "split": "train", "revision": None, "field": "body", "stream": False,
    }  # fmt: skip
    return DatasetPart(str(home), **{**fields, **changes})


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The same 61 rows, the third without text, in every local form a dataset has."""
    datasets = pytest.importorskip("datasets", reason="needs pip install 'tessera[datasets]'")
    datasets.disable_progress_bars()
    rows = [*TEXTS[:2], None, *TEXTS[2:]]
    table = datasets.Dataset.from_dict({"body": rows, "n": list(range(61))})
    homes = {name: tmp_path / name for name in ("saved", "splits", "parquet", "jsonl")}
    table.save_to_disk(homes["saved"], num_shards=3)
    valid = datasets.Dataset.from_dict({"body": ["held out", "also"], "n": [0, 1]})
    datasets.DatasetDict(train=table, valid=valid).save_to_disk(homes["splits"])
    for name in ("parquet", "jsonl"):
        homes[name].mkdir()
    table.select(range(30)).to_parquet(homes["parquet"] / "train-0.parquet")
    table.select(range(30, 61)).to_parquet(homes["parquet"] / "train-1.parquet")
    table.to_json(homes["jsonl"] / "data.jsonl")
    return homes


@pytest.mark.parametrize("name", ["saved", "splits", "parquet", "jsonl"])
def test_every_form_gives_the_same_rows(homes: dict[str, Path], name: str) -> None:
    records = list(read_dataset(part(homes[name])))
    assert [r.content for r in records if isinstance(r, Record)] == TEXTS
    (bad,) = [r for r in records if isinstance(r, Bad)]
    assert str(bad) == f"{homes[name]}:train:3: null"


def test_a_dataset_is_a_source_like_any_other(
    prepare: Any, homes: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "same.jsonl"
    file.write_text("\n".join(json.dumps({"body": text}) for text in TEXTS))
    table: dict[str, Any] = {"tokenizer": "byte", "field": "body", "heldout": 6, "max_bad": 0.02}
    plain = prepare("plain", paths=str(file), **table)
    for name in ("saved", "parquet"):
        run = prepare(name, dataset=str(homes[name]), **table)
        for split in ("train", "heldout"):
            assert decoded(run, split) == decoded(plain, split)
        (line,) = (run / "quarantine.jsonl").read_text().splitlines()
        assert json.loads(line)["line"] == 3 and read_json(run, "data")["quarantined"] == 1


def test_a_split_of_its_own_is_held_out(prepare: Any, homes: dict[str, Path]) -> None:
    run = prepare(
        dataset=str(homes["splits"]),
        field="body",
        heldout_split="valid",
        tokenizer="byte",
        max_bad=0.1,
    )
    assert decoded(run, "heldout") == ["held out", "also"] and decoded(run, "train") == TEXTS


def test_limit_takes_the_first_rows(prepare: Any, homes: dict[str, Path]) -> None:
    table: dict[str, Any] = {"field": "body", "heldout": 0, "tokenizer": "byte", "max_bad": 0.5}
    for name in ("saved", "parquet"):
        run = prepare(name, dataset=str(homes[name]), limit=10, **table)
        assert decoded(run, "train") == TEXTS[:10]


def test_the_identity_follows_the_content(homes: dict[str, Path]) -> None:
    before = {name: dataset_identity(part(home)) for name, home in homes.items()}
    assert before == {name: dataset_identity(part(home)) for name, home in homes.items()}
    assert dataset_identity(part(homes["splits"], split="valid")) != before["splits"]
    file = homes["jsonl"] / "data.jsonl"
    file.write_text(file.read_text().replace("row 7", "ROW 7"))
    assert dataset_identity(part(homes["jsonl"])) != before["jsonl"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("saved", {"field": "text"}, 'no column "text"; it has: body, n. Set `field`'),
        ("jsonl", {"field": "text"}, 'no column "text"; it has: body, n. Set `field`'),
        ("parquet", {"field": "n"}, 'column "n" holds int64, not text'),
        ("splits", {"split": "test"}, 'no split "test"; it has: train, valid'),
        ("saved", {"split": "valid"}, 'no split "valid"; it has: train'),
        ("parquet", {"split": "test"}, r"cannot be opened: .*test.*\['train'\]"),
    ],
)
def test_what_is_not_there_is_said(
    homes: dict[str, Path], name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        list(read_dataset(part(homes[name], **changes)))


@needs_library
def test_names_that_are_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "a.parquet").write_text("")
    assert local_dataset(str(tmp_path / "corpus")) == tmp_path / "corpus"
    assert local_dataset("owner/name") is None
    with pytest.raises(DataError, match='nor a hub id; nearest there: "corpus"'):
        local_dataset(str(tmp_path / "corpsu"))
    with pytest.raises(DataError, match="is a file; name it in `paths`"):
        local_dataset(str(tmp_path / "a.parquet"))


@needs_library
def test_a_hub_out_of_reach(prepare: Any) -> None:
    with pytest.raises(DataError, match="the dataset owner/nothing:train cannot be opened"):
        prepare(dataset="owner/nothing", tokenizer="byte")


def test_without_the_library_the_recipe_is_refused_before_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = DataConfig(dataset="owner/name", tokenizer="byte")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'tessera\[datasets\]'"):
        _ = config.files


def test_keys_that_belong_to_a_dataset() -> None:
    for key in ("subset", "heldout_split", "revision"):
        with pytest.raises(ValueError, match=f"`{key}` says which part of a `dataset`"):
            DataConfig(paths="a", **{key: "x"})
