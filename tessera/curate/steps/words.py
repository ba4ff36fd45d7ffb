r"""The words of a text as duplicates are compared by: words, numbers, operators.

`12 - 7`, `$12-7$` and `12 minus 7` are the same three words, `\frac{x}{2}` is `x / 2`, and `≤`,
`<=` and `\le` are one. Scripts without spaces (Chinese, Japanese, Thai, …) give a word a character.
`counted` is what tells two problems in the same words apart.
"""

from __future__ import annotations

import functools
import re
import unicodedata

_DIGITS = "zero one two three four five six seven eight nine ten eleven twelve".split()
# Said with a word or with a symbol or digit, it is the same.
SAME = {word: str(number) for number, word in enumerate(_DIGITS)}
SAME |= {"plus": "+", "minus": "-", "times": "*", "equals": "=", "percent": "%", "divided": "/"}
SAME |= {"×": "*", "÷": "/", "**": "^"}
# Words that make another problem of the same numbers; those of other languages are not here.
TELLING = frozenset(
    """
    add subtract multiply divide sum difference product quotient remainder total average mean median
    mode range variance half third quarter fifth tenth twice thrice double triple quadruple dozen
    hundred thousand million billion thirteen fourteen fifteen sixteen seventeen eighteen nineteen
    twenty thirty forty fifty sixty seventy eighty ninety first second fourth last next previous
    not no non never without except only or all any some none either neither who when where why how
    more less fewer greater smaller larger bigger lower higher longer shorter older younger taller
    heavier lighter faster slower earlier later above below over under before after most least
    maximum minimum max min largest smallest greatest biggest highest lowest longest shortest
    oldest youngest nearest increase decrease increased decreased increasing decreasing ascending
    descending gain loss gains loses left right up down even odd prime composite positive negative
    integer rational irrational real complex consecutive distinct inclusive exclusive equal unequal
    square squared cube cubed cubic root power factorial reciprocal inverse opposite absolute
    circle triangle rectangle pentagon hexagon octagon rhombus parallelogram trapezoid sphere
    cylinder cone cuboid prism pyramid string strings list lists tuple tuples dictionary array
    arrays area perimeter volume surface radius diameter circumference height width length diagonal
    derivative differentiate integral integrate antiderivative limit factor factors expand simplify
    solve prove gcd lcm multiple multiples divisor divisors numerator denominator
    sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp sqrt mod
    north south east west row column rows columns vowel vowels consonant consonants
    true false always sometimes seconds minutes hours days weeks months years decades centuries
    second minute hour day week month year cents dollars euros pounds inches feet yards miles meters
    metres centimeters centimetres kilometers kilometres grams kilograms ounces liters litres
    gallons
    monday tuesday wednesday thursday friday saturday sunday january february march april may june
    july august september october november december
    """.split()
) | frozenset(
    "〇零一二三四五六七八九十百千万萬億亿半两兩倍加减減乘除大小多少增高低最不未正负負奇偶左右上下"
)
BRACKETS = frozenset("()[]")
COMMON = frozenset(  # of one or two letters: others are names of points or of variables
    "a i an as at be by do dr go he hi if in is it me mr ms my of oh ok on rd so st th to tv us vs "
    "we nd".split()
)
LATEX = {
    **dict.fromkeys(("le", "leq", "leqslant"), "<="),
    **dict.fromkeys(("ge", "geq", "geqslant"), ">="),
    **dict.fromkeys(("ne", "neq"), "!="),
    **dict.fromkeys(("times", "cdot", "ast"), "×"),
    **dict.fromkeys(("mid", "vert", "lvert", "rvert", "|"), "|"),
    "lt": "<", "gt": ">", "div": "÷", "pm": "±", "{": "(", "}": ")", "%": "%", "lbrace": "(",
    "rbrace": ")", "lbrack": "[", "rbrack": "]", "cup": "∪", "cap": "∩", "in": "∈", "notin": "∉",
    "subset": "⊂", "circ": "∘", "infty": "∞", "to": "->", "rightarrow": "->", "neg": "¬",
    "land": "∧", "lor": "∨",
    **{
        name: unicodedata.lookup(f"GREEK SMALL LETTER {name}")
        for name in "alpha beta gamma delta epsilon theta mu pi rho sigma tau phi psi omega".split()
    },
}  # fmt: skip
DRESS = frozenset(
    "left right big bigg bigl bigr biggl biggr displaystyle textstyle text textbf textit mathrm "
    "mathbf mathit operatorname quad qquad limits begin end boxed degree label hspace".split()
)
SYMBOLS = {
    **dict.fromkeys("−–‒‐‑－", "-"), **dict.fromkeys("×·⋅∙∗", " × "), "÷": " ÷ ",
    "∕": "/", "⁄": "/",
    **dict.fromkeys("≤≦⩽", "<="), **dict.fromkeys("≥≧⩾", ">="), "≠": "!=", "√": " sqrt ",
    **dict.fromkeys("’‘ʼ′", "'"), "∣": "|", "°": " ", "㎡": " ", "•": " ",
}  # fmt: skip
# Roman numbers, and names of points (ABC, PQR); a few words more do no harm.
_NAME = re.compile("[ivxlcdm]{2,}|[a-f]{3,4}|[b-df-hj-np-tv-z]{3,4}")
# Chinese characters, kana, Thai, Lao, Burmese, Khmer, Tibetan.
DENSE = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]"
)
_ARGUMENT = r"\s*(?:\{((?:[^{}]|\{[^{}]*\})*)\}|(\w))"
_FRACTION = re.compile(rf"\\[dtc]?frac{_ARGUMENT}{_ARGUMENT}")
_COMMAND = re.compile(r"\\([a-z]+|.)", re.DOTALL)
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?")
# Marks of list items and quotations, and tags, none of which is an operator.
_MARK = re.compile(r"^[ \t]*[-*+>][ \t]", re.MULTILINE)
_TAG = re.compile(r"</?(?:br|p|b|i|u|em|strong|sub|div|span|ul|ol|li)\s*/?>")
_SPACES = re.compile("  +")
_LETTER = r"[a-z\x80-\U0010ffff]"
_FUNCTION = r"(?:sin|cos|tan|log|ln|sqrt|exp)\b"
# A hyphen and a slash are operators before a number, a name of one letter, a bracket or a function,
# and not directly behind a word (covid-19); `xy-1` is a difference.
_OPERAND = (
    rf"(?<![a-z][a-z][a-z].)(?=\s?[-+]?\s?(?:[\d(\[|\\]|\.\d|[b-hj-z](?![a-z'])"
    rf"|[ai](?![a-z']|\s+[a-z][a-z])|{_FUNCTION}))"
)
_TOKEN = re.compile(
    rf"{_LETTER}+(?:'{_LETTER}+)*"
    r"|(?![ ,?$])(?:"  # most of what is not a word is one of these: no need to try the rest
    r"\d+(?:,\d{3})*(?!\d)(?:\.\d+)?|\d+|(?<![\w.])\.\d+"
    r"|<=>|<=|>=|!=|=>|->|[<>^=+%|()\[\]]"
    rf"|-{_OPERAND}|/{_OPERAND}"
    r"|(?<=[\w)\]])\*\*?(?=[\w(\[-])|(?<=[\w)\]] )\*(?= [\w(\[-])"
    r"|(?<=[\d)])!|(?<=\b[a-z])(?:!|'+(?![a-z]))|\\[a-z]+)"
)


