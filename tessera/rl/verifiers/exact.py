"""Answers that need no mathematics (a text, a number, one of several letters), and the format.

The format reward (Llama-Nemotron §5.1) is `obeys` of data/switch.py with a reason.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from tessera.data.conversation import Mode
from tessera.data.switch import obeys
from tessera.data.thought import CLOSE, OPEN
from tessera.rl.verifiers.answer import NUMBER, final_answer, number, plain_text, same_answer
from tessera.rl.verifiers.outcome import Outcome, judged, right, unjudged, wrong

_ONE_LETTER = re.compile(
    r"(?:(?:the )?(?:option|choice|letter)\b)?[\s*_`\"'$(\[{]*([A-Za-z])"
    r"(?=$|[\s).\]}*_:`\"$,;]|'(?!\w))",
    re.IGNORECASE,
)
_CORRECT = r"(?:\bis (?:the )?(?:correct|right|best|answer)(?: (?:answer|option|choice|one))?\.?)?"
_OPTION_LINE = re.compile(
    rf"(?:(?:so|thus|therefore|hence),? )?[\s*_(\[]*(?:(?:the )?(?:option|choice))?\s*"
    rf"\(?([A-Z])\)?[\s*_).:\]]*{_CORRECT}[\s*]*",
    re.IGNORECASE,
)
_OPTION_TEXT = re.compile(r"\s*(?:\(([A-Z])\)|([A-Z])[):.])\s+\S[^\n]*")  # `B) Paris`, all of it
_CHOSEN = re.compile(
    r".*\b(?i:answer|choose|pick|select|choice|option|answer (?:must|should|would|will|has to) be)"
    r"\s+(?i:option |choice |letter )?[*(]*([A-Z])[*)]*\.?\s*",
    re.DOTALL,
)
_ANOTHER = re.compile(
    r"\W*(?:\b(?:and|or)\b|[,/&])\W*(?:(?:also|both|option|choice)\W+)*([A-Za-z]|[IVX]+)(?![\w'])"
)
# "a matter of taste", "I think": a word, unless what follows only explains the letter.
_GOES_ON = re.compile(
    r"\s+(?!(?:is|and|or|as|for|due|given|rather|instead|over|with|which|from|by|but)\b)[a-z]"
)


def verify_exact(answer: str, expected: str, *, ignore_case: bool = True) -> Outcome:
    """Whether the final answer, or else the whole text, is a text, up to spaces and width."""
    if not expected.strip():
        return unjudged("the expected answer is empty")
    given = final_answer(answer)
    given = answer if given is None else given
    if not given.strip():
        return wrong("no answer")
    plain = [
        " ".join(unicodedata.normalize("NFKC", plain_text(t)).split()) for t in (given, expected)
    ]
    same = plain[0] == plain[1] if not ignore_case else plain[0].casefold() == plain[1].casefold()
    return judged(same, f"{_short(given)} is not {_short(expected)}")


def verify_equal(answer: str, expected: str) -> Outcome:
    """Whether the final answer, or else the whole text, is the same number or text."""
    if not expected.strip():
        return unjudged("the expected answer is empty")
    stated = final_answer(answer)
    given = answer.strip() if stated is None else stated
    return judged(same_answer(given, expected), f"{_short(given)} is not {_short(expected)}")


def verify_number(answer: str, expected: str | float, *, tolerance: float = 0.0) -> Outcome:
    """Whether the final answer's number, or else the text's last, is the expected one.

    tolerance: relative; at 0 the two must be equal as fractions, `0.5` and `1/2` among them.
    """
    only = _numbers(str(expected))
    wanted = only[0] if len(only) == 1 else number(str(expected))
    if wanted is None:
        return unjudged(f"the expected answer {_short(str(expected))} is not a number")
    stated = final_answer(answer)
    numbers = _numbers(answer) if stated is None else _stated_numbers(stated)
    if not numbers:
        return wrong("no number in the answer")
    if stated is not None and len(set(numbers)) > 1:
        return wrong(f"several numbers are stated: {_short(stated)}")
    given = numbers[-1]
    close = abs(given - wanted) <= Fraction(tolerance) * abs(wanted)
    return judged(close, f"{_short(str(float(given)))} is not {_short(str(expected))}")


def _stated_numbers(stated: str) -> list[Fraction]:
    """The numbers of a final answer: of `3 + 4 = 7 (seven)` 7 alone."""
    sides = [number(side.partition(" (")[0]) for side in stated.split("=")]
    known = [value for value in sides if value is not None]
    return known or _numbers(stated.rpartition("=")[2])


def _numbers(text: str) -> list[Fraction]:
    text = text.replace("\\,", "").replace("{,}", ",").replace("\N{MINUS SIGN}", "-")
    text = text.replace("\\!", "").replace("\\$", "").replace("$", "")
    found = (number(match.group()) for match in NUMBER.finditer(text))
    return [value for value in found if value is not None]


def verify_choice(answer: str, expected: str, *, choices: int = 26) -> Outcome:
    """Whether the one letter that the answer, or its last line, settles on is the expected."""
    wanted = expected.strip().strip("()").upper()
    if len(wanted) != 1 or not 0 <= ord(wanted) - ord("A") < choices:
        return unjudged(f"the expected answer {expected!r} is not one of the {choices} letters")
    stated = final_answer(answer)
    if stated is not None:
        given = _letter(plain_text(stated))
    else:
        given = _unstated_letter(answer.strip())
    if given is None:
        return wrong("no letter is chosen")
    return judged(given == wanted, f"{given} is not {wanted}")


def _unstated_letter(answer: str) -> str | None:
    """The letter that the last line is, chooses or calls correct, or that a one-liner has."""
    last = answer.rpartition("\n")[2]
    found = _OPTION_LINE.fullmatch(plain_text(last)) or _CHOSEN.fullmatch(plain_text(last))
    found = found or _OPTION_TEXT.fullmatch(answer)
    return next(letter for letter in found.groups() if letter).upper() if found else None


def _letter(stated: str) -> str | None:
    found = _ONE_LETTER.match(stated)
    if not found:
        return None
    letter, rest = found[1], stated[found.end() :]
    if _is_word(letter, rest):
        return None
    another = _ANOTHER.match(rest)
    if another and not _is_word(another[1], rest[another.end() :]):
        return None
    return letter.upper()


def _is_word(letter: str, rest: str) -> bool:
    """Whether a letter is the English word: `a matter of taste`, `I think`."""
    return (letter in "AI" or letter.islower()) and bool(_GOES_ON.match(rest))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else text[:59] + "…")


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
