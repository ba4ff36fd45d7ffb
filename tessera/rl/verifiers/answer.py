"""The final answer of a text: where it stands, and when two final answers are the same.

The final answer is the last one of the most explicit form that the text has: `\\boxed{…}` (what the
paper's prompts ask for), else a line `#### 42` (GSM8K), else the rest of the line after "answer
is", "answer:" or "answer =", where "correct option", "correct choice" and, at the start of a line,
"result" may stand for "answer".
"""

from __future__ import annotations

import re
from fractions import Fraction

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # with what a backslash escapes, to skip it
_HASHES = re.compile(r"^\s*####[ \t]*(\S.*?)\s*$", re.MULTILINE)
_STATED = re.compile(
    r"(?:\banswer|\bcorrect (?:option|choice)|^[ \t]*(?:the[ \t]+)?result)\b"
    r"(?:[ \t]+is\b|[ \t]*[:=])[\s:*]*(?=([^\s:*][^\n]*))",
    re.IGNORECASE | re.MULTILINE,
)
_REASON = re.compile(r",?\s+(?:because|since)\b.*|,\s+not\b.*")
NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+)?(?:/\d+)?(?![\w/])"
)
_MIXED = re.compile(r"([-+]?)(\d+) (\d+/\d+)")
_FRACTION = re.compile(r"\\[dt]?frac\{(\\?[\w.]+)\}\{(\\?[\w.]+)\}")
_BEFORE_FRACTION = re.compile(r"(?<=\d)(?=\\[dt]?frac)")
_POWER_OF_TEN = re.compile(r"\s*(?:\\times|\\cdot|×)\s*10\^\{?([-+]?\d+)\}?")
_NOISE = re.compile(
    r"\\(?:left|right|displaystyle|quad)(?![a-zA-Z])|\\[,!;:]|\\text\{\s*\}|(?<=\d)\{(?=,\})|(?<=,)\}"
)
_UNIT = re.compile(
    r"\s*(?:\\?[%$]|[°€£]|\^\\circ|\^\{\\circ\}|\\(?:text|mbox|mathrm)\{[^{}]*\}(?:\^\{?\d\}?)?)\Z"
)
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\{([^{}]*)\}")


def final_answer(text: str) -> str | None:
    """The final answer that a text states, by the rule above; None where it states none."""
    found = boxed(text)
    if found is not None:
        return found
    if hashes := _HASHES.findall(text):
        return hashes[-1]
    stated = _STATED.findall(text)
    return _REASON.sub("", stated[-1]).strip().rstrip(".").strip(" \t*") if stated else None


def boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}` whose braces close, or None."""
    for opening in reversed(list(_BOXED.finditer(text))):
        depth = 1
        for found in _BRACE.finditer(text, opening.end()):
            depth += {"{": 1, "}": -1}.get(found[0], 0)
            if not depth:
                return text[opening.end() : found.start()].strip()
    return None


def same_answer(given: str, expected: str) -> bool:
    """Whether two final answers are the same number, or the same text up to spelling."""
    return normalized(given) == normalized(expected)


def normalized(answer: str) -> str:
    """One spelling of a final answer: the exact value of a number, else a text.

    A number loses its unit, a text its spaces, case, `\\text{}` and LaTeX spacing.
    """
    value = number(answer)
    if value is not None:
        return str(value)
    text = _FRACTION.sub(r"\1/\2", _TEXT.sub(r"\1", _clean(answer)))
    return "".join(text.split()).lower()


def number(answer: str) -> Fraction | None:
    """The exact value of a final answer that is one number, perhaps with a unit; else None.

    Decimals, `1,234`, `1/2`, `\\frac{1}{2}`, `2 2/3`, `1e3` and `2 \\times 10^5` are numbers.
    """
    if len(answer) > 400:
        return None
    if answer.isascii() and answer.isdigit():  # most answers
        return fraction(answer)
    text = re.sub(r"^(?:\\?\$|[€£])+", "", _clean(answer))
    while (shorter := _UNIT.sub("", text)) != text and shorter:
        text = shorter
    text = _FRACTION.sub(r"\1/\2", _BEFORE_FRACTION.sub(" ", text))
    text = _POWER_OF_TEN.sub(r"e\1", text)
    if mixed := _MIXED.fullmatch(text):
        part = fraction(mixed[3])
        return None if part is None else (int(mixed[2]) + part) * (-1 if mixed[1] == "-" else 1)
    return fraction(text) if NUMBER.fullmatch(text) else None


def fraction(text: str) -> Fraction | None:
    """The value of a match of NUMBER; None where it has none, or one of too many digits."""
    top, _, bottom = text.replace(",", "").partition("/")
    _, _, exponent = top.lower().partition("e")
    if not top.strip("+-.") or len(text) > 400 or (exponent and abs(int(exponent)) > 308):
        return None
    denominator = Fraction(bottom or 1)
    return Fraction(top) / denominator if denominator else None


def plain_text(text: str) -> str:
    """The text without `\\text{}` around its words."""
    return _TEXT.sub(r"\1", text)


def _clean(answer: str) -> str:
    text = answer.replace("\N{MINUS SIGN}", "-").replace("~", " ").strip().strip("$")
    return " ".join(_NOISE.sub("", text).split()).rstrip(".")
