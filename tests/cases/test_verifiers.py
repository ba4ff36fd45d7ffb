"""Answers that people met, and the verdicts that a careful mathematician gives."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

import tessera
from tessera.rl.verifiers.answer import boxed, normalized, same_answer
from tessera.rl.verifiers.judge import KINDS, JudgeError
from tessera.rl.verifiers.latex import undressed
from tessera.rl.verifiers.quantity import quantity

CASES = Path(__file__).parent
needs_math = pytest.importorskip("math_verify", reason="needs the extra `rl`")


def rows(name: str, folder: Path = CASES) -> list[dict]:
    text = (folder / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def missed(found: list[dict]) -> list[tuple]:
    verdicts = [(row, tessera.judge(row["kind"], row["answer"], row["gold"])) for row in found]
    return [
        (row["kind"], row["answer"], row["gold"], outcome.verdict, outcome.reason)
        for row, outcome in verdicts
        if outcome.verdict != row["want"]
    ]


def test_each_row_has_its_verdict():
    found = rows("verifiers")
    assert missed(found) == []
    counts = Counter((row["kind"], row["want"]) for row in found)
    assert min(counts["math", verdict] for verdict in ("right", "wrong")) > 100


def test_rows_of_the_issue_have_their_verdicts(shared: Path):
    assert missed(rows("verifiers", shared / "cases")) == []


@pytest.mark.parametrize("row", rows("verifiers"), ids=lambda row: f"{row['kind']}-{row['gold']}")
def test_an_answer_is_itself_in_every_dress(row: dict):
    """What is right stays right in a box, in dollars and in colour; what is wrong stays wrong."""
    kind, gold, want = row["kind"], row["gold"], row["want"]
    if kind != "math" or want == "could-not-judge" or not gold.strip() or "boxed" in gold:
        return
    for dress in (r"\boxed{%s}", r"So it is $\boxed{\color{red}{%s}}$.", r"\[\boxed{ %s }\]"):
        assert tessera.judge(kind, dress % gold, gold).verdict == "right", dress
    if "box" in row["answer"]:
        answer = row["answer"].replace(r"\frac", r"\dfrac")
        outcome = tessera.judge(kind, answer, rf"\boxed{{{gold}}}")
        assert outcome.verdict == want, outcome


def test_undressing_and_normal_forms_are_reached_once():
    for row in rows("verifiers"):
        for text in (row["answer"], row["gold"]):
            assert undressed(undressed(text)) == undressed(text)
            assert normalized(normalized(text)) == normalized(text)


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("2 2/3", "8/3", ""),
        (r"-1\frac12", "-3/2", ""),
        (r"0.1\overline{6}", "1/6", ""),
        ("1 234 567", "1234567", ""),
        (r"\frac{1}{2^{98}}", f"1/{2**98}", ""),
        (r"52_{\text{eight}}", "52_8", ""),
        ("FF_{16}", "FF_16", ""),
        ("5 apples", "5", "apples"),
        ("12cm", "12", "cm"),
        (r"460~\text{kg}", "460", r"\text{kg}"),
        ("2 million", "2000000", ""),
        *((text, None, "") for text in ("3 xy", "5x", "5 or 6", "1,2", "x_1", "9_8", "1/0", "--7")),
    ],
)
def test_numbers_are_read(text: str, value: str | None, unit: str):
    found = quantity(text)
    assert (found and str(found)) == value
    assert found is None or found.unit == unit


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"$x = \boxed{1}$ or $x = \boxed{2}$", "1, 2"),
        (r"\boxed{6} \boxed{6}", "6"),
        (r"\boxed{15\frac{39}{40}}, or \boxed{\frac{639}{40}}", r"\frac{639}{40}"),
        (r"First \boxed{3}, which we double to get \boxed{6}.", "6"),
        (r"\boxed{3}. Then \boxed{6}", "6"),
    ],
)
def test_boxes_that_belong_together_are_one_answer(text: str, found: str):
    assert boxed(text) == found


def test_lists_are_compared_in_order_where_brackets_say_so():
    assert same_answer("(1, 2 2/3)", "(1, 8/3)")
    assert not same_answer("(2, 1)", "(1, 2)")
    assert same_answer(r"\{2, 1\}", "1 and 2")
    assert not same_answer("[0, 1]", "[0, 1)")


def test_judge_says_what_is_allowed():
    with pytest.raises(JudgeError, match="'math'") as error:
        tessera.judge("maths", "1", "1")
    assert all(kind in str(error.value) for kind in KINDS)
    with pytest.raises(JudgeError, match="tolerance"):
        tessera.judge("number", "1", "1", tolerence=0.1)
    with pytest.raises(JudgeError, match="gold"):
        tessera.judge("math", "1")
    with pytest.raises(JudgeError, match="tests"):
        tessera.judge("code", "x = 1")


def test_judge_cuts_thoughts_and_takes_options():
    thought = r"<think>\boxed{1}</think>"
    assert tessera.judge("math", rf"{thought}It is \boxed{{2}}.", 2).verdict == "right"
    assert tessera.judge("math", thought, 1).verdict == "wrong"
    assert tessera.judge("number", "3.1416", 3.14159, tolerance=1e-3).verdict == "right"
    assert tessera.judge("format", f"{thought}2", "on").verdict == "right"
    assert tessera.judge("format", "2", "on").verdict == "wrong"
    names = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    assert tessera.judge("instructions", "a, b", **names).verdict == "wrong"
    nothing = {"instruction_id_list": [], "kwargs": []}
    assert tessera.judge("instructions", "a, b", **nothing).verdict == "could-not-judge"
