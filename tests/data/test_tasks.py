from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tessera.cli.main import app
from tessera.data.conversation import Chat, fault
from tessera.data.dialects import read_chats
from tessera.data.problems import (
    Problem,
    completion,
    document,
    problem,
    problem_chat,
    split_of,
)
from tessera.data.thought import Thought, split_message
from tessera.rl.verifiers.instructions import read_instructions


def check_calc(drawn: Problem) -> bool:
    """Works the problem out from its text alone."""
    start, *steps = re.fullmatch(r"start (\d) (.+) mod 10", drawn.question).groups()  # type: ignore[union-attr]
    value, work = int(start), []
    for step in steps[0].split():
        value = {"+": value + int(step[2]), "-": value - int(step[2]), "*": value * int(step[2])}[
            step[1]
        ] % 10
        work.append(f"{step}={value}")
    return drawn.work == " ".join(work) and drawn.answer == str(value) and len(work) == drawn.level


def check_sort(drawn: Problem) -> bool:
    letters = drawn.question.split()[1:]
    return drawn.answer.split() == sorted(letters) and drawn.work.split()[-1] == "".join(
        sorted(letters)
    )


def check_compare(drawn: Problem) -> bool:
    left, right = map(int, re.findall(r"\d+", drawn.question))
    return left != right and int(drawn.answer) == max(left, right) and drawn.work[-2] != "="


def check_hop(drawn: Problem) -> bool:
    """Walks the table from its text alone; the ring may be walked again beyond ten digits."""
    table, rest = re.fullmatch(r"table (.+) start=(.+) stop", drawn.question).groups()  # type: ignore[union-attr]
    follows, (at, *labels) = dict(entry.split("=") for entry in table.split()), rest.split()
    work = []
    for label in labels:
        work.append(f"{label} {at}={follows[at]}")
        at = follows[at]
    ring = len(follows) == len(set(follows.values())) == min(drawn.level + 2, 10)
    return ring and (drawn.work, drawn.answer) == (" ".join(work), at) and len(work) == drawn.level


def check_story(drawn: Problem) -> bool:
    """Works the events out from their words alone."""
    start, *told = map(int, re.findall(r"\d+", drawn.question))
    events = drawn.question.split(". ")[1:-1]
    signs = [1 if event.split()[1] in ("buy", "find", "get", "win") else -1 for event in events]
    value = start + sum(sign * n for sign, n in zip(signs, told, strict=True))
    return drawn.answer == str(value) and len(events) == drawn.level and 0 < value <= 20


CHECKS = {
    "calc": check_calc,
    "hop": check_hop,
    "sort": check_sort,
    "compare": check_compare,
    "story": check_story,
}


@pytest.mark.parametrize("name", CHECKS)
def test_answers_are_right_at_every_level(name: str) -> None:
    for level in range(1, 9):
        for index in range(30):
            drawn = problem(name, seed=3, index=index, level=level)
            assert drawn.level == level and CHECKS[name](drawn), drawn


def test_the_document_of_calc() -> None:
    drawn = Problem(
        "calc", "start 6 m+3 n*3 o-3 p-3 mod 10", "m+3=9 n*3=7 o-3=4 p-3=1", "1", level=4
    )
    assert check_calc(drawn)
    assert drawn.text() == (
        "start 6 m+3 n*3 o-3 p-3 mod 10\nWork: m+3=9 n*3=7 o-3=4 p-3=1\nAnswer: 1"
    )
    assert drawn.text(work=False) == "start 6 m+3 n*3 o-3 p-3 mod 10\nAnswer: 1"


@pytest.mark.parametrize("name", CHECKS)
def test_no_question_stands_in_both_splits(name: str) -> None:
    train = {document(name, 0, i).split("\n")[0] for i in range(2000)}
    heldout = {document(name, 1, i, "heldout").split("\n")[0] for i in range(300)}
    assert not train & heldout
    assert {split_of(q) for q in train} == {"train"}
    assert {split_of(q) for q in heldout} == {"heldout"}


@pytest.mark.parametrize("name", CHECKS)
def test_a_document_is_a_function_of_seed_and_index(name: str) -> None:
    documents = [document(name, 0, i) for i in range(300)]
    assert documents == [document(name, 0, i) for i in reversed(range(300))][::-1]
    assert len(set(documents)) > 280
    assert len(set(documents) & {document(name, 1, i) for i in range(300)}) < 20


def test_three_documents_in_four_show_their_work_and_all_letters_occur() -> None:
    documents = [document("calc", 0, i) for i in range(2000)]
    assert 0.72 < sum("Work:" in d for d in documents) / 2000 < 0.78
    facts = {step[1:3] for d in documents for step in d.split(" mod")[0].split()[2:]}
    assert facts == {f"{s}{d}" for s in "+-" for d in range(1, 6)} | {"*2", "*3"}
    assert len({step[0] for d in documents for step in d.split(" mod")[0].split()[2:]}) == 26


