"""A model of tessera as the teacher: `kind = "engine"`, in the process of the stage."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tessera.ask.ask import AskError
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
