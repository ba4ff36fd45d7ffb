from __future__ import annotations

import re

import pytest

from tessera.data.tasks import TASKS, Problem, document, problem, split_of


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


CHECKS = {"calc": check_calc, "sort": check_sort, "compare": check_compare}


@pytest.mark.parametrize("name", TASKS)
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


@pytest.mark.parametrize("name", TASKS)
def test_no_question_stands_in_both_splits(name: str) -> None:
    train = {document(name, 0, i).split("\n")[0] for i in range(2000)}
    heldout = {document(name, 1, i, "heldout").split("\n")[0] for i in range(300)}
    assert not train & heldout
    assert {split_of(q) for q in train} == {"train"}
    assert {split_of(q) for q in heldout} == {"heldout"}


@pytest.mark.parametrize("name", TASKS)
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


def test_errors() -> None:
    with pytest.raises(ValueError, match='no task "clac"; did you mean "calc"'):
        document("clac", 0, 0)
    with pytest.raises(ValueError, match="give 1 or more"):
        problem("calc", 0, 0, level=0)
