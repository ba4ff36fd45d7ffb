"""Whether a program passes its tests, in the jail: asserts (HumanEval, MBPP), or stdin to stdout.

The program is what `blocks.py` finds in the answer. One that fails, crashes, uses up its CPU time
or sleeps for as long is wrong; one that has not ended when the clock has run for much longer could
not be judged: a busy machine is no fault of its own. A jail that cannot be built is an error
(`JailError`), and never a verdict.
"""

from __future__ import annotations

import ast
import builtins
import json
import marshal
import secrets
from collections.abc import Sequence
from pathlib import Path

from tessera.rl.jail.run import Ended, Isolation, Limits, python, run
from tessera.rl.jail.seccomp import solution
from tessera.rl.verifiers.blocks import extract_code, used_names
from tessera.rl.verifiers.outcome import Outcome, right, unjudged, wrong

CASES_TOGETHER = 4  # times the CPU seconds of one case that all of them may use
CLOCK_TIMES = 8  # times its CPU seconds that a program, all its cases together, may take
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def verify_asserts(
    answer: str,
    tests: str | Sequence[str],
    *,
    setup: str = "",
    entry_point: str = "",
    limits: Limits | None = None,
    isolation: Isolation = "namespaces",
) -> Outcome:
    """Whether every test holds: Python statements that raise where something is wrong.

    setup: run after the solution and before the tests. entry_point: the function that tests which
    only define `check(candidate)` are called with. limits.seconds: CPU time. Raises JailError.
    """
    text = tests if isinstance(tests, str) else "\n".join(tests)
    if not text.strip():
        return unjudged("there are no tests")
    try:
        tree = ast.parse(text)
        ast.parse(setup)
    except (SyntaxError, ValueError) as error:
        return unjudged(f"the tests are no Python: {error}")
    if not _tests_something(tree) and entry_point.isidentifier() and _defines_check(tree):
        text = f"{text}\ncheck({entry_point})\n"
    if not _tests_something(ast.parse(text)):
        return unjudged(_untested(tree))
    code = extract_code(answer, used_names(f"{setup}\n{text}") | {entry_point})
    if code is None:
        return wrong("no code in the answer")
    token = secrets.token_hex(16)
    job = {"solution": code, "names": _names(setup, text, entry_point)}
    rest = {"setup": setup, "tests": text, "token": token}
    limits = limits or Limits()
    ended = _drive([job, rest], _timed(limits), isolation)
    told, _, why = ended.stdout.decode(errors="replace").partition(" ")
    verdict, _, why = why.partition(" ")
    if not ended.succeeded or told != token:
        return _failed(ended, limits.seconds)
    return right() if verdict == "right" else (unjudged if verdict == "unjudged" else wrong)(why)


def _names(setup: str, tests: str, entry_point: str) -> list[str]:
    """What the tests take from the solution: a built-in's name only if they take nothing else."""
    used = used_names(f"{setup}\n{tests}")
    own = used - set(dir(builtins))
    return sorted((own or used) | ({entry_point} - {""}))


def _timed(limits: Limits, cases: int = 1) -> Limits:
    """seconds of CPU time and as many asleep for each case; several times as many by the clock."""
    cpu, clock = limits.seconds * cases, limits.seconds * CLOCK_TIMES
    return limits.model_copy(update={"cpu_seconds": cpu, "asleep_seconds": cpu, "seconds": clock})


def _tests_something(tree: ast.Module) -> bool:
    """Whether running the tests can fail by them: an assertion is reached, not only defined."""
    testing = {
        node.name
        for node in tree.body
        if isinstance(node, _DEFINITIONS) and any(map(_asserts, ast.walk(node)))
    }
    for statement in tree.body:
        if isinstance(statement, _DEFINITIONS):
            continue
        for node in ast.walk(statement):
            called = isinstance(node, ast.Name) and node.id in testing
            if called or _asserts(node) or (testing and _runs_cases(node)):
                return True
    return False


