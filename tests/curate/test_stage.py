"""The stage as a whole: what goes in comes out or is told of, killed and resumed or not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessera.curate.sources import SourceConfig, plan_shards, read_shard
from tessera.data import parquet
from tessera.data.conversation import Chat
from tessera.data.dialects import read_chats
from tessera.data.readers import Bad, DataError, read_rows
from tessera.runs.run import read_table
from tests.curate.conftest import Curated, killed, lines, run_stage, write_lines

Curate = Callable[..., Curated]
STEPS: list[dict[str, Any]] = [
    {"step": "tags"},
    {"step": "dedupe"},
    {"step": "extract_answer"},
    {"step": "near_dedupe", "threshold": 0.7},
    {"step": "length", "max": 400},
    {"step": "blend", "weights": {"rows": 1}},
    {"step": "order", "by": "length"},
]


def rows(count: int) -> list[dict[str, Any]]:
    """Chats of which a tenth repeat an earlier one and a tenth have no answer."""
    found = []
    for n in range(count):
        m = n if n % 10 else n // 10
        said = f"so it is \\boxed{{{m}}}" if n % 10 != 3 else "who knows"
        asked = f"Problem {m}: add {m} to {m * m % 97} and then take {m % 13} away from the sum."
        turns = [("user", asked), ("assistant", said)]
        found.append({"messages": [{"role": r, "content": c} for r, c in turns], "license": "mit"})
    return found


def table(file: Path, **more: Any) -> dict[str, Any]:
    source = {"paths": str(file), "name": "rows"}
    return {"sources": [source], "steps": STEPS, "shard_mb": 0.01, **more}


def test_rows_in_parquet_are_those_in_lines(curate: Curate, tmp_path: Path):
    found = rows(300)
    for n, row in enumerate(found):  # keys that only some rows have, and nested ones
        row |= {"score": n / 7} if n % 3 else {"args": {"kwargs": [{"n": n}, {"m": "x"}]}}
    file = write_lines(tmp_path / "rows.jsonl", found)
    plain = run_stage(tmp_path / "plain", table(file))
    made = run_stage(tmp_path / "made", table(file, format="parquet"))
    names = [path.name for path in sorted((made.path / "chats").iterdir())]
    assert len(names) > 1 and all(name.endswith(".parquet") for name in names)
    assert made.counts() == plain.counts()
    kept = [
        [chat for path in sorted((one.path / "chats").iterdir()) for _, chat in read_chats(path)]
        for one in (plain, made)
    ]
    assert kept[0] == kept[1]


def test_a_killed_conversion_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = [write_lines(tmp_path / f"{n}.jsonl", [{"a": n, "b": [n]}] * 3) for n in range(3)]
    whole = parquet._write
    calls: list[Path] = []

    def killed(source: Path, target: Path, schema: Any) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        whole(source, target, schema)

    monkeypatch.setattr(parquet, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        parquet.convert(files)
    assert all(file.is_file() for file in files)
    made = parquet.convert(files)
    assert [row for path in made for _, row in read_rows(path)] == [
        {"a": n, "b": [n]} for n in range(3) for _ in range(3)
    ]
    assert not any(file.exists() for file in files)


@pytest.mark.parametrize("values", [(1, "x"), ({}, {}), ([1], {"b": 1})])
def test_rows_that_no_columns_hold_stay_lines(tmp_path: Path, values: tuple):
    (file,) = files = [write_lines(tmp_path / "m.jsonl", [{"a": one} for one in values])]
    with pytest.raises(DataError, match='write format = "jsonl"'):
        parquet.convert(files)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    asked = [{"messages": one["messages"], "odd": n} for n, one in enumerate(rows(3))]
    asked[1]["odd"] = "text"
    given = write_lines(tmp_path / "rows.jsonl", asked)
    steps = {"steps": [{"step": "tags"}], "format": "parquet"}
    made = run_stage(tmp_path / "run", table(given) | steps)
    assert [row["odd"] for row in made.rows] == [0, "text", 2]


def test_every_row_comes_out_or_is_told_of(curate: Curate, tmp_path: Path):
    broken = ["no object", {"messages": []}, {"messages": [{"role": "user", "content": 1}]}]
    file = write_lines(tmp_path / "rows.jsonl", rows(1000) + broken)
    file.write_bytes(file.read_bytes() + b'{"messages": \n\xff\n')
    made = run_stage(tmp_path / "run", table(file))
    counts = made.counts()
    assert counts["read"] == (1005, 1000)
    names = list(counts)
    for before, after in zip(names, names[1:], strict=False):
        assert counts[before][1] == counts[after][0]
    assert len(made.rows) == counts["write"][1] == 1005 - len(made.removed)
    told = Counter((row["step"], row["reason"]) for row in made.removed)
    reasons = lines(made.path / "tables/reasons.jsonl")
    assert told == {(row["step"], row["reason"]): row["rows"] for row in reasons}
    place = made.rows[0]["lineage"][0].rpartition(":")
    assert (
        json.loads(file.read_bytes().splitlines()[int(place[2]) - 1])["messages"]
        == (made.rows[0]["messages"])
    )
    assert {row["license"] for row in made.rows} == {"mit"}
    assert not list(made.path.glob("passes/*/part-*")) and not list(made.path.rglob("*.npy"))


@pytest.mark.parametrize("dialect", ["openai", "nemotron", "sharegpt"])
def test_the_result_is_read_back_in_its_dialect(curate: Curate, dialect: str):
    made = curate(rows(50), [{"step": "dedupe"}], dialect=dialect)
    found = [one for _, one in read_chats(made.path / "chats/part-00000.jsonl")]
    assert len(found) == len(made.rows) and all(isinstance(one, Chat) for one in found)


def test_shards_are_any_size(tmp_path: Path):
    file = write_lines(tmp_path / "rows.jsonl", rows(3000))
    whole = run_stage(tmp_path / "one", table(file, shard_mb=64.0))
    pieces = run_stage(tmp_path / "many", table(file, shard_mb=0.1))
    assert len(list((pieces.path / "chats").iterdir())) > 2
    assert pieces.rows == whole.rows
    assert pieces.counts() == whole.counts()


def test_shards_cover_every_line_once(tmp_path: Path):
    file = write_lines(tmp_path / "rows.jsonl", rows(500))
    source = SourceConfig(paths=str(file))
    for size in (1e-6, 1e-3, 5e-3, 1.0):
        shards = plan_shards([source], size)
        found = [one for shard in shards for one in read_shard(shard, source)]
        assert [one.extra["lineage"] for one in found if isinstance(one, Chat)] == [
            [f"{file}:{n}"] for n in range(1, 501)
        ]
    file.write_text(file.read_text().rstrip("\n"))
    shards = plan_shards([source], 1e-3)
    assert sum(1 for shard in shards for _ in read_shard(shard, source)) == 500


def test_problems_are_rows_each_question_once():
    source = SourceConfig(tasks={"wish": 40, "calc": 10})
    wish, calc = (list(read_shard(shard, source)) for shard in plan_shards([source], 1))
    assert len(calc) == 10 and all(one.extra["expected_answer"].isdigit() for one in calc)
    assert len({one.messages[0]["content"] for one in wish}) == len(wish) <= 40
    assert not wish[0].answered and wish[0].extra["instruction_id_list"]
    assert wish[1].extra["lineage"] == ["wish:2"]
    with pytest.raises(ValueError, match="either `paths` of files or `tasks` to draw"):
        SourceConfig()


def test_a_run_killed_again_and_again_equals_an_undisturbed_one(tmp_path: Path):
    file = write_lines(tmp_path / "rows.jsonl", rows(20_000))
    undisturbed = run_stage(tmp_path / "whole", table(file, shard_mb=0.2))
    where = tmp_path / "killed"
    total = len(list(where.parent.glob("whole/passes/*/counts-*.json")))
    for share in (0.1, 0.5, 0.8):
        killed(
            where,
            table(file, shard_mb=0.2),
            lambda share=share: len(list(where.glob("passes/*/counts-*"))) > share * total,
        )
    assert not (where / "tables/steps.jsonl").exists()
    resumed = run_stage(where, table(file, shard_mb=0.2))
    assert resumed.rows == undisturbed.rows
    assert resumed.removed == undisturbed.removed
    assert resumed.counts() == undisturbed.counts()


def test_processes_share_the_shards_out(tmp_path: Path):
    file = write_lines(tmp_path / "rows.jsonl", rows(3000))
    alone = run_stage(tmp_path / "alone" / "curate", table(file))
    recipe = tmp_path / "shared.toml"
    steps = "".join(
        "[[curate.steps]]\n"
        + "".join(f"{k} = {json.dumps(v).replace(': ', ' = ')}\n" for k, v in one.items())
        for one in STEPS
    )
    head = f'[curate]\nshard_mb = 0.01\nsources = [{{ paths = "{file}", name = "rows" }}]\n'
    recipe.write_text(head + steps)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tessera", "run", str(recipe), "--runs", str(tmp_path), "-q"]
    command[-1] = "--quiet"
    root = Path(__file__).parents[2]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    jobs = [
        subprocess.Popen(command, cwd=root, env={**os.environ, **common, "RANK": str(rank)})
        for rank in range(2)
    ]
    assert [job.wait(120) for job in jobs] == [0, 0]
    assert Curated(tmp_path / "shared/curate").rows == alone.rows
    assert Curated(tmp_path / "shared/curate").counts() == alone.counts()


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x1c", "\r", "\x0b"])
def test_what_ends_a_line_elsewhere_ends_none_here(curate: Curate, mark: str):
    """JSON may hold U+2028 as it is: a reader that cuts with `splitlines` sees half a row."""
    row = {"messages": [{"role": "user", "content": f"a{mark}b"}], "license": f"l{mark}"}
    licence = {"step": "licence", "allow": [f"l{mark}"]}
    made = curate([row, {**row, "license": f"m{mark}"}], [licence, {"step": "order"}])
    assert [one["messages"] for one in made.rows] == [row["messages"]]
    assert made.removed[0]["reason"] == f"license m{mark}"
    assert [one["reason"] for one in read_table(made.path, "reasons")] == [f"license m{mark}"]


def test_too_many_broken_records_are_an_error(curate: Curate):
    with pytest.raises(DataError, match="2 of 12 records are broken"):
        curate([*rows(10), 1, 2], [])


def test_a_pipeline_that_leaves_nothing_says_where(curate: Curate):
    with pytest.raises(DataError, match='the step "1 length" left none'):
        curate(rows(10), [{"step": "length", "min": 10_000}])


def test_rows_of_tables_become_chats(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    found = [{"text": "1 + 1?", "solution": "#### 2", "level": 3}, {"text": " ", "solution": "x"}]
    parquet.write_table(pyarrow.Table.from_pylist(found), tmp_path / "rows.parquet")
    source = {
        "paths": str(tmp_path / "rows.parquet"),
        "question": "text",
        "answer": "solution",
        "license": "mit",
        "labels": {"category": "math"},
    }
    steps = [{"step": "extract_answer", "to": "expected_answer"}]
    made = run_stage(tmp_path / "run", {"sources": [source], "steps": steps, "max_bad": 0.5})
    (row,) = made.rows
    assert row["expected_answer"] == "2" and row["level"] == 3
    assert (row["license"], row["category"], row["source"]) == ("mit", "math", "rows")
    assert made.removed[0]["reason"] == "text is no text"


def test_broken_records_keep_their_place(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"messages": [{"role": "user", "content": "x"}]}\n\n\xff\n[1]\n')
    source = SourceConfig(paths=str(file))
    (shard,) = plan_shards([source], 1)
    bad = [one for one in read_shard(shard, source) if isinstance(one, Bad)]
    assert [(one.line, one.reason) for one in bad] == [
        (3, "not UTF-8 (invalid start byte)"),
        (4, "a list, not an object"),
    ]