class _Plain(dict[int, str]):
    """What stands for a character above ASCII."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        plain = unicodedata.normalize("NFKC", char).lower()
        kind = unicodedata.category(char)
        if char in SYMBOLS:
            found = SYMBOLS[char]
        elif kind == "Nd":
            found = str(unicodedata.digit(char))
        elif plain != char and plain.isascii():
            raised = unicodedata.decomposition(char).startswith("<super>")
            found = f"^{plain}" if raised else plain
        elif "\u2044" in plain:  # one half
            found = f" {plain.replace(chr(0x2044), '/')} "
        elif DENSE.match(char):
            found = f" {char} "
        else:
            found = {"P": " ", "Z": " ", "C": " ", "S": f" {char} "}.get(kind[0], char)
        self[code] = found
        return found


_PLAIN = _Plain({code: chr(code) for code in range(128)})


def tokens(text: str) -> list[str]:
    """Words in lower case, numbers, operators and brackets, in order."""
    text = text.lower()
    if not text.isascii():
        text = unicodedata.normalize("NFC", text).translate(_PLAIN)
    if "$" in text:
        text = text.replace("$", " ")
    if "\\" in text:
        text = _without_latex(text)
    if "{" in text:
        text = text.replace("{", "(").replace("}", ")")
    if "<" in text:
        text = _TAG.sub(" ", text)
    if "\n" in text or text[:1] in ("-", "*", "+", ">"):
        text = _MARK.sub(" ", text)
    if "  " in text:
        text = _SPACES.sub(" ", text)
    found = [*map(_same, _TOKEN.findall(text))]
    return found[:-1] if found[-1:] == ["="] else found  # "12 + 7 = ?"


@functools.lru_cache(1 << 16)
def _same(token: str) -> str:
    """`three` as 3, `1,000` as 1000, `2.50` as 2.5, `0.5` as .5, `**` as ^."""
    if not token[-1].isdigit():
        return SAME.get(token, token)
    token = token.replace(",", "")
    return f"0{token}".rstrip("0").rstrip(".").lstrip("0") or "0" if "." in token else token


def _without_latex(text: str) -> str:
    changed = 1
    while changed:
        text, changed = _FRACTION.subn(r" (\1\2)/(\3\4) ", text)
    return _COMMAND.sub(_said, _DEGREES.sub(" ", text))


def _said(command: re.Match[str]) -> str:
    name = command[1]
    if name.isdigit():
        return name
    if name in LATEX:
        return f" {LATEX[name].strip()} " if LATEX[name] > "~" else LATEX[name]
    if name in TELLING and name not in DRESS:
        return f" {name} "
    return " " if name in DRESS or not name.isalpha() else f" \\{name} "


def counted(found: list[str]) -> list[str]:
    """Of the tokens, those that make another problem of the same words, in order.

    Numbers, operators, names of one or two letters or of points, `TELLING` words, and brackets
    around two or more of these and nothing else.
    """
    return _bracketed(found) if "(" in found or "[" in found else [*filter(_counts, found)]


@functools.lru_cache(1 << 16)
def _counts(token: str) -> bool:
    if token in TELLING or token[0] < "a" or _NAME.fullmatch(token):
        return True
    return len(token) < 3 and token not in COMMON and not DENSE.match(token)


def _bracketed(found: list[str]) -> list[str]:
    kept: list[str] = []
    opened: list[tuple[int, int]] = []  # where, and the words that do not count before it
    others = 0
    for one in found:
        if one in ("(", "["):
            opened.append((len(kept), others))
            kept.append(one)
        elif one in (")", "]"):
            if opened:
                at, before = opened.pop()
                if others > before or len(kept) - at < 3:
                    del kept[at]
                else:
                    kept.append(one)
        elif _counts(one):
            kept.append(one)
        else:
            others += 1
    for at, _ in reversed(opened):
        del kept[at]
    return kept