def _asserts(node: ast.AST) -> bool:
    """An assertion about something, a `raise`, or a call of a function like `assertEqual`."""
    if isinstance(node, ast.Assert):
        return any(isinstance(part, ast.Name) for part in ast.walk(node.test))
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        return str(name).lower().startswith("assert")
    return isinstance(node, ast.Raise)


def _runs_cases(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in ("main", "run", "TextTestRunner")


def _defines_check(tree: ast.Module) -> bool:
    return any(
        isinstance(node, ast.FunctionDef) and node.name == "check" and len(node.args.args) == 1
        for node in tree.body
    )


def _untested(tree: ast.Module) -> str:
    if _defines_check(tree):
        return "the tests only define check(candidate); name the function to call in `entry_point`"
    return "the tests assert nothing"


def verify_outputs(
    answer: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    limits: Limits | None = None,
    isolation: Isolation = "namespaces",
) -> Outcome:
    """Whether the program prints, for each input, the expected output up to space at line ends.

    limits.seconds is CPU time for one input; all together may use four times as much. Raises
    JailError.
    """
    if not inputs or len(inputs) != len(outputs):
        return unjudged(f"there are {len(inputs)} inputs and {len(outputs)} outputs to test with")
    code = extract_code(answer)
    if code is None:
        return wrong("no code in the answer")
    limits = limits or Limits()
    length = 2 * max(len(output.encode()) for output in outputs) + 1024
    room = limits.output_kib + len(inputs) * length * 6 // 1024
    whole = _timed(limits, CASES_TOGETHER)
    job = {"solution": code, "inputs": list(inputs), "seconds": limits.seconds}
    job |= {"together": whole.cpu_seconds, "clock": whole.seconds, "output_bytes": length}
    grace = {"seconds": whole.seconds + 2, "output_kib": room}  # what was judged is told first
    ended = _drive([job], whole.model_copy(update=grace), isolation)
    try:
        results = json.loads(ended.stdout) if ended.succeeded else []
    except (ValueError, RecursionError):
        results = []
    if not results:
        return _failed(ended, limits.seconds * CASES_TOGETHER)
    return _compared(results, outputs, limits.seconds)


def _compared(results: Sequence[dict], outputs: Sequence[str], seconds: float) -> Outcome:
    for number, (result, expected) in enumerate(zip(results, outputs, strict=False), 1):
        test = f"test {number} of {len(outputs)}"
        if result["ended"] == "clock":
            return unjudged(f"{test} had not ended after {seconds * CLOCK_TIMES:g} s by the clock")
        if result["ended"]:
            return wrong(f"{test} used up its {seconds:g} s of CPU time")
        if result["code"]:
            return wrong(f"{test} ended with {result['code']}")
        if _lines(result["output"]) != _lines(expected):
            return wrong(f"{test} printed something else")
    return right() if len(results) == len(outputs) else wrong("not every test was run")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _drive(jobs: Sequence[dict], limits: Limits, isolation: Isolation) -> Ended:
    driver = Path(__file__).with_name("code_driver.py").read_text(encoding="utf-8")
    argv = [python(), "-I", "-c", driver]
    jobs[0]["filter"] = solution() if isolation == "namespaces" else b""
    parts = [marshal.dumps(job) for job in jobs]
    stdin = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return run(argv, stdin=stdin, limits=limits, isolation=isolation)


def _failed(ended: Ended, seconds: float) -> Outcome:
    if ended.reason == "time":
        return unjudged(f"it had not ended after {ended.seconds:.0f} s by the clock")
    if ended.reason == "cpu":
        return wrong(f"it used up its {seconds:g} s of CPU time")
    if ended.reason == "asleep":
        return wrong(f"it slept for {seconds:g} s")
    if ended.reason != "exited":
        return wrong(f"ended by its limit of {ended.reason}")
    lines = ended.stderr.decode(errors="replace").strip().splitlines()
    return wrong(
        (lines[-1] if lines else f"left with {ended.code} before the tests were through")[:200]
    )
