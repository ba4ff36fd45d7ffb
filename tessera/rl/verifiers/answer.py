"""The final answer of a text: where it stands, and when two final answers are the same.

The final answer is the last one of the most explicit form that the text has: `\\boxed{…}` (what the
paper's prompts ask for), else `<answer>…</answer>`, else a line `#### 42` (GSM8K), else the rest of
the line after "answer is", "answer:" or "answer =", where "correct option", "correct choice" and,
at the start of a line, "result" may stand for "answer". Boxes that only `,`, `and` or `or` part are
one answer of several.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from tessera.rl.verifiers.latex import closings, undressed
from tessera.rl.verifiers.quantity import (
    DECIMAL,
    LONGEST,
    SCALES,
    clock,
    quantity,
    same_quantity,
    same_time,
)

_BOXED = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
_OPENS = r"(?:[\s$~*&]|\\[\[( ,]|\\q?quad)*"
_BETWEEN = re.compile(  # two boxes of one answer: "$\boxed{1}$ and $y = \boxed{2}$"
    r"(?:[\s,;&.$~*]|\\[,;:!\]) ]|\\q?quad|[^.=\n]{0,40}?(?:\b(?:and|or)\b)[\s}]*)*"
    rf"{_OPENS}(?:[a-zA-Z]\w*\s*=\s*)?{_OPENS}",
    re.IGNORECASE,
)
_BEHIND = re.compile(r"_(?:\w|\{(?:[^{}]|\{[^{}]*\})*\})|\\%")  # `\boxed{52}_8`
_TAGGED = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
_HASHES = re.compile(r"^\s*####[ \t]*(\S.*?)\s*$", re.MULTILINE)
_STATED = re.compile(
    r"(?:\banswer|\b(?:correct|right|best) (?:option|choice|answer)|^[ \t]*(?:the[ \t]+)?result)\b"
    r"(?:[ \t]+is\b|[ \t]*[:=])[\s:*]*(?=([^\s:*][^\n]*))",
    re.IGNORECASE | re.MULTILINE,
)
_REASON = re.compile(
    r",?\s+(?:because|since)\b.*"
    r"|,\s+(?:not|which|so|as|where|meaning|making|giving|i\.e|that is|or equivalently)\b.*"
    r"|(?<=[\d})$%*])\.\s.*"
)
NUMBER = re.compile(
    rf"(?<![\w.^])[-+]?(?>\d+ \d+/\d+|(?:{DECIMAL})(?:[eE][-+]?\d+)?(?:/\d+)?)"
    r"(?=(?:[ckm]?m[²³]|[ckm]m|[km]g|ml|lb|ft|mph)(?!\w)|(?![\w/]))"
    rf"(?:\s(?:{'|'.join(SCALES)})\b)?"
)
_TIME = re.compile(r"(?<![\w:])\d{1,2}:\d\d(?:\s*[ap]\.?m\b\.?)?", re.IGNORECASE)
_MATHEMATICS = re.compile(
    r"\$\$(.+?)\$\$|(?<![\\$])\$((?:\\\$|[^$\n])+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
_SIMPLE_FRACTION = re.compile(r"(?<![\w}])\\frac\{(\\?[\w.]+)\}\{(\\?[\w.]+)\}(?!\s*[\w\\{^])")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_NAMED = re.compile(r"([a-zA-Z\\|(][^=<>+*^/-]*?)\s*(?:=|\\in(?![a-z]))\s*([^=<>]+)")
_SEPARATOR = re.compile(r"\s*(?:,|;|\\text\{,?\s*(?:and|or),?\}|\b(?:and|or)\b)\s*")
_PLUS_MINUS = re.compile(r"\\pm\s*([\w\\{}. ]+)\Z")
_SIDES = {"(": ")", "[": "]", "\\{": "\\}"}
Leaf = Callable[[str, str], bool]


def final_answer(text: str) -> str | None:
    """The final answer that a text states, by the rule above; None where it states none."""
    found = boxed(text)
    if found is not None:
        return found
    if tagged := _TAGGED.findall(text):
        return tagged[-1]
    if hashes := _HASHES.findall(text):
        return hashes[-1]
    stated = _STATED.findall(text)
    return _REASON.sub("", stated[-1]).strip().rstrip(".").strip(" \t*") if stated else None


def boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}` whose braces close, or None.

    Of `\\boxed{1} and \\boxed{2}` it is `1, 2`.
    """
    found: list[str] = []
    after, ends = None, closings(text)
    for opening in reversed(list(_BOXED.finditer(text))):
        end = ends.get(opening.end() - 1)
        if end is None or (after is not None and end >= after):
            continue
        if after is not None and not _BETWEEN.fullmatch(text, end + 1, after):
            break
        behind = _BEHIND.match(text, end + 1)
        content = text[opening.end() : end].strip() + (behind[0] if behind else "")
        if not any(same_answer(content, other) for other in found):
            found.insert(0, content)
        after = opening.start()
    return ", ".join(found) if after is not None else None


def last_expression(text: str) -> str | None:
    """The number or the piece of mathematics that a text without a stated answer ends with."""
    found = [*_MATHEMATICS.finditer(text)]
    last = found[-1] if found else None
    rest = last.end() if last else 0
    if times := _TIME.findall(text, rest):
        return times[-1]
    if numbers := NUMBER.findall(text, rest):
        return numbers[-1]
    return next(part for part in last.groups() if part is not None).strip() if last else None


