"""Answers that need no mathematics: a text, a number, a letter of several choices.

Whether a completion obeys the reasoning switch (Llama-Nemotron §5.1's format reward).

On: one closed thought first, and an answer after it. Off: an answer, and no tag of a thought. It is
`obeys` of data/switch.py with the reasons, so what is rewarded is what is measured. A prompt
without the switch asks for neither. A completion that was cut short is exempt, as it is in
NVIDIA's own checker: what is missing is length, which other rewards judge.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from tessera.data.conversation import Mode
from tessera.data.switch import obeys
from tessera.data.thought import CLOSE, OPEN
from tessera.rl.verifiers.answer import final_statement
from tessera.rl.verifiers.outcome import Outcome, judged, right, unjudged, wrong

_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+)?(?:/\d+)?(?![\w/])"
)
# A letter, alone or in the brackets and emphasis that models put around it.
_LETTER = r"[\s*_`\"'$([{]*(?:\\(?:text|mathrm|mathbf)\s*\{)?\(?([A-Za-z])\)?"
_ONE_LETTER = re.compile(_LETTER + r"(?=$|[\s).\]}*_:`\"'$,;])")
_OPTION_LINE = re.compile(r"^[\s*_(]*(?:option|choice)?\s*\(?([A-Z])\)?[\s*_).:]*$", re.IGNORECASE)
_ANOTHER = re.compile(r"\b(?:and|or)\b|[,/&]")


def verify_exact(answer: str, expected: str, *, ignore_case: bool = True) -> Outcome:
    """Whether the final statement, or else the whole answer, is a text, up to spaces and width."""
    if not expected.strip():
        return unjudged("the expected answer is empty")
    given = final_statement(answer)
    given = answer if given is None else given
    if not given.strip():
        return wrong("no answer")
    return judged(
        _plain(given, ignore_case) == _plain(expected, ignore_case),
        f"{_short(given)} is not {_short(expected)}",
    )


def _plain(text: str, ignore_case: bool) -> str:
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    return text.casefold() if ignore_case else text


def verify_number(answer: str, expected: str | float, *, tolerance: float = 0.0) -> Outcome:
    """Whether the final statement's number, or else the answer's last, is the expected one.

    tolerance: relative; at 0 the two must be equal as fractions, `0.5` and `1/2` among them.
    """
    wanted = _only_number(str(expected))
    if wanted is None:
        return unjudged(f"the expected answer {_short(str(expected))} is not a number")
    statement = final_statement(answer)
    numbers = _numbers(answer if statement is None else statement)
    if not numbers:
        return wrong("no number in the answer")
    if statement is not None and len(set(numbers)) > 1 and "=" not in statement:
        return wrong(f"several numbers are stated: {_short(statement)}")
    given = numbers[-1]
    close = abs(given - wanted) <= Fraction(tolerance) * abs(wanted)
    return judged(close, f"{_short(str(float(given)))} is not {_short(str(expected))}")


def _numbers(text: str) -> list[Fraction]:
    text = text.replace("\\,", "").replace("{,}", ",").replace("\N{MINUS SIGN}", "-")
    text = text.replace("\\!", "").replace("\\$", "").replace("$", "")
    found = (_fraction(match.group()) for match in _NUMBER.finditer(text))
    return [number for number in found if number is not None]


def _only_number(text: str) -> Fraction | None:
    numbers = _numbers(text)
    return numbers[0] if len(numbers) == 1 else None


def _fraction(text: str) -> Fraction | None:
    top, _, bottom = text.replace(",", "").partition("/")
    _, _, exponent = top.lower().partition("e")
    if not top.strip("+-.") or (exponent and abs(int(exponent)) > 308) or len(text) > 400:
        return None
    denominator = Fraction(bottom or 1)
    return Fraction(top) / denominator if denominator else None


def verify_choice(answer: str, expected: str, *, choices: int = 26) -> Outcome:
    """Whether the one letter that the answer settles on is the expected one.

    The final statement names it, or a line that holds nothing else; two letters are no choice.
    """
    wanted = expected.strip().strip("()").upper()
    if len(wanted) != 1 or not 0 <= ord(wanted) - ord("A") < choices:
        return unjudged(f"the expected answer {expected!r} is not one of the {choices} letters")
    statement = final_statement(answer)
    given = _letter(statement) if statement is not None else _letter_line(answer)
    if given is None:
        return wrong("no letter is chosen")
    return judged(given == wanted, f"{given} is not {wanted}")


def _letter(statement: str) -> str | None:
    found = _ONE_LETTER.match(statement)
    if not found:
        return None
    rest = statement[found.end() :]
    another = _ANOTHER.match(rest.lstrip(" )}]*.$"))
    return None if another and _ONE_LETTER.search(rest) else found[1].upper()


def _letter_line(answer: str) -> str | None:
    lines = [line for line in answer.splitlines() if line.strip()]
    found = _OPTION_LINE.match(lines[-1]) if lines else None
    return found[1].upper() if found else None


def _short(text: str, limit: int = 60) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")


def verify_format(completion: str, switch: Mode | None, *, truncated: bool = False) -> Outcome:
    """Whether thoughts stand where the switch wants them, and nowhere else.

    truncated: generation stopped at its limit, not at a stop token.
    """
    if switch is None:
        return right("the prompt has no switch")
    if switch not in ("on", "off"):
        raise ValueError(f"the switch is 'on', 'off' or absent (None), not {switch!r}")
    if switch == "on" and truncated:
        return right("cut short: exempt")
    return judged(obeys(completion, switch), _why_not(completion, switch))


def _why_not(completion: str, switch: Mode) -> str:
    opened, closed = completion.count(OPEN), completion.count(CLOSE)
    if switch == "off":
        return "off, but has tags of a thought" if opened or closed else "off, but says nothing"
    if (opened, closed) != (1, 1):
        return f"on, but has {opened} {OPEN} and {closed} {CLOSE} instead of one each"
    if not completion.lstrip().startswith(OPEN):
        return f"on, but does not begin with {OPEN}"
    return "on, but says nothing after its thought"
