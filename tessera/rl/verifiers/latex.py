"""One spelling for LaTeX that is drawn the same: fonts, colours, spacing, fractions, Unicode.

The result is LaTeX again, so that a parser of mathematics can read it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

_SUPERSCRIPT, _SUBSCRIPT = (
    dict(zip(chars, "0123456789+-n", strict=True)) for chars in ("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋ₙ")
)
_SYMBOLS = str.maketrans(
    {
        **dict.fromkeys("−–‒﹣－", "-"),
        **dict.fromkeys("°º˚", r"^\circ "),
        **dict.fromkeys("\u00a0\u2007\u2009\u200a\u202f\u3000", " "),
        **dict.fromkeys("\u200b\u2061\ufeff", ""),
        **dict.fromkeys("‘’′", "'"),
        **dict.fromkeys("“”", '"'),
        "×": r"\times ",
        "⋅": r"\cdot ",
        "·": r"\cdot ",
        "÷": "/",
        "⁄": "/",
        "∕": "/",
        "π": r"\pi ",
        "∞": r"\infty ",
        "≈": r"\approx ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "±": r"\pm ",
        "∅": r"\emptyset ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "％": "%",
        "，": ", ",
        "（": "(",
        "）": ")",
    }
)
LONGEST = 2000  # characters of an answer; what is longer is a text, and only its spaces change
_PLAIN = re.compile(r"[A-Za-z0-9 ,./+()-]*")
_WORD_END = r"(?![a-zA-Z])"
_NAMED_FONTS = r"\\(?:math|text)(?:bf|it|sf|tt|sl|sc|md|up)"
_UNWRAPPED = re.compile(
    rf"(?:{_NAMED_FONTS}|\\(?:boldsymbol|bm|emph|underline|boxed|fbox|framebox|hbox|ensuremath|pmb))\s*\{{"
)
_TEXT = re.compile(
    r"\\(?:mathrm|textrm|textnormal|text|mbox|operatorname\*?)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_COLOUR = re.compile(r"\\(?:text|math)?color(?:box)?\s*(?:\[[^\]]*\])?\s*\{[^{}]*\}")
_SWITCHES = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|bf|it|rm|sf|tt|tiny|small|normalsize"
    rf"|large|Large|huge|Huge|[bB]igg?[lrm]?|middle|mathstrut|strut){_WORD_END}"
    rf"|\\m?(?:left|right){_WORD_END}\s*\.?"
)
_THOUSANDS = re.compile(r"(?<=\d)\s*(?:\\[,!:;]|,\\!|\{\s*[,']?\s*\})\s*(?=\d{3}(?!\d))")
_SPACES = re.compile(rf"(?<!\\)\\[,;:!> ]|\\q?quad{_WORD_END}|\\enspace{_WORD_END}|(?<!\\)~|\s")
_HORIZONTAL = re.compile(
    r"\\[hv]space\*?\s*\{[^{}]*\}|\\(?:hfill|newline|par|noindent)(?![a-zA-Z])"
)
_DELIMITERS = re.compile(r"(?<!\\)\\[()\[\]]")
_DEGREE = r"\\(?:circ|degrees?|textdegree|deg)(?![a-zA-Z])(?:\{\})?"
_NO_BRACES = str.maketrans("", "", "{}")
_DEGREES = re.compile(
    rf"\^\s*\{{?\s*\\?o\s*(?:\}}|(?![a-z]))|\^\s*\{{\s*{_DEGREE}\s*\}}|\^?\s*{_DEGREE}\s*"
)
_PER_CENT = r"(?:\\?%|per ?cent(?:age)?|pct)\.?"
_PERCENT = re.compile(rf"\\%|\s*\\text\{{\s*{_PER_CENT}\s*\}}|(?<=\S)\s+{_PER_CENT}$", re.I)
_OVER = re.compile(rf"\{{([^{{}}]*)\\over{_WORD_END}([^{{}}]*)\}}")
_FRACTION = re.compile(rf"\\[dtcx]?frac{_WORD_END}")
_ROOT = re.compile(rf"\\sqrt{_WORD_END}\s*(?![\s\[{{])")
_LETTER = re.compile(r"\\text\{([a-zA-Z]|[^{}]*\d[^{}]*)\}")  # or a number in words
_CONSTANT = re.compile(r"(?<![\w ])\\text\{([ei]|[-+])\}")
_BARS = re.compile(r"(?:\d[\u0304\u0305\u0307])+")  # digits with a line or a dot above
_RELATIONS = {"<=": r"\le ", ">=": r"\ge ", "!=": r"\ne ", "{:}": ":"}
_RELATION = re.compile(r"<=|>=|(?<![\d)])!=|\{:\}")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # with what a backslash escapes, to skip it
_BRACED_COMMA = re.compile(r"\{\s*,\s*\}|(?<=\d)\{(?=,\d)|(?<=,)\}(?=\d)")


def undressed(text: str) -> str:
    """The text without what changes only its look. Currency signs stand as `\\$`."""
    if len(text) > LONGEST:
        return " ".join(text.split())
    if _PLAIN.fullmatch(text) and "pe" not in text and "pct" not in text:  # no "percent"
        return _trimmed(text)
    text = _unicode(text)
    text = _dollars(_DELIMITERS.sub(" ", text))
    text = _HORIZONTAL.sub(" ", _COLOUR.sub("", text))
    text = _unwrapped(text)
    text = _TEXT.sub(_as_text, text)
    text = _CONSTANT.sub(r"\1", text)
    text = _THOUSANDS.sub("", _SWITCHES.sub(" ", text)).replace("\\!", "")
    text = _SPACES.sub(" ", _BRACED_COMMA.sub(",", text))
    text = text.replace(r"\varnothing", r"\emptyset")
    text = _OVER.sub(r"\\frac{\1}{\2}", _PERCENT.sub("%", _DEGREES.sub(r"^\\circ ", text)))
    text = _arguments(text, _FRACTION, 2, lambda a, b: rf"\frac{{{a}}}{{{b}}}")
    text = _arguments(text, _ROOT, 1, lambda a: rf"\sqrt{{{a}}}")
    return _trimmed(text)


def _as_text(found: re.Match[str]) -> str:
    return rf"\text{{{' '.join(_SPACES.sub(' ', found[1]).translate(_NO_BRACES).split())}}}"


def _unicode(text: str) -> str:
    text = _RELATION.sub(lambda found: _RELATIONS[found[0]], text.translate(_SYMBOLS))
    if text.isascii():
        return text
    text = _BARS.sub(lambda found: rf"\overline{{{found[0][::2]}}}", text)
    found = []
    for index, char in enumerate(text):
        decomposed = unicodedata.normalize("NFKD", char).replace("⁄", "/")
        before = found[-1] if found else ""
        if char in _SUPERSCRIPT:
            joined = before.endswith("}") and text[index - 1] in _SUPERSCRIPT
            found[-1:] = [before[:-1] if joined else before + "^{"] if found else ["^{"]
            found.append(_SUPERSCRIPT[char] + "}")
        elif char in _SUBSCRIPT:
            joined = before.endswith("}") and text[index - 1] in _SUBSCRIPT
            found[-1:] = [before[:-1] if joined else before + "_{"] if found else ["_{"]
            found.append(_SUBSCRIPT[char] + "}")
        elif "/" in decomposed and char != "/":  # ½
            top, bottom = decomposed.split("/")
            found.append(rf" \frac{{{top}}}{{{bottom}}}")
        else:
            found.append(unicodedata.normalize("NFKC", char))
    return "".join(found)


def _dollars(text: str) -> str:
    """Without the dollars that open and close mathematics; an odd one is a sum of money."""
    parts = re.split(r"(?<!\\)\$", text)
    if len(parts) % 2:
        return " ".join(parts) if len(parts) > 1 else text
    first = " ".join(parts[1:])
    return rf"{parts[0]}\${first}"


def _unwrapped(text: str) -> str:
    """`\\mathbf{x}` and its like become `x`."""
    while found := _UNWRAPPED.search(text):
        end = closing(text, found.end())
        if end is None:
            return text
        text = text[: found.start()] + text[found.end() : end] + text[end + 1 :]
    return text


def closing(text: str, start: int) -> int | None:
    """The place of the brace that closes one opened just before start; None where none does."""
    return closings(text).get(start - 1)


def closings(text: str) -> dict[int, int]:
    """The place of each opening brace that is closed, with that of the brace that closes it."""
    opened: list[int] = []
    found: dict[int, int] = {}
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            found[opened.pop()] = brace.start()
    return found


def _arguments(text: str, command: re.Pattern[str], count: int, write: Callable[..., str]) -> str:
    """Braces around the arguments that a command takes as TeX does: `\\frac12`, `\\frac\\pi2`."""
    found = command.search(text)
    start = 0
    while found:
        place, parts = found.end(), []
        for _ in range(count):
            part = re.compile(r"\s*(?:(\{)|(\\sqrt\{[^{}]*\}|\\[a-zA-Z]+|[^\s{}\\]))").match(
                text, place
            )
            end = closing(text, part.end()) if part and part[1] else None
            if not part or (part[1] and end is None):
                break
            parts.append(text[part.end() : end].strip() if part[1] else part[2])
            place = part.end() if end is None else end + 1
        start = found.end()
        if len(parts) == count:
            written = write(*parts)
            text = text[: found.start()] + written + text[place:]
            start = found.start() + len(written.partition("{")[0])
        found = command.search(text, start)
    return text


def _trimmed(text: str) -> str:
    """Without outer spaces, Markdown's marks, a full stop, and braces around the whole."""
    before = None
    while before != text:
        before = text
        text = " ".join(text.split())
        text = re.sub(r"^([_\"]{1,3})(.+)\1$", r"\2", text).strip("*`").strip()
        if not text.endswith(".."):
            text = text.rstrip(".,;").rstrip()
        if text.startswith("{") and closing(text, 1) == len(text) - 1:
            text = text[1:-1]
        if found := _LETTER.fullmatch(text):
            text = found[1]
    return text
