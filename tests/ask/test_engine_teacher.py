"""A model of tessera as the teacher: `kind = "engine"`, in the process of the stage."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tessera.ask.ask import AskError
from tessera.data.readers import DataError
from tessera.pipeline import STAGES, run_recipe
from tessera.rl import profile
from tessera.runs.plan import plan
from tessera.runs.recipe import loads
from tessera.runs.run import read_table
from tests.curate.conftest import run_stage, write_lines

NAMES = ("dog", "cat", "girl", "tree")


def table(where: Path, batch: int) -> dict[str, Any]:
    asked = [{"q": f"Once upon a time, there was a little {name}."} for name in NAMES]
    file = write_lines(where / "questions.jsonl", asked)
    return {
        "sources": [{"paths": str(file), "question": "q"}],
        "steps": [{"step": "generate", "n": 2, "mode": "off", "max_tokens": 400}],
        "teachers": {"teacher": {"kind": "engine", "asking": "text", "batch": batch}},
    }


def test_an_answer_does_not_depend_on_who_is_asked_beside(tmp_path: Path, shared: Path):
    model = shared / "models/stories260k"
    found = [run_stage(tmp_path / str(n), table(tmp_path, n), model=model) for n in (1, 3, 64)]
    assert found[0].counts()["1 generate"] == (4, 8)
    assert found[0].rows == found[1].rows == found[2].rows
    asked = Counter(row["messages"][-2]["content"] for row in found[0].rows)
    assert set(asked.values()) == {2} and len(asked) == 4
    assert len({row["messages"][-1]["content"] for row in found[0].rows}) == 8


def test_a_teacher_of_this_process_needs_a_model(tmp_path: Path):
    with pytest.raises(AskError, match="model = "):
        run_stage(tmp_path / "run", table(tmp_path, 8))


def test_a_recipe_trains_on_what_its_parent_says(tmp_path: Path):
    """A recipe's `curate` asks its parent, and `data` and `profile` read the answers."""
    questions = write_lines(tmp_path / "q.jsonl", [{"q": f"Name {name}."} for name in NAMES])
    recipe = f"""
name = "said"
[data-begin]
stage = "data"
tokenizer = {{ bpe = 290, chat = true }}
tasks = {{ calc = 60 }}
[parent]
architecture = {{ hidden_size = 16, num_hidden_layers = 1, intermediate_size = 16 }}
train = {{ steps = 1, tokens_per_step = 160, microbatch_tokens = 160, sequence_length = 160 }}
[curate]
model = "parent"
sources = [{{ paths = "{questions}", question = "q" }}]
steps = [{{ step = "generate", mode = "off", max_tokens = 5, truncated = "keep" }}]
teachers.teacher = {{ kind = "engine", switch = "none" }}
[data]
model = "parent"
chats = "curate"
sources.said = {{ paths = "chats", format = "chat", switch = "none" }}
[profile]
chats = "curate"
paths = ["chats"]
samples = 0
"""
    run_recipe(loads(recipe), tmp_path, quiet=True)
    rows = read_table(tmp_path / "said/data", "summary")
    assert sum(row["documents"] for row in rows) == len(NAMES)
    asked = [one.messages[-1]["content"] for one in profile.read(tmp_path / "said/profile")]
    assert asked == [f"Name {name}." for name in NAMES]
    unnamed = recipe.replace('chats = "curate"\nsources', "sources").replace("said", "unnamed", 1)
    (step,) = [s for s in plan(loads(unnamed), tmp_path, (), STAGES) if s.name == "data"]
    assert any('say which, chats = "RUN"' in told for told in step.warnings([step]))
    with pytest.raises(DataError, match='say which, chats = "RUN"'):
        run_recipe(loads(unnamed), tmp_path, quiet=True)
