"""Whether an answer is, mathematically, the expected one; by math-verify, which stays in this file.

Only the last box counts where there is one. A set is not the ordered pair (`\\{2, 1\\}`, `(1, 2)`),
which math-verify accepts. Its deadlines use SIGALRM, which fails off the main thread: they are off.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from tessera.rl.verifiers.answer import boxed, final_answer, number, same_answer
from tessera.rl.verifiers.outcome import Outcome, judged, right, unjudged, wrong
from tessera.runs.files import RunError

READ_FROM_END = 2000  # characters searched for an answer that stands in no box
LONGEST_BOX = 2000
_BASE = re.compile(r"-?[0-9A-F.]+_\{?(\w+)\}?")
_BRACED = re.compile(r"^\\?\s*\\\{.*\\\}$", re.DOTALL)
_TUPLE = re.compile(r"^\s*(?:\\left)?\s*[(\[].*,.*[)\]]\s*$", re.DOTALL)


def verify_math(answer: str, expected: str) -> Outcome:
    """Whether the answer's last box, or else its last expression, equals the expected one.

    expected: LaTeX or a plain expression, with or without `$`.
    """
    expected = expected.strip()
    given, stated = boxed(answer), final_answer(answer)
    stated = answer if stated is None else stated
    if not expected:
        return unjudged("the expected answer is empty")
    if len(stated) <= LONGEST_BOX and same_answer(stated, expected):
        return right("the same answer")
    if _differ(stated, expected):
        return wrong(f"{stated[:60]!r} is not {expected[:60]!r}")
    if given is not None and len(given) > LONGEST_BOX:
        return wrong(f"the box holds {len(given)} characters")
    parse, verify = require_library()
    try:
        plain = (boxed(expected) or expected).replace("\\$", "")  # a sum of money is its number
        wanted = parse(plain if "$" in plain else f"${plain}$")
        found = parse(f"\\boxed{{{given}}}" if given is not None else answer[-READ_FROM_END:])
        if all(isinstance(part, str) for part in wanted):  # another text is another answer
            short = repr(expected[:60])
            if given is None:
                return unjudged(f"the expected answer {short} cannot be read as mathematics")
            return wrong(f"{given[:60]!r} is not {short}")
        if not found:
            return wrong("no answer found")
        if given is not None and _BRACED.match(given.strip()) and _TUPLE.match(expected):
            return wrong("a set where a tuple or an interval was expected")
        return judged(verify(wanted, found), f"{found[-1]} is not {expected}"[:200])
    except (Exception, RecursionError) as error:
        return unjudged(f"math-verify failed: {type(error).__name__}: {error}"[:200])


def _differ(given: str, expected: str) -> bool:
    """Whether two numbers differ by over 1 %, or in their base; percentages are left out.

    math-verify misses both: it compares six decimals, reads `2 2/3` as 2, and drops `_7`.
    """
    base = _BASE.fullmatch(given.strip("$"))
    if base:
        other = _BASE.fullmatch(expected.strip("$"))
        return other is None or base[1] != other[1]
    a, b = number(given), number(expected)
    if a is None or b is None or "%" in given + expected:
        return False
    return abs(a - b) * 100 > max(abs(a), abs(b))


def require_library() -> tuple[Any, Any]:
    """math-verify's parse and verify, both raising what goes wrong. Raises RunError."""
    try:
        import math_verify
    except ModuleNotFoundError:
        raise RunError(
            "checking mathematics needs math-verify: pip install 'tessera[rl]'"
        ) from None
    # It warns once that its deadlines are off, which is what the pool is for.
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)

    def parse(text: str) -> list[Any]:
        return math_verify.parse(text, parsing_timeout=None, raise_on_error=True)  # pyright: ignore

    def verify(wanted: list[Any], found: list[Any]) -> bool:
        return math_verify.verify(wanted, found, timeout_seconds=None, raise_on_error=True)

    return parse, verify
