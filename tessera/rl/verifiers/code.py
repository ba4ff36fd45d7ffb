"""Whether a program passes its tests, in the jail: asserts (HumanEval, MBPP), or stdin to stdout.

The code is the answer's last fenced block. A program that fails, crashes, or breaks a limit is
wrong; a jail that cannot be built is an error (`JailError`), and never a verdict.
"""

from __future__ import annotations

import ast
import json
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from tessera.rl.jail.run import Ended, Isolation, Limits, python, run
from tessera.rl.verifiers.outcome import Outcome, judged, unjudged, wrong

CASES_TOGETHER = 4  # times the seconds of one case that all of them may take
_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+#-]*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
PYTHON = ("python", "py", "python3")


def fenced(text: str, languages: Sequence[str]) -> list[str]:
    """The contents of the fenced blocks of a language, which may have several names."""
    return [code for name, code in _FENCE.findall(text) if name.lower() in languages]


def extract_code(answer: str) -> str | None:
    """The last fenced block of Python, or the whole answer where it is a program, or None."""
    blocks = fenced(answer, ("", *PYTHON))
    if blocks:
        return blocks[-1]
    try:
        return answer if ast.parse(answer).body else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def verify_asserts(
    answer: str,
    tests: str | Sequence[str],
    *,
    setup: str = "",
    limits: Limits | None = None,
    isolation: Isolation = "namespaces",
) -> Outcome:
    """Whether every test holds: Python statements that raise where something is wrong.

    setup: run after the solution and before the tests. Raises JailError.
    """
    code = extract_code(answer)
    text = tests if isinstance(tests, str) else "\n".join(tests)
    if not text.strip():
        return unjudged("there are no tests")
    if code is None:
        return wrong("no code in the answer")
    try:
        ast.parse(text)
        ast.parse(setup)
    except (SyntaxError, ValueError) as error:
        return unjudged(f"the tests are no Python: {error}")
    token = secrets.token_hex(16)
    job = {"solution": code, "setup": setup, "tests": text, "token": token}
    ended = _drive(job, limits or Limits(), isolation)
    return judged(ended.succeeded and ended.stdout.decode("ascii", "replace") == token, _why(ended))


def verify_outputs(
    answer: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    limits: Limits | None = None,
    isolation: Isolation = "namespaces",
) -> Outcome:
    """Whether the program prints, for each input, the expected output up to space at line ends.

    limits.seconds is for one input; all together may take four times as long. Raises JailError.
    """
    if not inputs or len(inputs) != len(outputs):
        return unjudged(f"there are {len(inputs)} inputs and {len(outputs)} outputs to test with")
    code = extract_code(answer)
    if code is None:
        return wrong("no code in the answer")
    limits = limits or Limits()
    length = 2 * max(len(output.encode()) for output in outputs) + 1024
    whole = limits.model_copy(
        update={
            "seconds": limits.seconds * CASES_TOGETHER,
            "output_kib": limits.output_kib + len(inputs) * length * 6 // 1024,
        }
    )
    job = {"solution": code, "inputs": list(inputs), "seconds": limits.seconds}
    ended = _drive(job | {"output_bytes": length}, whole, isolation)
    try:
        results = json.loads(ended.stdout) if ended.succeeded else []
    except ValueError:
        results = []
    if not results:
        return wrong(_why(ended))
    for number, (result, expected) in enumerate(zip(results, outputs, strict=False), 1):
        if result["code"] is None:
            return wrong(f"test {number} of {len(inputs)} took over {limits.seconds:g} s")
        if result["code"]:
            return wrong(f"test {number} of {len(inputs)} ended with {result['code']}")
        if _lines(result["output"]) != _lines(expected):
            return wrong(f"test {number} of {len(inputs)} printed something else")
    return judged(len(results) == len(inputs), "not every test was run")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _drive(job: dict, limits: Limits, isolation: Isolation) -> Ended:
    driver = Path(__file__).with_name("code_driver.py").read_text(encoding="utf-8")
    argv = [python(), "-I", "-c", driver]
    stdin = json.dumps(job).encode("utf-8", "surrogatepass")
    return run(argv, stdin=stdin, limits=limits, isolation=isolation)


def _why(ended: Ended) -> str:
    if ended.reason != "exited":
        return f"ended by its limit of {ended.reason}"
    lines = ended.stderr.decode(errors="replace").strip().splitlines()
    return (lines[-1] if lines else f"left with {ended.code} before the tests were through")[:200]