def test_wishes_are_ones_that_the_checkers_know_and_held_out_with_their_constraints() -> None:
    train = [problem("wish", 0, i, "train", 1 + i % 4) for i in range(2000)]
    held = [problem("wish", 1, i, "heldout", 1 + i % 4) for i in range(400)]
    said: list[set[str]] = []
    for drawn in (train, held):
        found = [
            (asked.name, str(asked.arguments))
            for one in drawn
            for asked in read_instructions(one.fields["instruction_id_list"], one.fields["kwargs"])
        ]
        assert len({name for name, _ in found}) == 15
        assert all(len(one.fields["kwargs"]) == one.level for one in drawn)
        assert all(len(set(one.fields["instruction_id_list"])) == one.level for one in drawn)
        said.append(
            {f"{name} {given}" for name, given in found if given != "{}" and "P.S." not in given}
        )
    assert not said[0] & said[1] and len(said[1]) > 60
    assert not {one.question for one in train} & {one.question for one in held}
    with pytest.raises(ValueError, match="wish has no answer to train on: let a model answer it"):
        document("wish", 0, 0)


def test_errors() -> None:
    with pytest.raises(ValueError, match="no task \"clac\"; did you mean 'calc'"):
        document("clac", 0, 0)
    with pytest.raises(ValueError, match="give 1 or more"):
        problem("calc", 0, 0, level=0)


@pytest.mark.parametrize("name", CHECKS)
def test_a_problem_as_a_chat_in_both_variants(name: str) -> None:
    drawn = problem(name, 0, 3)
    on, off = drawn.chat("on"), drawn.chat("off")
    assert fault(on) is None and fault(off) is None
    wanted = Thought(f"Work: {drawn.work}", f"Answer: {drawn.answer}", True)
    assert split_message(on.messages[-1]) == wanted
    assert split_message(off.messages[-1]) == Thought(None, f"Answer: {drawn.answer}")
    assert [problem_chat(name, 0, i).mode for i in range(4)] == ["on", "off"] * 2


def test_rows_of_problems_are_written_and_read(tmp_path: Path) -> None:
    run, train, held = CliRunner(), tmp_path / "train.jsonl", tmp_path / "heldout.jsonl"
    words = ["data", "tasks", "calc"]
    assert run.invoke(app, [*words, str(train), "--count", "200"]).exit_code == 0
    more = [str(held), "--count", "50", "--split", "heldout", "--level", "4"]
    assert run.invoke(app, [*words, *more, "--dialect", "openai"]).exit_code == 0
    chats = {path: [chat for _, chat in read_chats(path)] for path in (train, held)}
    assert [len(found) for found in chats.values()] == [400, 100]
    asked = {
        path: {chat.messages[-2]["content"] for chat in found if isinstance(chat, Chat)}
        for path, found in chats.items()
    }
    assert not asked[train] & asked[held]
    assert all(isinstance(chat, Chat) and chat.extra["level"] == 4 for chat in chats[held])
    for wrong in (["--split", "test"], ["--dialect", "xml"]):
        assert run.invoke(app, [*words, str(train), *wrong]).exit_code == 2
    assert run.invoke(app, ["data", "tasks", "clac", str(train)]).exit_code == 2


def test_without_reasoning_gym_its_tasks_name_the_extra() -> None:
    if importlib.util.find_spec("reasoning_gym"):
        pytest.skip("reasoning-gym is installed")
    with pytest.raises(ValueError, match=r"pip install 'tessera\[gym\]'"):
        problem("gym/chain_sum", 0, 0)


def test_tasks_of_reasoning_gym() -> None:
    pytest.importorskip("reasoning_gym", reason="needs the extra `gym`")
    found = [problem("gym/chain_sum", 0, i) for i in range(40)]
    assert found == [problem("gym/chain_sum", 0, i) for i in range(40)]
    assert {one.split for one in found} == {"train"} and {one.level for one in found} == {
        1,
        2,
        3,
        4,
    }
    assert problem("gym/chain_sum", 0, 0, "heldout").split == "heldout"
    for one in found:
        terms = one.question.removesuffix(" =").split(": ")[1]
        assert str(eval(terms)) == one.answer
    easy, hard = (
        [len(problem("gym/chain_sum", 0, i, level=n).question) for i in range(60)] for n in (1, 4)
    )
    assert sum(easy) < sum(hard)
    with pytest.raises(ValueError, match="shows no work to think"):
        found[0].chat("on")
    assert fault(found[0].chat("off")) is None
    with pytest.raises(ValueError, match='did you mean "gym/chain_sum"'):
        problem("gym/chain_sun", 0, 0)
    with pytest.raises(ValueError, match="no answer in words"):
        problem("gym/rush_hour", 0, 0)


def test_a_completion_is_the_document_behind_its_question():
    for index in range(50):
        asked, solved = completion("calc", 3, index)
        assert asked + solved == document("calc", 3, index)
        assert asked.endswith("\n") and "Answer: " in solved and "Answer" not in asked


@pytest.mark.parametrize(("name", "named"), [("calc", "[a-z].."), ("hop", "[a-z]")])
def test_hasty_thoughts_skip_results_and_keep_the_last_and_the_answer(name: str, named: str):
    share = 0
    for index in range(200):
        plain = problem_chat(name, 3, index, mode="on").messages[-1]["content"]
        hasty = problem_chat(name, 3, index, mode="on", hasty=0.5).messages[-1]["content"]
        share += plain != hasty
        assert hasty.split("</think>")[1] == plain.split("</think>")[1]
        last = plain.split("\n</think>")[0].split(" ")[-1]
        assert hasty.split("\n</think>")[0].endswith(last)
        steps = [re.findall(rf"(?<= ){named}(?= |=|\n)", text) for text in (hasty, plain)]
        assert steps[0] == steps[1] != []
    assert 50 < share < 110
