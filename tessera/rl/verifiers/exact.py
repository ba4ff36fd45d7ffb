"""Answers that need no mathematics (a text, a number, one of several letters), and the format.

The format reward (Llama-Nemotron §5.1) is `obeys` of data/switch.py with a reason, so what is
rewarded is what is measured: with the switch on, one closed thought first and an answer after it;
with the switch off, an answer and no thought.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from tessera.data.conversation import Mode
from tessera.data.switch import obeys
from tessera.data.thought import CLOSE, OPEN
from tessera.rl.verifiers.answer import NUMBER, final_answer, fraction, number, plain_text
from tessera.rl.verifiers.outcome import Outcome, judged, right, unjudged, wrong

# A letter, alone or in the brackets and emphasis that models put around it.
_ONE_LETTER = re.compile(
    r"(?:option|choice)?[\s*_`\"'$([{]*(?:\\(?:text|mathrm|mathbf|textbf)\s*\{)?\(?([A-Za-z])\)?"
    r"(?=$|[\s).\]}*_:`\"'$,;])",
    re.IGNORECASE,
)
_OPTION_LINE = re.compile(r"^[\s*_(]*(?:option|choice)?\s*\(?([A-Z])\)?[\s*_).:]*$", re.IGNORECASE)
_ANOTHER = re.compile(r"\b(?:and|or)\b|[,/&]")
_GOES_ON = re.compile(r"\s+(?!(?:is|and|or)\b)[a-z]")  # "a matter of taste", "I think": a word


def verify_exact(answer: str, expected: str, *, ignore_case: bool = True) -> Outcome:
    """Whether the final answer, or else the whole text, is a text, up to spaces and width."""
    if not expected.strip():
        return unjudged("the expected answer is empty")
    given = final_answer(answer)
    given = answer if given is None else given
    if not given.strip():
        return wrong("no answer")
    return judged(
        _plain(given, ignore_case) == _plain(expected, ignore_case),
        f"{_short(given)} is not {_short(expected)}",
    )


def _plain(text: str, ignore_case: bool) -> str:
    text = " ".join(unicodedata.normalize("NFKC", plain_text(text)).split())
    return text.casefold() if ignore_case else text


def verify_number(answer: str, expected: str | float, *, tolerance: float = 0.0) -> Outcome:
    """Whether the final answer's number, or else the text's last, is the expected one.

    tolerance: relative; at 0 the two must be equal as fractions, `0.5` and `1/2` among them.
    """
    wanted = _only_number(str(expected))
    if wanted is None:
        return unjudged(f"the expected answer {_short(str(expected))} is not a number")
    stated = final_answer(answer)
    given = None if stated is None else number(stated)
    if given is None:
        numbers = _numbers(answer if stated is None else stated)
        if not numbers:
            return wrong("no number in the answer")
        if stated is not None and len(set(numbers)) > 1 and "=" not in stated:
            return wrong(f"several numbers are stated: {_short(stated)}")
        given = numbers[-1]
    close = abs(given - wanted) <= Fraction(tolerance) * abs(wanted)
    return judged(close, f"{_short(str(float(given)))} is not {_short(str(expected))}")


def _numbers(text: str) -> list[Fraction]:
    text = text.replace("\\,", "").replace("{,}", ",").replace("\N{MINUS SIGN}", "-")
    text = text.replace("\\!", "").replace("\\$", "").replace("$", "")
    found = (fraction(match.group()) for match in NUMBER.finditer(text))
    return [value for value in found if value is not None]


def _only_number(text: str) -> Fraction | None:
    numbers = _numbers(text)
    return numbers[0] if len(numbers) == 1 else number(text)


def verify_choice(answer: str, expected: str, *, choices: int = 26) -> Outcome:
    """Whether the one letter that the answer settles on is the expected one.

    The final answer names it, or a line that holds nothing else; two letters are no choice.
    """
    wanted = expected.strip().strip("()").upper()
    if len(wanted) != 1 or not 0 <= ord(wanted) - ord("A") < choices:
        return unjudged(f"the expected answer {expected!r} is not one of the {choices} letters")
    stated = final_answer(answer)
    given = _letter(stated) if stated is not None else _letter_line(answer)
    if given is None:
        return wrong("no letter is chosen")
    return judged(given == wanted, f"{given} is not {wanted}")


def _letter(stated: str) -> str | None:
    found = _ONE_LETTER.match(stated)
    if not found:
        return None
    letter, rest = found[1], stated[found.end() :]
    if (letter in "AI" or letter.islower()) and _GOES_ON.match(rest):
        return None
    another = _ANOTHER.match(rest.lstrip(" )}]*.$"))
    return None if another and _ONE_LETTER.search(rest) else letter.upper()


def _letter_line(answer: str) -> str | None:
    lines = [line for line in answer.splitlines() if line.strip()]
    found = _OPTION_LINE.match(lines[-1]) if lines else None
    return found[1].upper() if found else None


def _short(text: str, limit: int = 60) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")


def verify_format(completion: str, switch: Mode | None, *, truncated: bool = False) -> Outcome:
    """Whether thoughts stand where the switch wants them, and nowhere else.

    truncated: generation stopped at its limit, not at a stop token. With the switch on, that is
    exempt, as in NVIDIA's checker: what is missing is length, which other rewards judge.
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
