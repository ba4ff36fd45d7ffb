"""Stages that train nothing share their work over processes, and give what one process gives.

One recipe is run in this process. Its shared stages are run again in two processes, and in four, of
which two and two hold a model together.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tessera.pipeline import run_recipe
from tessera.puzzle import score
from tessera.runs.recipe import load
from tessera.runs.run import read_json, read_table
from tests.test_dist import run_ranks

TRAIN = "{ steps = 2, tokens_per_step = 96, microbatch_tokens = 96, sequence_length = 32 }"
RECIPE = f"""
name = "r"
[data]
tokenizer = {{ bpe = 259, chat = true }}
tasks = {{ calc = 60 }}
heldout = 0.2
[parent]
train = {TRAIN}
[parent.architecture]
hidden_size = 16
num_hidden_layers = 3
num_attention_heads = 2
num_key_value_heads = 2
intermediate_size = 16
max_position_embeddings = 256
[bld]
train = {TRAIN}
calibration_tokens = 64
space = {{ attention = ["gqa-1", "noop"], ffn = ["50%", "noop"] }}
[score]
tokens = 300
microbatch_tokens = 128
sequence_length = 32
tasks = {{ calc = 3 }}
[cost]
source = "counted"
[search-dropped]
method = "dropped-attention"
constraints = {{ kv_bytes_per_token = "0.4x" }}
[child]
[search]
constraints = {{ parameters = "0.8x" }}
[search.conditional]
rounds = 2
polish = 1
tokens = 128
microbatch_tokens = 64
sequence_length = 32
[frontier]
constraint = "parameters"
points = [0.9, 0.7]
methods = ["mip", "uniform"]
tokens = 96
[fuse]
model = "child"
keep_last = false
tokens = 150
microbatch_tokens = 64
sequence_length = 32
scenario = {{ batch = 1, prompt = 4, new = 2 }}
rounds = 3
[compare]
models = ["child"]
tokens = 150
microbatch_tokens = 64
sequence_length = 32
scenario = {{ batch = 1, prompt = 4, new = 2 }}
rounds = 3
[profile]
model = "parent"
tasks = {{ "calc@2" = 5 }}
samples = 2
max_tokens = 6
rewards = [{{ kind = "format" }}]
drop_from = 1.01
[eval]
model = "parent"
tasks = ["calc@2", "perplexity"]
data = {{ perplexity = "TEXTS" }}
limit = 3
max_tokens = 6
none = {{ temperature = 1.0, samples = 2 }}
workers = 1
[curate]
model = "parent"
shard_mb = 0.00005
sources = [{{ paths = "QUESTIONS", question = "q" }}]
steps = [{{ step = "generate", mode = "off", max_tokens = 150, n = 4 }}]
teachers.teacher = {{ kind = "engine", asking = "text", batch = 16 }}
"""
SHARED = ("score", "search", "frontier", "fuse", "compare", "profile", "eval", "curate")
KEPT = ("samples.jsonl", "records.jsonl", "verdicts.jsonl")
CODE = """
import sys
from tessera.pipeline import run_recipe
from tessera.runs.recipe import load
run_recipe(load(sys.argv[2], sys.argv[3:]), sys.argv[1], quiet=True)
"""


TENSOR = """
[score-tensor]
library = "bld"
tokens = 300
microbatch_tokens = 128
sequence_length = 32
tasks = { calc = 3 }
tensor = 2
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("shares")
    texts = [{"text": f"text {n} of some length"} for n in range(5)]
    (home / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    questions = [{"q": f"What is {n}?"} for n in range(9)]
    (home / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    recipe = RECIPE.replace("TEXTS", str(home / "texts.jsonl"))
    (home / "r.toml").write_text(recipe.replace("QUESTIONS", str(home / "questions.jsonl")))
    run_recipe(load(home / "r.toml"), home / "1", quiet=True)
    return home


def _run_again(home: Path, world: int, more: str, *overrides: str) -> None:
    """The shared stages in some processes, where one was stopped in the middle of scoring."""
    shutil.copytree(home / "1", again := home / str(world))
    for stage in SHARED:
        shutil.rmtree(again / "r" / stage)
    plain = score.score_cells

    def dying(*arguments: Any) -> Iterator[Any]:
        yield from itertools.islice(plain(*arguments), 5)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(score, "score_cells", dying)
        run_recipe(load(home / "r.toml"), again, only=["score"], quiet=True)
    assert len((again / "r/score/state/scores.jsonl").read_text().splitlines()) == 5
    (home / "more.toml").write_text((home / "r.toml").read_text() + more)
    run_ranks(CODE, str(again), str(home / "more.toml"), *overrides, world=world)


@pytest.fixture(scope="module")
def two(home: Path) -> Path:
    _run_again(home, 2, TENSOR)
    return home / "2" / "r"


@pytest.fixture(scope="module")
def four(home: Path) -> Path:
    own = {"search": "search.conditional", "curate": "curate.teachers.teacher"}
    _run_again(home, 4, "", *(f"{own.get(stage, stage)}.tensor=2" for stage in SHARED))
    return home / "4" / "r"


def _assert_same(found: Any, expected: Any) -> None:
    """Equal, numbers to rounding; without what is measured by the clock."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if not key.endswith(("_ms", "_ms_before", "_per_second", "speedup", "promise_error")):
                _assert_same(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            _assert_same(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    else:
        assert found == expected


def _assert_same_run(own: Path, one: Path) -> None:
    tables = sorted(file.name for file in (one / "tables").iterdir())
    assert sorted(file.name for file in (own / "tables").iterdir()) == tables
    for name in tables:
        read = read_table if name.endswith(".jsonl") else read_json
        _assert_same(*(read(path, name.partition(".")[0]) for path in (own, one)))
    for name in KEPT:
        assert _rows(own / name) == _rows(one / name)
    for file in one.glob("chats/*"):
        assert (own / "chats" / file.name).read_text() == file.read_text()
    assert not list(own.rglob(".*.jsonl"))


def _rows(file: Path) -> dict[str, Any]:
    lines = file.read_text().splitlines() if file.is_file() else []
    rows = [json.loads(line) for line in lines]
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: row for row in rows}


@pytest.mark.parametrize("stage", SHARED)
def test_two_processes_give_what_one_gives(stage: str, two: Path, home: Path):
    _assert_same_run(two / stage, home / "1" / "r" / stage)


def test_a_parent_held_by_two_processes_scores_the_same(two: Path, home: Path):
    _assert_same_run(two / "score-tensor", home / "1" / "r" / "score")


@pytest.mark.slow
@pytest.mark.parametrize("stage", SHARED)
def test_two_groups_of_two_give_what_one_gives(stage: str, four: Path, home: Path):
    _assert_same_run(four / stage, home / "1" / "r" / stage)