def same_answer(given: str, expected: str, leaf: Leaf | None = None) -> bool:
    """Whether two final answers are the same number, text, or list of these, up to spelling.

    leaf: decides on what is neither a number nor spelled alike; without it that differs.
    """
    a, b = undressed(given), undressed(expected)
    by_value = _same_value(a, b)
    if by_value or (by_value is not None and "and" not in a + b):  # "2 and 2/3" may be two
        return by_value
    if _text(a) == _text(b):
        return True
    if (shorter := _without_name(a, b)) is not None:
        return same_answer(*shorter, leaf)
    several = _same_list(a, b, leaf)
    if several is not None:
        return several
    return leaf(a, b) if leaf else False


def _without_name(a: str, b: str) -> tuple[str, str] | None:
    """What is equal to `x` where only one side, or both, name the same `x`: `x = 5` and `5`."""
    found = [_NAMED.fullmatch(text) for text in (a, b)]
    names = {one[1] for one in found if one}
    rests = [one[2].strip() if one else text for one, text in zip(found, (a, b), strict=True)]
    if any(re.search("[=<>]", text) for text in rests):
        return None
    alone = all(len(_parts(text)[1]) == 1 or _parts(text)[0] or quantity(text) for text in rests)
    return (rests[0], rests[1]) if len(names) == 1 and alone else None


def _same_value(a: str, b: str) -> bool | None:
    """Whether two numbers or two times of day are the same; None where they are not two such."""
    left, right = clock(a), clock(b)
    if left and right:
        return same_time(left, right)
    one, other = quantity(a), quantity(b)
    if one and other:
        return same_quantity(one, other)
    if (left or right) and not re.search("[:=]", b if left else a):
        ratio = quantity((a if left else b).replace(":", "/"))  # `1:12` may be one twelfth
        value = one or other
        return bool(ratio and value and same_quantity(ratio, value))
    return None


def _same_list(a: str, b: str, leaf: Leaf | None) -> bool | None:
    """Whether two lists are the same, in order where brackets say so; None where neither is one."""
    a, b = (
        _PLUS_MINUS.sub(r"\1, -\1", text) if text.startswith(r"\pm") else text for text in (a, b)
    )
    (open_a, parts_a, close_a), (open_b, parts_b, close_b) = _parts(a), _parts(b)
    if not all(parts_a + parts_b) or any(re.search(r"\\pm|\\mp|matrix|cases", t) for t in (a, b)):
        return None
    if len(parts_a) == len(parts_b) == 1:
        return same_answer(parts_a[0], parts_b[0], leaf) if open_a or open_b else None
    ordered = {open_a, open_b} & {"(", "["}
    both = open_a and open_b
    if {open_a, open_b} == {"(", "\\{"} or (both and (open_a, close_a) != (open_b, close_b)):
        return False
    single = min(len(parts_a), len(parts_b)) == 1
    if ordered and single:
        return False if quantity(a) or quantity(b) else None
    if ordered:
        pairs = zip(parts_a, parts_b, strict=False)
        return len(parts_a) == len(parts_b) and all(same_answer(x, y, leaf) for x, y in pairs)
    if max(len(parts_a), len(parts_b)) > 30:
        return None
    equal = [[same_answer(x, y, leaf) for y in parts_b] for x in parts_a]
    same = all(map(any, equal)) and all(map(any, zip(*equal, strict=True)))
    return None if single and not same and not (quantity(a) or quantity(b)) else same


def _parts(text: str) -> tuple[str, list[str], str]:
    """The outer bracket, what its commas, `and` and `or` part, and the bracket that closes."""
    opening = next((side for side in _SIDES if text.startswith(side)), "")
    body, end = text, ""
    if opening:
        end = text[-2:] if text.endswith("\\}") else text[-1:]
        body = text[len(opening) : -len(end)]
        if end not in (")", "]", "\\}") or _depths(body) is None:
            opening, body, end = "", text, ""
    depths = _depths(body)
    if depths is None:
        return "", [text], ""
    cuts = [found.span() for found in _SEPARATOR.finditer(body) if not depths[found.start()]]
    places = [0, *(place for cut in cuts for place in cut), len(body)]
    parts = [body[i:j].strip() for i, j in zip(places[::2], places[1::2], strict=True)]
    parts = [part for i, part in enumerate(parts) if part or not 0 < i < len(parts)]
    return (opening, parts, end) if len(parts) > 1 or opening == "\\{" else ("", [text], "")


def _depths(text: str) -> list[int] | None:
    """At each character, how many brackets are open; None where one closes that none opened."""
    depth, depths = 0, []
    for char in text:
        depth -= char in ")]}"
        if depth < 0:
            return None
        depths.append(depth)
        depth += char in "([{"
    return None if depth else depths


def normalized(answer: str) -> str:
    """One spelling of a final answer: the exact value of a number, else a text.

    A number loses its unit, a text its spaces, case, `\\text{}` and LaTeX spacing.
    """
    plain = undressed(answer)
    value = quantity(plain)
    return str(value) if value is not None and not clock(plain) else _text(plain)


def _text(plain: str) -> str:
    text = _SIMPLE_FRACTION.sub(r"\1/\2", _TEXT.sub(r"\1", plain))
    return "".join(text.split()).lower().rstrip(".")


def number(answer: str) -> Fraction | None:
    """The exact value of a final answer that is one number, perhaps with a unit; else None."""
    if len(answer) > LONGEST:
        return None
    found = quantity(answer)
    return None if found is None or found.base else found.value


def plain_text(text: str) -> str:
    """The text without fonts, colours and `\\text{}` around its words."""
    return _TEXT.sub(r"\1", undressed(text))
