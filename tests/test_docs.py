"""The snippets of docs/extending.md do what the page says."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tessera.data import tasks
from tessera.eval.task import Data
from tessera.eval.tasks.procedural import find
from tessera.rl.rewards import Sample
from tessera.rl.rubric import Rubric
from tessera.rl.verifiers.outcome import Outcome

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def snippets(language: str) -> Iterator[str]:
    yield from re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def named(file: str) -> str:
    return next(code for code in snippets("python") if code.startswith(f"# {file}"))


def test_every_snippet_is_short():
    assert all(len(code.splitlines()) < 40 for code in (*snippets("python"), *snippets("toml")))


def test_the_reward_judges_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "rewards.py").write_text(named("rewards.py"))
    monkeypatch.syspath_prepend(tmp_path)
    (recipe,) = snippets("toml")
    from pydantic import TypeAdapter

    from tessera.rl.rewards import Reward

    rewards = TypeAdapter(list[Reward]).validate_python(tomllib.loads(recipe)["grpo"]["rewards"])
    given = [Sample([], text, {"answer": "4"}) for text in ("Answer: 4", "no " * 30, "<think>on")]
    with Rubric(rewards, 1) as rubric:
        short, long, none = rubric(given)
    assert (short.reward, long.reward, none.reward) == (1.2, 0.0, None)
    assert none.parts["function"] == Outcome("could-not-judge", None, "there is no answer")


def test_the_benchmark_reads_its_rows(tmp_path: Path):
    space: dict = {"__name__": "capitals"}
    exec(named("tessera/eval/tasks/capitals.py"), space)
    (tmp_path / "capitals.jsonl").write_text(json.dumps({"country": "France", "capital": "Paris"}))
    (task,) = space["TASKS"]
    (item,) = task.read(Data("capitals", str(tmp_path)))
    assert item.fields["answer"] == "Paris" and "France" in item.messages[-1]["content"]
    assert task.metric == "accuracy"


def test_the_family_is_held_out_by_its_text_and_can_be_evaluated(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    space: dict = {"__name__": "reverse"}
    exec(named("tessera/data/tasks.py"), space)
    drawn = space["reverse"](np.random.default_rng(0), 5)
    letters = drawn.question.split()[1:]
    assert drawn.answer == "".join(reversed(letters)) and drawn.work.split()[-1] == drawn.answer
    train, held = (
        {tasks.problem("reverse", 0, i, s).question for i in range(99)}
        for s in ("train", "heldout")
    )
    assert not train & held
    assert find("reverse@5") is not None
