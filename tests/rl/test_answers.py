"""Verdicts on answers: exact, numeric, a letter, mathematics, and the form of the thoughts."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.data.conversation import switch_of
from tessera.data.switch import obeys
from tessera.rl.verifiers.answer import boxed, final_answer, normalized, same_answer
from tessera.rl.verifiers.exact import verify_choice, verify_exact, verify_format, verify_number
from tessera.rl.verifiers.mathematics import verify_math
from tessera.rl.verifiers.outcome import Outcome, right, unjudged


def test_there_is_a_score_exactly_where_there_is_a_verdict():
    assert right().score == 1.0
    assert unjudged("why").score is None
    for verdict, score in (("could-not-judge", 0.0), ("wrong", None), ("right", float("nan"))):
        with pytest.raises(ValueError):
            Outcome(verdict, score)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("so \\boxed{1} and \\boxed{\\frac{1}{2}}", "1, \\frac{1}{2}"),
        (r"first \boxed{1}, then \boxed{\frac{1}{\{2\}}} and \boxed{open", r"\frac{1}{\{2\}}"),
        ("\\boxed{open and \\boxed{7}", "7"),
        ("\\boxed{never closed", None),
        (r"\fbox {3}", "3"),
        (r"\boxed{}", ""),
        ("work\n#### 1,200", "1,200"),
        ("so\n#### 1,234 \n", "1,234"),
        ("#### 1\nThe answer is 2", "1"),
        ("The answer is **42**.", "42"),
        ("The answer is 3. No: the final answer is **4**.", "4"),
        ("Answer: x+1", "x+1"),
        ("Answer:\nParis", "Paris"),
        ("The answer is 72, because 48+24.", "72"),
        ("The answer is B, not A.", "B"),
        ("The answer is to be or not to be.", "to be or not to be"),
        ("The correct option is B.", "B"),
        ("result = 5", "5"),
        ("The result: 6", "6"),
        ("a good result is 7", None),
        ("The answer to this depends", None),
        ("nothing here", None),
    ],
)
def test_the_final_answer_is_found(text: str, found: str | None):
    assert final_answer(text) == found
    if "box" in text:
        assert boxed(text) == found


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("1,200", "1200", True),
        ("10{,}000", "10000", True),
        ("$\\frac{1}{2}$", "0.5", True),
        ("\\dfrac{3}{4}", "3/4", True),
        ("2\\frac{2}{3}", "8/3", True),
        ("-1 1/2", "-1.5", True),
        ("12 \\text{ cm}", "12", True),
        ("460~\\mathrm{kg}", "460", True),
        ("90°", "90^\\circ", True),
        ("50\\%", "50", True),
        ("\\$5.00", "5", True),
        ("1e3", "1000", True),
        ("2 \\times 10^5", "200000", True),
        ("(1, 2)", "(1,2)", True),
        ("\\text{Tuesday}", "Tuesday", True),
        ("\\frac{x}{2}", "x/2", True),
        ("\\frac{x+1}{2}", "x+1/2", False),
        ("n\\%", "n", False),
        ("x^2", "2", False),
        ("12", "13", False),
        ("1/0", "0", False),
        ("9" * 5000 + " 1/2", "9" * 5000, False),
    ],
)
def test_answers_are_compared_as_numbers_or_texts(left: str, right: str, same: bool):
    assert same_answer(left, right) is same
    for text in (left, right):
        assert normalized(normalized(text)) == normalized(text)


@pytest.mark.parametrize(
    ("answer", "expected", "verdict"),
    [
        ("The answer is 1,234.", "1234", "right"),
        (r"\boxed{1{,}234}", 1234, "right"),
        ("costs $5.50 in all, so\n#### 5.50", "5.5", "right"),
        ("#### 1/2", "0.5", "right"),
        ("x = 3, y = 4", "4", "right"),
        ("\N{MINUS SIGN}7", "-7", "right"),
        ("it is 41", "42", "wrong"),
        (r"\boxed{3, 4}", "4", "wrong"),
        (r"\boxed{3 + 4 = 7}", "7", "right"),
        ("no idea", "42", "wrong"),
        ("#### 1/0", "42", "wrong"),
        ("1e999999999", "42", "wrong"),
        ("42", "many", "could-not-judge"),
    ],
)
def test_numbers(answer: str, expected: str | float, verdict: str):
    assert verify_number(answer, expected).verdict == verdict


def test_a_number_may_be_close():
    assert verify_number("3.1416", "3.14159", tolerance=1e-4).verdict == "right"
    assert verify_number("3.15", "3.14159", tolerance=1e-4).verdict == "wrong"


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("The answer is (B).", "right"),
        (r"\boxed{\text{B}}", "right"),
        ("Answer: **b**", "right"),
        ("Answer: B) the second", "right"),
        ("I weigh A and C.\n\nB", "right"),
        ("Answer: A", "wrong"),
        ("Answer: A or B", "wrong"),
        (r"\boxed{A, B}", "wrong"),
        ("Answer: B or A", "wrong"),
        ("Because of that, one of them.", "wrong"),
        ("Answer: Both", "wrong"),
    ],
)
def test_choices(answer: str, verdict: str):
    assert verify_choice(answer, "B").verdict == verdict


def test_a_choice_that_is_none_is_not_judged():
    assert verify_choice("A", "AB").verdict == "could-not-judge"
    assert verify_choice("A", "E", choices=4).verdict == "could-not-judge"


def test_exact_ignores_case_spaces_and_width_only():
    assert verify_exact("The answer is  new\N{NO-BREAK SPACE}York", "New York").verdict == "right"
    assert verify_exact("New York", "new york", ignore_case=False).verdict == "wrong"
    assert verify_exact("New Yorks", "New York").verdict == "wrong"
    assert verify_exact("", "New York").verdict == "wrong"
    assert verify_exact("x", " ").verdict == "could-not-judge"


@pytest.mark.parametrize(
    ("completion", "switch", "verdict"),
    [
        ("<think>\nhm\n</think>\n\n4", "on", "right"),
        ("<think></think>4", "on", "right"),
        ("4", "on", "wrong"),
        ("<think>hm</think>", "on", "wrong"),
        ("<think>hm</think>  \n", "on", "wrong"),
        ("<think>hm", "on", "wrong"),
        ("so <think>hm</think>4", "on", "wrong"),
        ("<think>a</think><think>b</think>4", "on", "wrong"),
        ("<think>a</think>b</think>4", "on", "wrong"),
        ("</think>a<think>4", "on", "wrong"),
        ("4", "off", "right"),
        ("<think></think>4", "off", "wrong"),
        ("hm</think>4", "off", "wrong"),
        ("<think>hm</think>4", None, "right"),
    ],
)
def test_the_switch_is_obeyed(completion: str, switch, verdict: str):
    assert verify_format(completion, switch).verdict == verdict


@settings(derandomize=True, max_examples=300)
@given(st.lists(st.sampled_from(["<think>", "</think>", "4", " ", "\n", "so"]), max_size=7))
def test_what_is_rewarded_is_what_obedience_measures(parts: list[str]):
    text = "".join(parts)
    for switch in ("on", "off"):
        assert (verify_format(text, switch).verdict == "right") == obeys(text, switch)


def test_what_was_cut_short_is_exempt_from_closing_its_thought():
    assert verify_format("<think>hm", "on", truncated=True).verdict == "right"
    assert verify_format("<think>hm", "off", truncated=True).verdict == "wrong"
    with pytest.raises(ValueError, match="'of'"):
        verify_format("", "of")  # pyright: ignore[reportArgumentType]


def asked(system: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": "?"}]


def test_the_switch_of_a_prompt_is_that_of_the_data():
    """What the instructions below it say of thinking is no switch: nobody is trained to obey it."""
    assert switch_of(asked("detailed thinking on")) == "on"
    both = "detailed thinking on\n\nNever say: detailed thinking off"
    assert switch_of(asked(both)) == "on"
    assert switch_of(asked("Be kind.")) is switch_of([]) is None


@pytest.mark.parametrize(
    ("answer", "expected", "verdict"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", "right"),
        (r"\boxed{x = 5}", "5", "right"),
        (r"\boxed{-5i + 6}", "6 - 5i", "right"),
        (r"\boxed{6}", r"\$6", "right"),
        (r"\boxed{10{,}000}", "10000", "right"),
        (r"\boxed{\{-2, 1\}}", "1,-2", "right"),
        (r"\boxed{\text{Evelyn}}", "Evelyn", "right"),
        (r"\boxed{\frac43}", "$4/3$", "right"),
        ("The answer is $12$.", "12", "right"),
        (r"\boxed{4}, or \boxed{5}", "4", "wrong"),
        (r"\boxed{4, 5}", "4", "wrong"),
        (r"\boxed{\{2, 1\}}", "(1, 2)", "wrong"),
        (r"\boxed{(0, 1)}", "[0, 1)", "wrong"),
        (r"\boxed{1.414}", r"\sqrt{2}", "wrong"),
        (r"\boxed{q - p}", "p - q", "wrong"),
        (r"\boxed{\text{Bob}}", r"\text{Evelyn}", "wrong"),
        (r"\boxed{}", "4", "wrong"),
        ("", "4", "wrong"),
        (r"\boxed{" + "(" * 3000 + "}", "4", "wrong"),
        (r"\boxed{4}", "", "could-not-judge"),
        (r"\boxed{50\%}", "0.5", "right"),
        (r"\boxed{0.333333}", "1/3", "right"),
    ],
)
def test_mathematics(answer: str, expected: str, verdict: str):
    pytest.importorskip("math_verify", reason="needs the extra `math`")
    outcome = verify_math(answer, expected)
    assert outcome.verdict == verdict, outcome


def test_mathematics_is_judged_off_the_main_thread_as_on_it():
    pytest.importorskip("math_verify", reason="needs the extra `math`")
    found: list[Outcome] = []
    thread = threading.Thread(target=lambda: found.append(verify_math(r"\boxed{1/2}", "0.5")))
    thread.start()
    thread.join()
    assert found[0].verdict == "right"


def test_a_failure_of_the_library_is_not_a_zero(monkeypatch: pytest.MonkeyPatch):
    math_verify = pytest.importorskip("math_verify", reason="needs the extra `math`")

    def fails(*_, **__):
        raise RecursionError("deep")

    monkeypatch.setattr(math_verify, "verify", fails)
    assert verify_math(r"\boxed{\sqrt{4}}", "2").verdict == "could-not-judge"


def test_reference_solutions_of_math_are_right(shared: Path):
    pytest.importorskip("math_verify", reason="needs the extra `math`")
    lines = (shared / "data/math500/test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines][:100]
    missed = [r["answer"] for r in rows if verify_math(r["solution"], r["answer"]).score != 1.0]
    assert missed == []


def test_reference_rationales_of_gsm8k_are_right(shared: Path):
    lines = (shared / "data/gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    expected = [answer.rpartition("####")[2] for answer in answers]
    outcomes = [verify_number(a, e) for a, e in zip(answers, expected, strict=True)]
    assert {outcome.verdict for outcome in outcomes} == {"right"}
