"""Answers are kept as they end: a process that is killed within its first batch loses none."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tessera.data.tokenizer import load_tokenizer
from tessera.pipeline import run_recipe
from tessera.runs.recipe import loads

BASE = """
[data]
tokenizer = { bpe = 290, chat = true }
tasks = { calc = 60 }
[parent]
architecture = { hidden_size = 16, num_hidden_layers = 2, intermediate_size = 16 }
train = { steps = 3, tokens_per_step = 480, microbatch_tokens = 160, sequence_length = 160 }
"""
STAGES = {
    "eval": """
[eval]
tasks = ["calc@1"]
limit = 8
max_tokens = 24
none = { temperature = 1.0, samples = 3 }
workers = 1
""",
    "profile": """
[profile]
tasks = { "calc@2" = 6 }
samples = 4
max_tokens = 24
drop_from = 2.0
drop_to = -1.0
rewards = [{ kind = "exact" }]
workers = 1
""",
    "curate": """
[curate]
model = "parent"
sources = [{ paths = "FILE", question = "q" }]
teachers.teacher = { kind = "engine" }
[[curate.steps]]
step = "generate"
n = 4
mode = "off"
max_tokens = 24
truncated = "keep"
""",
}
JOURNALS = {
    "eval": "records.jsonl",
    "profile": "samples.jsonl",
    "curate": "passes/01/journal-00000.jsonl",
}
KILLED_AFTER = 5
# Runs a recipe in a home, and kills itself, by the signal that nobody can catch, after some rows.
CHILD = """
import os, signal, sys
from pathlib import Path
from tessera.pipeline import run_recipe
from tessera.runs.files import Journal
from tessera.runs.recipe import loads

add, rows = Journal.add, []

def counted(self, key, row):
    add(self, key, row)
    rows.append(key)
    if len(rows) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

Journal.add = counted
run_recipe(loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), quiet=True)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("base")
    run_recipe(loads(BASE), home, quiet=True)
    return home


def rows(path: Path) -> dict[str, dict[str, Any]]:
    read = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["key"]: row for row in read}


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_within_the_first_batch_loses_no_answer(stage: str, base: Path, tmp_path: Path):
    asked = tmp_path / "questions.jsonl"
    asked.write_text("".join(json.dumps({"q": f"What is {n} + {n}?"}) + "\n" for n in range(4)))
    recipe = BASE + STAGES[stage].replace("FILE", str(asked))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    shutil.copytree(base, whole)
    shutil.copytree(base, broken)
    file = tmp_path / "recipe.toml"
    file.write_text(recipe)
    child = [sys.executable, "-c", CHILD, str(file), str(broken), str(KILLED_AFTER)]
    assert subprocess.run(child, check=False).returncode == -signal.SIGKILL
    left = rows(broken / "recipe" / stage / JOURNALS[stage])
    assert len(left) == KILLED_AFTER  # each was on disk before the next one ended
    for home in (broken, whole):
        run_recipe(loads(recipe), home, quiet=True)
    check = results if stage == "curate" else journals
    check(broken / "recipe" / stage, whole / "recipe" / stage, left, stage)
    tokenizer = load_tokenizer(base / "recipe" / "parent")
    for row in left.values():
        reply = row.get("reply", row)
        last = row["messages"][-1]["content"]
        assert row["messages"][-1]["role"] == "user" and last in reply["prompt"]
        ids = tokenizer.encode(reply["prompt"], special=True)
        assert tokenizer.decode(ids, special=True) == reply["prompt"] and reply["tokens"] <= 24


def journals(broken: Path, whole: Path, left: dict[str, Any], stage: str) -> None:
    """The records of both are equal, and those that the killed process wrote are untouched."""
    found, expected = (rows(home / JOURNALS[stage]) for home in (broken, whole))
    assert found == expected and len(found) == 24
    assert {key: found[key] for key in left} == left
    lines = (broken / JOURNALS[stage]).read_text().splitlines()
    assert len(lines) == len(found)  # none was made twice
    assert rows(broken / "verdicts.jsonl") == rows(whole / "verdicts.jsonl")


def results(broken: Path, whole: Path, left: dict[str, Any], stage: str) -> None:
    """The journal goes with its shard; the rows made of it are the same."""
    found, expected = (
        [path.read_text() for path in sorted((home / "chats").iterdir())]
        for home in (broken, whole)
    )
    assert found == expected
    texts = "".join(found)
    for row in left.values():  # a mark of thought, which a toy says anywhere, parts a reply
        parts = row["reply"]["text"].replace("</think>", "<think>").split("<think>")
        assert all(json.dumps(part.strip(), ensure_ascii=False)[1:-1] in texts for part in parts), (
            parts
        )
