"""Whether an answer is, mathematically, the expected one.

`answer.py` decides on numbers, times and lists of them; math-verify, which stays in this file, on
what is left. It compares six decimals (`2^{-98}` is `2^{-99}`), takes letters for units (`3t` is 3)
and an empty result for any other (`12:00`): its units are off, and what it calls equal must agree
in value, too. Its deadlines use SIGALRM, which fails off the main thread: they are off.
"""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

from tessera.rl.verifiers.answer import boxed, final_answer, last_expression, same_answer
from tessera.rl.verifiers.outcome import Outcome, right, unjudged, wrong
from tessera.rl.verifiers.quantity import clock, quantity, without_unit
from tessera.runs.files import RunError

LONGEST = 2000  # characters of a final answer, and of an end that is searched for one
DIGITS = 40  # to which equal values must agree
_COMMAND = re.compile(r"\\(?!text)[a-zA-Z]+")
_NUMBER_WORDS = re.compile(
    r"\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|twenty|thirty"
    r"|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|billion|half|third|quarter)s?"
    r"\b",
    re.IGNORECASE,
)
_NO_GOLD = re.compile(
    r"\b(?:answers?|see|above|below|proof|prove|shown?|solution|unknown|omitted|given|varies|n/?a|is"
    r"|are|was|tbd|todo|answer|null|nan|undetermined|missing)\b",
    re.IGNORECASE,
)
_TEXT_OR_COMMAND = re.compile(r"\\text\{[^{}]*\}|\\[a-zA-Z]+")
_ENGLISH = re.compile(r"\b(?!and\b)(?:[a-z]{3,}|it|is|we|so|to|in|of|be|at|as|by)\b", re.IGNORECASE)
_EQUALS = re.compile(r"(?<![!<>:=])=(?!=)|\\approx(?![a-z])")
_PLACEHOLDER = re.compile(r"n\s?/?\s?a|[?._*-]+|\[?asy.*", re.IGNORECASE | re.DOTALL)


class UnreadableError(ValueError):
    """An expected answer that cannot be read as mathematics; the text says which."""


def verify_math(answer: str, expected: str) -> Outcome:
    """Whether the answer's box, or else what it states or ends with, equals the expected one.

    expected: LaTeX, a plain expression or a name, with or without `$` or boxes. One that cannot be
    read is could-not-judge wherever the answer does not repeat it.
    """
    gold = boxed(expected)
    gold = expected.strip() if gold is None else gold
    if not gold:
        return unjudged("the expected answer is empty")
    given = _stated(answer, gold)
    if not given:
        return wrong("no answer found")
    if len(given) > LONGEST:
        return wrong(f"the answer holds {len(given)} characters")
    try:
        same = same_answer(given, gold, same_expression)
    except UnreadableError as error:
        return unjudged(str(error))
    except RunError:
        raise
    except (Exception, RecursionError) as error:
        return unjudged(f"math-verify failed: {type(error).__name__}: {error}"[:200])
    return right() if same else wrong(f"{given[:60]!r} is not {gold[:60]!r}")


def _stated(answer: str, gold: str) -> str | None:
    """The final answer: boxed, stated, the whole of a short text, or the last expression."""
    stated = final_answer(answer)
    if stated is None:
        whole, end = answer.strip()[: LONGEST + 1], last_expression(answer[-LONGEST:])
        alone = quantity(whole) or _is_expression(whole) or same_answer(whole, gold)
        return whole if alone or end is None else end
    if quantity(stated.partition(" (")[0]):
        return stated.partition(" (")[0]  # "The answer is 8 (eight)."
    if stated.endswith("!") and boxed(answer) is None and same_answer(stated[:-1], gold):
        return stated[:-1]  # "The answer is 42!" need be no factorial
    if boxed(answer) is None and not same_answer(stated, gold) and len(stated.split()) > 3:
        shorter = last_expression(stated)  # "the answer is therefore $x = 4$ metres a second"
        return stated if shorter is None else shorter
    return stated


def _is_expression(text: str) -> bool:
    """Whether a whole text is a formula: one line without words, `x = 5 or x = -5`."""
    plain = _TEXT_OR_COMMAND.sub(" ", text.strip())
    return "\n" not in plain and not _ENGLISH.search(plain)


