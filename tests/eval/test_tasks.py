"""Every task is asked of an oracle that knows the answers: gold is right, and near it is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tessera.ask.ask import Receive, Reply, Request
from tessera.data.thought import CLOSE, OPEN
from tessera.eval import scores
from tessera.eval.answers import Asker, Conversation, Sampling, answer, conversations
from tessera.eval.task import Data, EvalError, Item, Task, ask
from tessera.eval.tasks import TASKS, find
from tessera.eval.tasks.judged import duels, marks, mean_mark, win_share
from tessera.eval.tasks.tools import read_calls
from tessera.runs.files import Journal
from tests.eval.bfcl_calls import CONTRADICT, possible, said

Say = Callable[[Item], str]


class Oracle:
    """A teacher that knows what to say to each item."""

    model = "oracle"

    def __init__(self, items: Iterable[Item], say: Say, thinks: bool = False) -> None:
        self.said = {item.messages[-1]["content"]: say(item) for item in items}
        self.thinks, self.asked = thinks, 0

    def ask(self, requests: Iterable[Request], receive: Receive, working: Any = None) -> None:
        for request in requests:
            self.asked += 1
            text = self.said[request.messages[-1]["content"]]
            receive(request, Reply(text, "Let me see." if self.thinks else None, "stop", 7))


def scored(task: Task, items: list[Item], say: Say, folder: Path) -> dict:
    oracle = Oracle(items, say)
    with Journal(folder / "records.jsonl") as records, Journal(folder / "verdicts.jsonl") as kept:
        chats = list(conversations(task, items, ["off"], {"off": Sampling()}, 64))
        answer(chats, Asker(oracle, False), records, label="", quiet=True)
        return scores.summary(
            task, "off", scores.score(chats, task, kept, 2, quiet=True), failed=[]
        )


def drawn(shared: Path, name: str, limit: int = 40) -> tuple[Task, list[Item]]:
    task = find(name)
    return task, list(islice(task.read(Data(name, str(shared / "data"))), limit))


MATHS = ["gsm8k", "math500", "aime24", "aime25", "aime26", "amc23"]


@pytest.mark.parametrize("name", MATHS)
def test_gold_is_right_and_another_number_is_not(shared, tmp_path: Path, name: str):
    task, items = drawn(shared, name, 30)
    box = scored(task, items, lambda item: f"So \\boxed{{{item.fields['answer']}}}", tmp_path)
    assert (box["value"], box["unjudged"], box["items"]) == (1.0, 0, len(items))
    other = scored(task, items, lambda item: "So \\boxed{-314159}", tmp_path / "other")
    assert (other["value"], other["unjudged"]) == (0.0, 0)


def test_every_question_of_mathematics_asks_for_one_box(shared):
    for name in MATHS:
        _, items = drawn(shared, name, 20)
        assert all(item.messages[-1]["content"].count("\\boxed") == 1 for item in items), name


def test_reference_code_passes_and_code_without_a_body_does_not(shared, tmp_path: Path):
    rows = (shared / "data" / "humaneval" / "HumanEval.jsonl").read_text().splitlines()[:12]
    gold = {
        row["task_id"]: row["prompt"] + row["canonical_solution"] for row in map(json.loads, rows)
    }
    task, items = drawn(shared, "humaneval", 12)
    assert scored(task, items, lambda i: f"```python\n{gold[i.id]}\n```", tmp_path)["value"] == 1.0
    rows = (shared / "data" / "mbpp" / "mbpp.jsonl").read_text().splitlines()
    gold = {str(row["task_id"]): row["code"] for row in map(json.loads, rows)}
    task, items = drawn(shared, "mbpp", 12)
    assert items[0].id == "11"  # the test split begins here
    assert scored(task, items, lambda i: f"```python\n{gold[i.id]}\n```", tmp_path)["value"] == 1.0
    empty = scored(task, items, lambda i: "```python\npass\n```", tmp_path / "empty")
    assert (empty["value"], empty["unjudged"]) == (0.0, 0)


def test_ifeval_agrees_with_the_official_verdicts(shared, tmp_path: Path):
    """330 of 432 prompts and 556 of 666 instructions, strict, are what the files count."""
    folder = shared / "data" / "ifeval"
    said = {r["prompt"]: r["response"] for r in _lines(folder / "gpt4_responses.jsonl")}
    task, items = drawn(shared, "ifeval", 500)
    known = [item for item in items if item.messages[-1]["content"] in said][:120]
    verdicts = {r["prompt"]: r for r in _lines(folder / "gpt4_verdicts_strict.jsonl")}
    row = scored(task, known, lambda i: said[i.messages[-1]["content"]], tmp_path)
    theirs = [verdicts[item.messages[-1]["content"]] for item in known]
    follows = [flag for one in theirs for flag in one["follow_instruction_list"]]
    share = sum(one["follow_all_instructions"] for one in theirs) / len(theirs)
    assert row["value"] == pytest.approx(share, abs=0.02)
    assert row["instruction_strict"] == pytest.approx(sum(follows) / len(follows), abs=0.02)
    assert row["prompt_loose"] >= row["value"]


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


BFCL = [
    name
    for name in TASKS
    if name.startswith("bfcl_") and name != "bfcl_live" and "multi_turn" not in name
]


@pytest.mark.parametrize("name", BFCL)
def test_possible_calls_are_right_and_a_strange_argument_is_not(shared, tmp_path: Path, name: str):
    task, items = drawn(shared, name, 30)
    items = [item for item in items if item.id not in CONTRADICT]
    right = scored(task, items, _calls, tmp_path)
    assert (right["value"], right["unjudged"]) == (1.0, 0)
    strange = scored(task, items, lambda item: _calls(item, strange=True), tmp_path / "strange")
    assert strange["value"] == (1.0 if name == "bfcl_live_relevance" else 0.0)


def _calls(item: Item, strange: bool = False) -> str:
    wanted = item.fields["calls"]
    if wanted == "none" and not strange:
        return "None of the tools fits."
    calls = [] if wanted in ("none", "any") else possible(item)[::-1]
    calls = calls or [("any", {})]
    if strange:
        calls[0][1]["strange argument"] = 1
    return said(calls)


def test_calls_are_read_in_the_papers_form_and_in_pythons():
    json_form = '<TOOLCALL>[{"name": "f", "arguments": {"a": 1}}]</TOOLCALL>'
    assert read_calls(json_form) == read_calls("[f(a=1)]") == [("f", {"a": 1})]
    assert read_calls("I need no tool.") == []
    assert read_calls('<TOOLCALL>[{"name": "f", "arg') is None
    assert read_calls("[__import__('os')]") != [("f", {})]
    assert read_calls("[f(a=g())]") is None
    assert read_calls("[" * 100_000) is None


def test_a_judges_marks_and_duels_are_read_or_are_missing(shared):
    assert mean_mark(["good. Rating: [[8]]", "[[3]] no: Rating: [[6]]"]) == 7.0
    assert mean_mark(["Rating: [[11]]"]) is None
    assert mean_mark(["Rating: eight"]) is None
    assert win_share(["[[A>>B]]", "[[B>A]]"]) == 1.0  # ours first and ours second: two wins
    assert win_share(["[[A>B]]", "[[A>B]]"]) == 0.5  # the judge likes whoever comes first
    assert win_share(["[[A>B]]", "neither"]) is None
    _, (item,) = drawn(shared, "mt_bench", 1)
    thought = f"{OPEN}secret{CLOSE}one"
    chat = [
        *item.messages,
        {"role": "assistant", "content": thought},
        {"role": "user", "content": item.follow_ups[0]},
        {"role": "assistant", "content": "two"},
    ]
    first, second = marks(item, chat)
    assert "two" not in first[-1]["content"] and "two" in second[-1]["content"]
    assert "secret" not in second[-1]["content"]
    _, (item,) = drawn(shared, "arena_hard", 1)
    ours, theirs = duels(item, [*item.messages, {"role": "assistant", "content": "MINE"}])
    assert ours[-1]["content"].index("MINE") < theirs[-1]["content"].index("MINE")


def test_the_second_turn_is_asked_after_the_first_answer(shared, tmp_path: Path):
    task, items = drawn(shared, "mt_bench", 3)
    said = {item.follow_ups[0]: f"second {item.id}" for item in items}
    oracle = Oracle(items, lambda item: f"first {item.id}")
    oracle.said |= said
    with Journal(tmp_path / "records.jsonl") as records:
        chats: list[Conversation] = list(
            conversations(task, items, ["off"], {"off": Sampling()}, None)
        )
        answer(chats, Asker(oracle, False), records, label="", quiet=True)
    for chat in chats:
        roles = [message["role"] for message in chat.messages]
        assert roles == ["user", "assistant", "user", "assistant"]
        assert chat.messages[-1]["content"] == f"second {chat.item.id}"
    assert oracle.asked == 6


def test_follow_ups_are_said_one_after_each_answer():
    item = Item("x", ask("one", "system"), follow_ups=("two", "three"))
    task, chat = find("mt_bench"), list(item.messages)
    found = []
    for _ in range(3):
        chat.append({"role": "assistant", "content": "yes"})
        found.append(task.goes_on(item, chat))
        chat.append({"role": "user", "content": str(found[-1])})
    assert found == ["two", "three", None]


def test_needles_stand_where_they_are_said_to_and_can_be_found():
    task = find("needles@400")
    for item in islice(task.read(Data("needles@400")), 22):
        text = item.messages[-1]["content"]
        assert text.count(item.fields["answer"]) == 1
        place = text.index(item.fields["answer"]) / len(text)
        assert place == pytest.approx(item.groups["depth"] / 10, abs=0.25)
        assert 400 <= len(text.split()) < 480


def test_procedural_questions_are_held_out_and_each_asked_once():
    from tessera.data.problems import split_of

    items = list(islice(find("calc@4").read(Data("calc@4")), 200))
    questions = [item.messages[-1]["content"] for item in items]
    assert len(set(questions)) == 200
    assert {split_of(question) for question in questions} == {"heldout"}


def test_wishes_are_judged_as_ifeval_is():
    task = find("wish@2")
    items = list(islice(task.read(Data("wish@2")), 5))
    assert [one.name for one in task.measures] == [one.name for one in TASKS["ifeval"].measures]
    assert all(item.fields["instructions"] == 2 for item in items)


@pytest.mark.parametrize(
    ("name", "says"),
    [("gms8k", "gsm8k"), ("calc@six", "number"), ("sortt", "sort")],
)
def test_a_task_that_is_none_is_answered_with_the_nearest(name: str, says: str):
    with pytest.raises(EvalError, match=says):
        find(name)


def test_missing_data_are_answered_with_what_to_give(tmp_path: Path):
    with pytest.raises(EvalError, match=r"--data DIR that holds gsm8k/test.jsonl"):
        list(find("gsm8k").read(Data("gsm8k")))
    with pytest.raises(EvalError, match="not there"):
        list(find("gsm8k").read(Data("gsm8k", str(tmp_path))))
