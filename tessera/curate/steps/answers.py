"""Final answers: found in a text, brought to one form, compared.

    extract      `\\boxed{…}`, `#### …`, `the answer is …`          -> predicted_answer
    verify       predicted_answer against expected_answer           -> correct

A verifier has three outcomes: right, wrong, and None where it cannot judge. `equal` is the simple
one: the same text once normalised, or the same number.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Literal

from tessera.curate.steps import Result, rows
from tessera.curate.steps.rows import Drop
from tessera.data.conversation import Chat
from tessera.runs.files import RunError
from tessera.runs.recipe import Config

Verifier = Callable[[str, str], bool | None]
_MARKED = re.compile(r"^[ \t]*####[ \t]*(.+)$", re.M)
_SAID = re.compile(
    r"(?:\banswer\b(?:[ \t]+is)?|^[ \t]*result)[ \t]*[:=]?[ \t*]*(?:is[ \t]+)?([^\n]+)", re.I | re.M
)
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?\Z")
_RATIO = re.compile(r"([-+]?\d+(?:\.\d+)?)/(\d+(?:\.\d+)?)\Z")
_NOISE = re.compile(r"\\(?:left|right|!|,|;|:|quad|displaystyle)(?![a-zA-Z])|\\text\{\s*\}|\s+")
_UNIT = re.compile(r"(?:\\%|%|\\\$|\$|\^\\circ|\^\{\\circ\}|\\text\{[^{}]*\}|\\mbox\{[^{}]*\})\Z")
_GROUPED = re.compile(r"(?<=\d),(?=\d{3}(?:\D|\Z))")
LONGEST = 400  # characters of a final answer; what is longer is no answer but a text


class Extract(Config):
    """Finds the final answer in the last answer's text and writes it into `predicted_answer`.

    source = "boxed" takes `\\boxed{…}` alone, as the paper's math data do; "any" what comes first
    of `\\boxed`, `####` and "answer is". to: the key written. required: rows without are left out.
    """

    step: Literal["extract_answer"]
    source: Literal["boxed", "any"] = "any"
    to: str = "predicted_answer"
    required: bool = True

    def apply(self, chat: Chat) -> Result:
        text = rows.answer(chat)
        found = boxed(text) if self.source == "boxed" else final_answer(text)
        if found is None:
            return Drop("no final answer") if self.required else chat
        return rows.tagged(chat, self.step, **{self.to: found})


class Verify(Config):
    """Compares `predicted_answer` with `expected_answer` and writes `correct`.

    verifier: "equal", "exact", or `package.module:function`, any function of the two texts that
    gives True, False or None, or an outcome whose `verdict` is "right", "wrong" or another word.
    keep: "correct" leaves out what is wrong or not judged; "all" keeps them for a pass rate. A row
    without an expected answer is passed on unjudged: `majority` comes before this step.
    """

    step: Literal["verify"]
    verifier: str = "equal"
    keep: Literal["correct", "all"] = "correct"

    def apply(self, chat: Chat) -> Result:
        expected, predicted = (chat.extra.get(f"{n}_answer") for n in ("expected", "predicted"))
        if expected is None:
            return chat
        right = self._judged(str(predicted), str(expected)) if predicted is not None else None
        if self.keep == "correct" and right is not True:
            return Drop("a wrong answer" if right is False else "an answer that cannot be judged")
        return rows.tagged(chat, self.step, correct=right)

    @functools.cached_property
    def _judged(self) -> Verifier:
        return VERIFIERS.get(self.verifier) or _imported(self.verifier)


def final_answer(text: str) -> str | None:
    """The last `\\boxed`, else the last `####` line, else what follows the last "answer is"."""
    found = boxed(text)
    if found is None and (marked := _MARKED.findall(text)):
        found = marked[-1]
    if found is None and (said := _SAID.findall(text)):
        found = said[-1]
    found = found.strip(" \t*").rstrip(".").strip(" \t*") if found else None
    return found if found and len(found) <= LONGEST else None


def boxed(text: str) -> str | None:
    """What the last `\\boxed{…}` holds, braces counted; None without a closed one."""
    at = len(text)
    while (at := text.rfind("\\boxed{", 0, at)) >= 0:
        begin, depth = at + len("\\boxed{"), 1
        for index in range(begin, min(len(text), begin + LONGEST + 1)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                return text[begin:index].strip() or None
    return None


def normalised(answer: str) -> str:
    """One form for many spellings: spaces, dollar signs, units, `\\frac` and thousands' commas."""
    text = answer.strip().strip("$").strip()
    text = _NOISE.sub("", text).lstrip("$").removeprefix("\\$")
    while (shorter := _UNIT.sub("", text)) != text and shorter:
        text = shorter
    text = _FRACTION.sub(r"\1/\2", _GROUPED.sub("", text))
    if value := number(text):
        return str(value)
    return re.sub(r"\\(?:text|mathrm|mathbf|mbox)\{([^{}]*)\}", r"\1", text).rstrip(".").lower()


def number(text: str) -> Fraction | None:
    """The exact value of a decimal, a fraction or a power of ten; None for anything else."""
    if ratio := _RATIO.match(text):
        below = Fraction(ratio[2])
        return Fraction(ratio[1]) / below if below else None
    return Fraction(text) if len(text) < 64 and _NUMBER.match(text) else None


def equal(predicted: str, expected: str) -> bool | None:
    """Whether two final answers are the same number, or the same text once normalised."""
    if not predicted.strip() or not expected.strip():
        return None
    return normalised(predicted) == normalised(expected)


def exact(predicted: str, expected: str) -> bool | None:
    """Whether two final answers are the same text, the white space around them apart."""
    return predicted.strip() == expected.strip()


def _imported(name: str) -> Verifier:
    """The verifier of `package.module:function`. Raises RunError where there is none."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise RunError(
            f"verifier = {name!r}: {error}; give package.module:function, or one of "
            + ", ".join(VERIFIERS)
        ) from None
    words = {"right": True, "wrong": False}

    def judged(predicted: str, expected: str) -> bool | None:
        outcome = found(predicted, expected)
        verdict = getattr(outcome, "verdict", outcome)
        return words.get(verdict) if isinstance(verdict, str) else verdict

    return judged


VERIFIERS: dict[str, Verifier] = {"equal": equal, "exact": exact}