def same_expression(given: str, gold: str) -> bool:
    """Whether two undressed expressions are equal. Raises UnreadableError for the expected one."""
    (given, unit), (gold, gold_unit) = without_unit(given), without_unit(gold)
    if unit != gold_unit and {unit, gold_unit} == {"", r"^\circ"} and r"\pi" in given + gold:
        degrees, radians = (given, gold) if unit else (gold, given)
        return same_expression(rf"\frac{{({degrees})\pi}}{{180}}", radians)
    if quantity(given) and quantity(gold):
        return same_answer(given, gold)
    words = _words(gold)
    if words or _PLACEHOLDER.fullmatch(gold):
        if not words or _is_prose(words):
            raise UnreadableError(
                f"the expected answer {gold[:60]!r} cannot be read as mathematics"
            )
        return False
    if gold.endswith("%") and given.endswith("%"):
        return same_answer(given[:-1], gold[:-1], same_expression)
    given, gold = (
        rf"\frac{{{each[:-1]}}}{{100}}" if each[-1:] == "%" else each for each in (given, gold)
    )
    if not _EQUALS.search(gold) and (shorter := _last_side(given)):
        return same_answer(shorter, gold, same_expression)
    parse, verify = require_library()
    wanted, found = parse(f"${gold}$"), parse(f"${given}$")
    if not _read(wanted) or clock(gold):
        raise UnreadableError(f"the expected answer {gold[:60]!r} cannot be read as mathematics")
    if not _read(found) or clock(given) or _words(given):
        return False
    if re.search(r"\\\{.*\\\}", given) and re.fullmatch(r"[(\[].*,.*[)\]]", gold):
        return False  # a set where an ordered pair or an interval was expected
    return verify(wanted[:1], found[:1]) and _agree(wanted[0], found[0])


def _last_side(text: str) -> str:
    """What an equation comes to: of `3 + 4 = 7` 7, of `x = 1/3 \\approx 0.3` 1/3."""
    exact, _, rounded = text.partition(r"\approx")
    sides = _EQUALS.split(exact)
    if re.search("[<>!]", text) or (len(sides) == 1 and not rounded):
        return ""
    return (sides[-1] if len(sides) > 1 or re.search(r"\d", exact) else rounded).strip()


def _words(text: str) -> list[str]:
    """The words of a text that is a name or a sentence; none of one that is mathematics."""
    if _COMMAND.search(text) or re.search(r"[=^_+<>|\\]|\d[a-z(]", text.replace("\\text", "")):
        return []
    words = re.findall(r"[A-Za-zÀ-ɏ'’-]{2,}", text.replace("\\text", ""))
    functions = {"sqrt", "sin", "cos", "tan", "log", "ln", "exp", "pi", "inf", "infinity", "frac"}
    if functions & {word.lower() for word in words}:
        return []
    letters = sum(map(len, words))
    named = "\\text" in text or any(len(word) > 3 for word in words) or len(words) > 1
    return (
        words
        if words and named and 2 * letters > len(text.replace("\\text", "").replace(" ", ""))
        else []
    )


def _is_prose(words: list[str]) -> bool:
    """Whether words are a sentence, a number or a placeholder; names are none: `New York`."""
    text = " ".join(words)
    names = len(words) < 4 and all(word[0].isupper() for word in words)
    return (len(words) > 1 and not names) or bool(
        _NUMBER_WORDS.search(text) or _NO_GOLD.search(text)
    )


def _read(parsed: list[Any]) -> bool:
    """Whether something was parsed, and to a value: `12:00` gives an infinity."""
    import sympy

    if not parsed or isinstance(parsed[0], str):
        return False
    return not (isinstance(parsed[0], sympy.Basic) and parsed[0].has(sympy.zoo, sympy.nan))


def _agree(wanted: Any, found: Any) -> bool:
    """Whether expressions that were found equal have one value: at a point, for those with letters.

    What has no numeric value (sets, relations) is left to the comparison that was made.
    """
    import sympy

    if isinstance(wanted, sympy.MatrixBase) and isinstance(found, sympy.MatrixBase):
        return all(map(_agree, wanted.flat(), found.flat()))
    pair = [wanted, found]
    if isinstance(wanted, sympy.Eq) and isinstance(found, sympy.Eq) and wanted.lhs == found.lhs:
        pair = [wanted.rhs, found.rhs]
    if (
        any(isinstance(one, sympy.MatrixExpr) for one in pair)
        or not all(isinstance(one, sympy.Expr) for one in pair)
        or any(one.has(sympy.Float) for one in pair)
    ):
        return True
    names = sorted({str(symbol) for one in pair for symbol in one.free_symbols})
    points = {name: sympy.Rational(1009 + 97 * i, 307 + 61 * i) for i, name in enumerate(names)}
    values = [
        sympy.N(
            one.subs({symbol: points[str(symbol)] for symbol in one.free_symbols}).doit(), DIGITS
        )
        for one in pair
    ]
    if not all(value.is_number and value.is_finite for value in values):
        return True
    scale = max(map(abs, values))
    return not scale or bool(abs(values[0] - values[1]) < scale * sympy.Float(10) ** (10 - DIGITS))


@functools.cache
def require_library() -> tuple[Any, Any]:
    """math-verify's parse and verify, both raising what goes wrong. Raises RunError."""
    try:
        import math_verify
        from latex2sympy2_extended import NormalizationConfig
    except ModuleNotFoundError:
        raise RunError(
            "checking mathematics needs math-verify: pip install 'tessera[rl]'"
        ) from None
    # It warns once that its deadlines are off, which is what the pool is for.
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)
    spelling = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
    targets = [math_verify.LatexExtractionConfig(normalization_config=spelling)]

    def parse(text: str) -> list[Any]:
        return math_verify.parse(text, targets, parsing_timeout=None, raise_on_error=True)  # pyright: ignore

    def verify(wanted: list[Any], found: list[Any]) -> bool:
        return math_verify.verify(
            wanted, found, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True
        )

    return parse, verify
