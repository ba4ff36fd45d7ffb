"""Programs against their tests: what passes, what fails, and tricks that must not pass."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tessera.rl.jail.run import JailError, Limits, require_isolation
from tessera.rl.verifiers.blocks import extract_code
from tessera.rl.verifiers.code import verify_asserts, verify_outputs
from tessera.rl.verifiers.outcome import Outcome
from tests.rl.forging import FAMILIES

try:
    require_isolation()
    refused = ""
except JailError as error:
    refused = str(error)
jailed = pytest.mark.skipif(bool(refused), reason=refused or "isolated")
LIMITS = Limits(seconds=2, memory_mib=256)
TESTS = ["assert double(2) == 4", "assert double(0) == 0"]


def fenced(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\nIt doubles."


def test_without_names_the_last_fence_is_the_code():
    assert extract_code("```python\na\n```\n```py\nb\n```\n```text\nc\n```") == "b\n"
    assert extract_code("```\na = 1\n```") == "a = 1\n"
    assert extract_code("def f(): pass") == "def f(): pass"
    assert extract_code("I cannot do that.") is None
    assert extract_code("") is None


@jailed
@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        ("def double(x): return 2 * x", "right"),
        ("def double(x): print('noise'); return 2 * x", "right"),
        ("def double(x): return x", "wrong"),
        ("def double(x): return 1 / x", "wrong"),
        ("def half(x): return x", "wrong"),
        ("def double(x) return x", "wrong"),
        ("while True: pass", "wrong"),
        ("a = bytearray(1 << 30)", "wrong"),
    ],
)
def test_asserts(code: str, verdict: str):
    limits = LIMITS.model_copy(update={"seconds": 1})
    assert verify_asserts(fenced(code), TESTS, limits=limits).verdict == verdict


@jailed
@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "def double(x): raise SystemExit(0)",
        "print('passed')\nraise SystemExit",
        "class Yes:\n def __eq__(self, other): return True\ndef double(x): return Yes()",
        "class Yes(int):\n def __eq__(self, other): return True\ndef double(x): return Yes(7)",
        "def double(x): return 5\nimport builtins\nbuiltins.AssertionError = type('A', (), {})",
        "import builtins\nbuiltins.honest = lambda *_: None\ndef double(x): return 5",
        "def double(x): return 5\n_honest = lambda *_: None",
        "def double(x): return 5\nimport atexit, os\natexit.register(lambda: os._exit(0))",
    ],
)
def test_tricks_do_not_pass(code: str):
    assert verify_asserts(fenced(code), TESTS, limits=LIMITS).verdict == "wrong"


CHECK = "def check(candidate):\n assert {}\ncheck(double)"
STYLES = {
    "equal": "assert double(2) == 4\nassert double(0) == 0",
    "difference": "import math\nassert abs(double(2) - 4) < 1e-6 and math.isclose(double(3), 6)",
    "check": CHECK.format("all(map(lambda x: candidate(x) == 2 * x, (1, 2)))"),
    "printed": "",
}


@jailed
@pytest.mark.parametrize(
    "style", [pytest.param(one, marks=[pytest.mark.slow] * (one != "equal")) for one in STYLES]
)
def test_nothing_is_forged(style: str):
    assert len(FAMILIES) == 10 and sum(map(len, FAMILIES.values())) >= 100

    def judged(code: str) -> Outcome:
        if STYLES[style]:
            return verify_asserts(code, STYLES[style], limits=LIMITS)
        return verify_outputs(f"{code}\nprint(double(int(input())))", ["2"], ["4"], limits=LIMITS)

    programs = [(name, code) for name, family in FAMILIES.items() for code in family]
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(judged, [code for _, code in programs]))
    both = zip(programs, outcomes, strict=True)
    assert [(one, outcome) for one, outcome in both if outcome.verdict != "wrong"] == []


@jailed
@pytest.mark.parametrize(
    ("code", "test"),
    [
        ("import numpy as np\ndef f(): return np.arange(3)", "assert f() == [0, 1, 2]"),
        ("import numpy as np\ndef f(): return np.float64(2)", "assert abs(f() - 2) < 1e-9"),
        ("def f():\n x = 0\n while True: yield x", "g = f()\nassert next(g) == 0 == next(g)"),
        ("from collections import Counter\ndef f(): return Counter('a')", "assert f() == {'a': 1}"),
        ("def f(a): a.sort()", "a = [2, 1]\nf(a)\nassert a == [1, 2]"),
        ("def f(a): return lambda b: a + b", "assert f(1)(2) == 3"),
        ("def f(a): return [1][a]", "try: f(4)\nexcept IndexError: r = 0\nassert r == 0"),
        ("def sum(a, b): return a * b", "assert sum(2, 3) == 6"),
    ],
)
def test_what_honest_programs_return_is_converted(code: str, test: str):
    limits = LIMITS.model_copy(update={"memory_mib": 1024})
    assert verify_asserts(fenced(code), test, limits=limits).verdict == "right"


@jailed
def test_what_cannot_be_compared_is_told():
    code = "import dataclasses\n@dataclasses.dataclass\nclass D:\n x: int\ndef f(): return D(1)"
    outcome = verify_asserts(fenced(code), "assert f() == 1", limits=LIMITS)
    assert outcome.reason.startswith("returned a D, which is compared with nothing: return")


@jailed
def test_a_trick_within_a_list_does_not_pass_and_own_classes_do():
    yes = "class Yes:\n def __eq__(self, other): return True\n"
    code = fenced(yes + "def double(x): return [Yes()]")
    assert verify_asserts(code, "assert double(1) == [2]", limits=LIMITS).verdict == "wrong"
    own = fenced(yes + "def double(x): return x.value == 1\nclass Box:\n value = 1")
    assert verify_asserts(own, "b = Box(); b.value = 1\nassert double(b)").verdict == "right"


@jailed
def test_each_side_of_a_comparison_is_evaluated_once():
    code = fenced("calls = []\ndef f(): calls.append(1); return len(calls)")
    tests = ["assert f() == 1", "assert f() < 3 < f() + 9", "assert [f() for _ in 'ab'] == [4, 5]"]
    assert verify_asserts(code, tests, limits=LIMITS).verdict == "right"


def test_tests_that_are_none_are_not_judged():
    assert verify_asserts("a = 1", []).verdict == "could-not-judge"
    assert verify_asserts("a = 1", "assert (").verdict == "could-not-judge"
    assert verify_outputs("a = 1", [], []).verdict == "could-not-judge"
    assert verify_outputs("a = 1", ["1"], []).verdict == "could-not-judge"


@jailed
@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        ("print(int(input()) * 2)", "right"),
        ("import sys\nprint(int(sys.stdin.read()) * 2, end='  \\n\\n')", "right"),
        ("if __name__ == '__main__': print(int(input()) * 2); raise SystemExit", "right"),
        ("print(4)", "wrong"),
        ("print(int(input()) * 2); raise SystemExit(1)", "wrong"),
        ("print(int(input()) * 2); 1 / 0", "wrong"),
        ("x = int(input())\nwhile x == 3: pass\nprint(2 * x)", "wrong"),
        ("while True: print('x' * 999)", "wrong"),
        ("print(int(input()) * 2)\nprint('more')", "wrong"),
        ("import os; os.kill(os.getppid(), 9)", "wrong"),
    ],
)
def test_outputs(code: str, verdict: str):
    limits = LIMITS.model_copy(update={"seconds": 0.7})
    outcome = verify_outputs(fenced(code), ["2\n", "3\n"], ["4\n", "6\n"], limits=limits)
    assert outcome.verdict == verdict, outcome


@jailed
def test_expected_outputs_are_not_in_the_jail():
    look = "import glob\nfor p in glob.glob('/tmp/*'): print(open(p).read())\nprint(input())"
    outcome = verify_outputs(fenced(look), ["7654321"], ["1234567"], limits=LIMITS)
    assert outcome.verdict == "wrong"


@jailed
def test_reference_solutions_pass(shared: Path):
    text = (shared / "data/humaneval/HumanEval.jsonl").read_text(encoding="utf-8")
    for row in map(json.loads, text.splitlines()[:10]):
        tests = f"{row['test']}\ncheck({row['entry_point']})"
        solution = fenced(row["prompt"] + row["canonical_solution"])
        assert verify_asserts(solution, tests).verdict == "right", row["task_id"]
        empty = fenced(row["prompt"] + "    return None")
        assert verify_asserts(empty, tests).verdict == "wrong", row["task_id"]
