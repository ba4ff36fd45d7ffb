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
    if tests is None:
        if inputs is None or outputs is None:
            raise JudgeError("code is judged by tests, or by inputs and outputs; give either")
        return code.verify_outputs(answer, inputs, outputs, limits=limits, isolation=isolation)
    return code.verify_asserts(
        answer,
        tests,
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
    if kind not in KINDS:
        raise JudgeError(f"there is no kind {kind!r} of answer; {nearest(kind, KINDS)}")
    if kind != "format":
        answer = split(answer).answer.strip()
    given = () if gold is None else (str(gold) if kind not in ("code", "format") else gold,)
    try:
        inspect.signature(KINDS[kind]).bind(answer, *given, **arguments)
    except TypeError as error:
        takes = ", ".join(list(inspect.signature(KINDS[kind]).parameters)[1:])
        raise JudgeError(f"{kind}: {error}; it takes {takes}") from None
    if not answer and kind != "format":
        return wrong("no answer")
    return KINDS[kind](answer, *given, **arguments)
