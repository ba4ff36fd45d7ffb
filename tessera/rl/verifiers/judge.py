"""`judge`: whether an answer is right. Rewards, curation and evaluation call this one function.

The kinds:

    math          the same value, set or expression as gold        number   the same number
    equal         the same number or text, without math-verify     exact    the same text
    choice        the letter of gold                               format   thoughts where gold, the
    code          passes tests, or prints outputs for inputs                switch, wants them
    instructions  follows IFEval's instructions
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tessera.data.thought import split
from tessera.rl.jail.run import Isolation, Limits
from tessera.rl.verifiers import code, exact, instructions, mathematics
from tessera.rl.verifiers.outcome import Outcome, wrong
from tessera.table import nearest

_GOLD = ("answer", "completion", "expected")


class JudgeError(ValueError):
    """An answer that cannot be judged as asked; the text says what is allowed."""


def _code(
    answer: str,
    tests: str | Sequence[str] | None = None,
    *,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    setup: str | None = None,
    entry_point: str | None = None,
    limits: Limits | None = None,
    isolation: Isolation = "namespaces",
) -> Outcome:
    if tests is None and inputs is not None and outputs is not None:
        return code.verify_outputs(answer, inputs, outputs, limits=limits, isolation=isolation)
    return code.verify_asserts(
        answer,
        tests or "",
        setup=setup or "",
        entry_point=entry_point or "",
        limits=limits,
        isolation=isolation,
    )


def _instructions(
    answer: str,
    instruction_id_list: Sequence[str],
    kwargs: Sequence[Mapping[str, Any] | None],
    *,
    loose: bool = False,
    partial: bool = False,
) -> Outcome:
    return instructions.verify_instructions(
        answer, instruction_id_list, kwargs, loose=loose, partial=partial
    )


KINDS: dict[str, Callable[..., Outcome]] = {
    "math": mathematics.verify_math,
    "number": exact.verify_number,
    "exact": exact.verify_exact,
    "equal": exact.verify_equal,
    "choice": exact.verify_choice,
    "format": exact.verify_format,
    "instructions": _instructions,
    "code": _code,
}


def judge(kind: str, answer: str, gold: Any = None, **arguments: Any) -> Outcome:
    """The verdict on an answer (right, wrong, could-not-judge), its score, and why.

    answer: what the model said; its thoughts are cut off, and nothing behind them is wrong.
    gold: the expected answer; of code the tests, of format the switch. arguments: what the kind
    takes besides: tolerance (number), ignore_case (exact), choices (choice), truncated (format),
    setup, entry_point, inputs, outputs, limits and isolation (code), instruction_id_list, kwargs,
    loose and partial (instructions). Raises JudgeError, JailError or RunError.
    """
    given = require_arguments(kind, gold, arguments)
    if kind != "format":
        answer = split(answer).answer.strip()
        if not answer:
            return wrong("no answer")
    return KINDS[kind](answer, *given, **arguments)


def takes(kind: str) -> list[str]:
    """The names of what a kind judges by, gold aside. Raises JudgeError for an unknown kind."""
    if kind not in KINDS:
        raise JudgeError(f"there is no kind {kind!r} of answer; {nearest(kind, KINDS)}")
    return [key for key in inspect.signature(KINDS[kind]).parameters if key not in _GOLD]


def require_arguments(kind: str, gold: Any, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """The gold as the kind's checker takes it. Raises JudgeError where it is not enough."""
    allowed = takes(kind)
    if unknown := arguments.keys() - allowed:
        name = min(unknown)
        raise JudgeError(f"{kind} is not judged by {name!r}; {nearest(name, ['gold', *allowed])}")
    given = () if gold is None else (gold if kind in ("code", "format") else str(gold),)
    try:
        inspect.signature(KINDS[kind]).bind("", *given, **arguments)
    except TypeError:
        needs = "instruction_id_list and kwargs" if kind == "instructions" else "gold"
        raise JudgeError(f"{kind} needs {needs}") from None
    if kind == "code" and gold is None and arguments.get("tests") is None:
        if None in (arguments.get("inputs"), arguments.get("outputs")):
            raise JudgeError("code is judged by tests, or by inputs and outputs: give either")
    return given
