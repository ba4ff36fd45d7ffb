"""A final answer that is one number: its exact value, its unit, its base, as people write them.

Decimals, `1,234`, `1/2`, `\\frac12`, `2 2/3`, `0.\\overline{3}`, `1e6`, `2 \\times 10^5`, `2^{10}`,
`52_8`, `12:30 pm`; before or behind them a currency, a unit, a percent or degree sign.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from tessera.rl.verifiers.latex import undressed

LONGEST = 400  # characters of a number, and digits of its value
PLACES = 6  # decimals, and digits, that make a rounded number the exact one

_DIGITS = (  # 1.234.567, 1,234, 1 234, 1'234, 1234
    r"(?:\d{1,3}(?:\.\d{3}){2,}(?!\d)|\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+(?!\d|[ ,]?\d)"
    r"|\d{1,3}(?:'\d{3})+|\d+)"
)
DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)"
_DECIMAL = re.compile(rf"({DECIMAL})\.?(?:[eE]([-+]?\d+))?")
_DECIMAL_COMMA = re.compile(r"^(0|\d{4,}),(\d+)$")  # `1,22` may be two numbers
_REPEATING = re.compile(
    r"(\d*)\.(\d*?)(?:\\(?:overline|bar)\{(\d+)\}|\((\d+)\)|\\dot\{?(\d)\}?(?:(\d*)\\dot\{?(\d)\}?)?"
    r"|(\d+)(?:\\[cl]?dots|\.\.\.))"
)
_TEN = re.compile(r"(.*?\S)\s*(?:\\times|\\cdot|\*|x(?= ?10))\s*(10(?:\^|\*\*).+)", re.DOTALL)
_POWER = re.compile(r"(\d+)\s*(?:\^|\*\*)\s*(?:\{\s*([-+]?\d+)\s*\}|\(([-+]?\d+)\)|([-+]?\d+))")
_ARGUMENT = r"\{((?:[^{}]|\{[^{}]*\}|\{[^{}]*\{[^{}]*\}[^{}]*\})*)\}"
_FRACTION = re.compile(rf"\\frac{_ARGUMENT}{_ARGUMENT}")
_SLASHED = re.compile(r"([^/]+)/([^/]+)")
_MIXED = re.compile(
    r"(\d+)\s*(?:(?:and\s|\\text\{and\})\s*)?(?:(\\frac\{\d+\}\{\d+\})|(?<=[\s}])(\d+\s*/\s*\d+))"
)
_BASED = re.compile(
    r"\(?\s*([-+]?[0-9A-Fa-f][0-9A-Fa-f,.]*)\s*\)?(?:"
    r"\s*_\s*\{?\s*\(?\s*(?:\\text\{)?(?:base)?\}?[- ]?(?:\\text\{)?([0-9A-Za-z]+)\}?\s*\)?\s*\}?"
    r"|,?\s*\(?\s*(?:\\text\{)?\(?\s*(?:in )?base[- ]?\}?\s*(?:\\text\{)?([0-9A-Za-z]+)\)?\}?\)?)"
)
_TIME = re.compile(
    r"(\d{1,2})(?:\s?:\s?([0-5]\d))?(?::([0-5]\d))?\s*(?:\\text\{)?\s*"
    r"(?:([ap])\.?\s?m\.?|(noon|midday|midnight))?\s*\}?",
    re.IGNORECASE,
)
_APPROXIMATE = re.compile(r"\A(?:\\approx|\\sim|\\simeq|about|approximately|roughly|exactly)\s*")
_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_NAMES = {name: str(number) for number, name in enumerate(_WORDS)} | {
    "sixteen": "16",
    "binary": "2",
    "octal": "8",
    "decimal": "10",
    "hexadecimal": "16",
    "hex": "16",
}
_CURRENCIES = {
    **{r"\$": "dollar", "US\\$": "dollar", "USD": "dollar", "dollar": "dollar"},
    **{"€": "euro", r"\euro": "euro", r"\texteuro": "euro", "EUR": "euro", "euro": "euro"},
    **{"£": "sterling", r"\pounds": "sterling", "GBP": "sterling"},
    **{"₹": "rupee", "INR": "rupee", "Rs.": "rupee", "Rs": "rupee", "rupee": "rupee"},
    **dict.fromkeys(("¥", "JPY", "CNY", "RMB", "₩", "₽", r"\yen", "CHF", "kr", "zł"), ""),
    **dict.fromkeys("AUD CAD HKD SGD NZD SEK NOK DKK KRW RUB BRL MXN ZAR PLN TRY".split(), ""),
    **dict.fromkeys((*"₺₴฿₫₱₦₪", *(rf"{land}\$" for land in ("A", "C", "R", "S", "HK", "NZ"))), ""),
}
_SIGN = "|".join(re.escape(sign) for sign in sorted(_CURRENCIES, key=len, reverse=True))
_BEFORE = re.compile(rf"([-+]?)\s*(?:\\text\{{)?({_SIGN})\}}?\s*(?=[-+]?[\d.\\{{])")
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "dozen": 12}
SCALES |= {"trillion": 10**12}

# What a unit measures, and its size: 1 m is 100 cm, and 460 g are not 460 kg.
_MEASURES = {
    "length": "mm millimet 1/1000, cm centimet 1/100, dm decimet 1/10, m met 1, km kilomet 1000,"
    " in inch 127/5000, ft foot 381/1250, ft feet 381/1250, yd yard 1143/1250,"
    " mi mile 201168/125",
    "mass": "mg milligram 1/1000000, g gram 1/1000, kg kilogram 1, t tonne 1000,"
    " lb lb 45359237/100000000, oz ounce 45359237/1600000000",
    "time": "ms millisecond 1/1000, s second 1, sec sec 1, min minute 60, h hour 3600,"
    " hr hr 3600, day day 86400, week week 604800, year year 31556952, month month 2629746",
    "volume": "ml millilit 1/1000, mL millilit 1/1000, cl centilit 1/100, l lit 1, L lit 1",
    "dollars": r"\$ dollar 1, ¢ cent 1/100",
    "angle": "° degree 1",
    "celsius": "°C celsius 1",
    "fahrenheit": "°F fahrenheit 1",
}


def _sizes() -> dict[str, tuple[str, Fraction]]:
    sizes = {}
    for measured, units in _MEASURES.items():
        for short, long, size in map(str.split, units.split(",")):
            ends = ("er", "ers", "re", "res") if long.endswith(("met", "lit")) else ("", "s", "es")
            names = [short, *(long + end for end in ends)]
            sizes |= dict.fromkeys(names, (measured, Fraction(size)))
    for sign, name in _CURRENCIES.items():
        if name:
            other = (name, Fraction(1))
            sizes |= dict.fromkeys((sign, sign + "s"), sizes.get(name, other))
    return sizes


_SIZES = _sizes()
_JOINS = rf"\b(?:and|or|if|for|where|when|not|mod|base|to|{'|'.join(SCALES)})\b|\d"
_NO_UNIT = re.compile(
    rf"{_JOINS}|\b(?:plus|minus|times|over|by|of|in|is|are|was|pi|sqrt|sin|cos|tan|log|squared|cubed"
    r"|root|factorial|choose|half|halves|thirds?|quarters?|fourths?|fifths?|tenths?|than|but|from"
    r"|with|all|at|the|an?|it|we|as|so|no|yes|because|since|which|that|this|more|less|remainder)\b",
    re.IGNORECASE,
)
_NO_TEXT_UNIT = re.compile(_JOINS, re.IGNORECASE)
_POWERED = r"(?:\s?\^\s?(?:\{-?\d\}|-?\d))?"
_TEXT_UNIT = re.compile(
    rf"\s*(?:\^\\circ\s*)?(?:\\frac\{{\\text\{{([^{{}}]*)\}}{_POWERED}\}}\{{\\text\{{([^{{}}]*)\}}{_POWERED}\}}"
    rf"|((?:\s*(?:/|\\cdot)?\s*\\text\{{[^{{}}]*\}}{_POWERED})+))\Z"
)
_WORD_UNITS = [  # of many words before few: `square feet`, but of `2 million dollars` the last
    re.compile(
        rf"(?P<gap>\s*)(?<![A-Za-z])(?P<words>[A-Za-z]{{2,}}\.?{_POWERED}"
        rf"(?:[ /-]+[A-Za-z]+\.?{_POWERED}){{{count}}})\Z"
    )
    for count in (3, 2, 1, 0)
]
_LETTER_UNIT = re.compile(rf"\s([mgshLlt]{_POWERED}(?:/[a-z]{{1,3}}{_POWERED})?)\Z")
_SIGN_BEHIND = re.compile(rf"\s*(%|\^\\circ\s*(?:\\text\{{)?[CFK]?\}}?|¢|{_SIGN})\Z")
_SCALE = re.compile(rf"(?:\s+|\s*\\text\{{\s*)({'|'.join(SCALES)})\}}?\Z", re.IGNORECASE)
_OTHER_UNITS = (
    "sq cu mph kmh kph rpm psi kW kWh GB MB kB Hz kHz MHz GHz dB kJ kN kPa mol deg".split()
)
_SQUARE = re.compile(r"(sq(?:uare)?|cu(?:bic)?)\.? (.+)|(.+?)\^\{?(\d)\}?")


@dataclass(frozen=True)
class Quantity:
    """value: of the number alone, percent signs and units aside. unit: as written, if any.

    places: decimals it was rounded to; None where it is exact. digits, base: as written in a base.
    """

    value: Fraction
    places: int | None = None
    percent: bool = False
    unit: str = ""
    base: str = ""
    digits: str = ""

    def __str__(self) -> str:
        return f"{self.digits}_{self.base}" if self.base else str(self.value)


def quantity(text: str) -> Quantity | None:
    """What a text says where it is one number, perhaps with a unit; else None."""
    if text.isascii() and text.isdigit() and len(text) <= LONGEST:  # most answers
        return Quantity(Fraction(int(text)))
    if len(text) > LONGEST:
        return None
    text = _APPROXIMATE.sub("", undressed(text), count=1)
    if (found := _BASED.fullmatch(text)) and (read := _based(*found.groups())):
        return read
    if (word := re.sub(r"\\text\{([a-zA-Z]+)\}", r"\1", text).lower()) in _WORDS:
        return Quantity(Fraction(_NAMES[word]))
    if currency := _BEFORE.match(text):
        text = currency[1] + text[currency.end() :]
    text, unit, percent, scale = _stripped(text)
    read = _value(text)
    if read is None:
        return None
    value, places = read
    return Quantity(value * scale, places, percent, unit or (currency[2] if currency else ""))


def same_quantity(a: Quantity, b: Quantity) -> bool:
    """Whether two numbers are one: exactly, or rounded to six decimals and six digits.

    Signs of percent count as 1/100 or as nothing where only one side has one. Units that are known
    must agree in what they measure; their sizes count.
    """
    if a.base or b.base:
        return (a.base, a.digits) == (b.base, b.digits)
    one, other = _measure(a.unit), _measure(b.unit)
    if one and other and one != other:
        return one[0] == other[0] and a.value * one[1] == b.value * other[1]
    return _close(a, b) or (a.percent != b.percent and _close(_of_hundred(a), _of_hundred(b)))


def clock(text: str) -> tuple[int, bool] | None:
    """A time of day: its second, and whether the half of the day is known; None for other texts."""
    found = _TIME.fullmatch(text)
    if not found or not (found[2] or found[4] or found[5]) or int(found[1]) > 24:
        return None
    hour, minutes, seconds = (int(part or 0) for part in found.groups()[:3])
    half = found[4] or {"midnight": "a"}.get((found[5] or "").lower(), "p" if found[5] else "")
    if half:
        hour = hour % 12 + 12 * (half.lower() == "p")
    return (hour % 24 * 60 + minutes) * 60 + seconds, bool(half) or hour > 12 or not hour


def same_time(a: tuple[int, bool], b: tuple[int, bool]) -> bool:
    """Whether two times are one; where a half of the day is not said, it may be either."""
    return (a[0] - b[0]) % (12 * 3600) == 0 and (a[0] == b[0] or not (a[1] and b[1]))


def _of_hundred(a: Quantity) -> Quantity:
    places = None if a.places is None else a.places + 2
    return replace(a, value=a.value / 100, places=places) if a.percent else a


def _close(a: Quantity, b: Quantity) -> bool:
    """Whether the numbers are equal, or one is the other cut or rounded to its decimals."""
    if a.value == b.value:
        return True
    rounded, other = (a, b) if b.places is None or (a.places or 99) <= b.places else (b, a)
    places = rounded.places or 0
    if places < PLACES or abs(rounded.value) < Fraction(1, 10 ** (places + 1 - PLACES)):
        return False
    exact = other.value * 10**places
    return rounded.value * 10**places in (round(exact), int(exact))


def _measure(unit: str) -> tuple[str, Fraction] | None:
    """What a unit measures, and its size; None where it is not known."""
    name = re.sub(r"\^\\circ\s*", "°", re.sub(r"\\text\{([^{}]*)\}", r"\1", unit)).strip(" .")
    if name in _SIZES or name.lower() in _SIZES:
        return _SIZES.get(name) or _SIZES[name.lower()]
    if not (found := _SQUARE.fullmatch(name)):
        return None
    inner = _measure(found[2] or found[3])
    power = int(found[4] or {"s": 2, "c": 3}[found[1][0]])
    return (f"{inner[0]}^{power}", inner[1] ** power) if inner else None


def without_unit(text: str) -> tuple[str, str]:
    """An undressed text before the unit that stands in `\\text{}` or is a degree sign; the unit."""
    found = _TEXT_UNIT.search(text) or re.search(r"\s*\^\\circ\s*\Z", text)
    if found and found.start() and not _NO_TEXT_UNIT.search(_words(found[0])):
        return text[: found.start()].rstrip(" -"), found[0].strip()
    return text, ""


def _words(unit: str) -> str:
    return re.sub(r"\\(?:text|frac|cdot|circ)|\^\{?-?\d\}?", " ", unit)


def _stripped(text: str) -> tuple[str, str, bool, int]:
    """The text before its units, the first of them, whether `%` is one, and `million` and such."""
    unit, percent, scale, before = "", False, 1, None
    while text != before:
        before = text
        if text.endswith("%"):
            percent, text = True, text[:-1]
        elif found := _SCALE.search(text):
            scale, text = scale * SCALES[found[1].lower()], text[: found.start()]
        elif (shorter := without_unit(text))[1]:
            text, unit = shorter[0], unit or shorter[1]
        elif found := _SIGN_BEHIND.search(text) or _plain_unit(text) or _LETTER_UNIT.search(text):
            text, unit = text[: found.start()].rstrip(" -"), unit or found[0].strip()
        text = text.rstrip() or before
    return text, unit, percent, scale


def _plain_unit(text: str) -> re.Match[str] | None:
    """A unit in plain letters: `5 apples`, `12cm`; not the letters of a product, `3 xy`."""
    matches = (one for unit in _WORD_UNITS if (one := unit.search(text)))
    found = next((one for one in matches if not _NO_UNIT.search(_words(one["words"]))), None)
    if not found:
        return None
    word = re.match("[A-Za-z]+", found["words"])
    first = word[0] if word else ""
    known = first in _SIZES or first.lower() in _SIZES or first in _OTHER_UNITS
    plain = len(first) > 3 or (len(first) == 3 and sorted(first) != list(first))
    return (
        found if known or (found["gap"] and plain and set(first.lower()) & set("aeiou")) else None
    )


def _based(digits: str, *bases: str | None) -> Quantity | None:
    """A number in a base; None where the letters and digits are none: `x_1`, `9_8`."""
    base = next(one for one in bases if one).lower()
    base = _NAMES.get(base, base)
    if base == "10":
        return quantity(digits)
    digits = re.sub(r"^(-?)0+(?=\w)", r"\1", digits.upper().replace(",", "").lstrip("+"))
    if base.isdigit():
        highest = max(digits, key=lambda char: (char.isalnum(), char))
        if not 2 <= int(base) <= 36 or int(highest, 36) >= int(base):
            return None
    if (
        not base.isdigit()
        and len(base) > 1
        or not any(map(str.isdigit, digits))
        and len(digits) < 2
    ):
        return None
    return Quantity(Fraction(0), base=base, digits=digits)


def _value(text: str) -> tuple[Fraction, int | None] | None:
    """The value of a number without unit, and the decimals it has; None where it is none."""
    text = text.strip()
    while (
        len(text) > 1 and text[0] + text[-1] in ("()", "{}") and not set("(){},") & set(text[1:-1])
    ):
        text = text[1:-1].strip()
    sign, text = (
        (-1, text[1:].lstrip()) if text[:1] == "-" else (1, text.removeprefix("+").lstrip())
    )
    if text[:1] in ("-", "+"):
        return None
    for reader in (_mixed, _fraction, _scientific, _repeating, _decimal, _power):
        read = reader(text)
        if read is not None:
            return sign * read[0], read[1]
    return None


def _mixed(text: str) -> tuple[Fraction, int | None] | None:
    found = _MIXED.fullmatch(text)
    part = _fraction(found[2] or found[3]) if found else None
    return (int(found[1]) + part[0], None) if found and part else None


def _fraction(text: str) -> tuple[Fraction, int | None] | None:
    found = _FRACTION.fullmatch(text) or _SLASHED.fullmatch(text)
    top, bottom = (_value(part) for part in found.groups()) if found else (None, None)
    return (top[0] / bottom[0], None) if top and bottom and bottom[0] else None


def _scientific(text: str) -> tuple[Fraction, int | None] | None:
    found = _TEN.fullmatch(text)
    factor, power = (_value(found[1]), _power(found[2])) if found else (None, None)
    return (factor[0] * power[0], None) if factor and power else None


def _repeating(text: str) -> tuple[Fraction, int | None] | None:
    found = _REPEATING.fullmatch(text)
    if not found:
        return None
    whole, fixed, line, brackets, first, middle, last, dotted = found.groups()
    if dotted:  # 0.333...: known to so many decimals
        if len(set(dotted[-3:])) > 1 or len(dotted) < 3:
            return Fraction(f"{whole or 0}.{fixed}{dotted}"), len(fixed + dotted)
        fixed, line = fixed + dotted[:-1], dotted[-1]
    cycle = line or brackets or f"{first}{middle or ''}{last or ''}"
    value = Fraction(int(cycle), 10 ** len(cycle) - 1) / 10 ** len(fixed)
    return Fraction(f"{whole or 0}.{fixed or 0}") + value, None


def _decimal(text: str) -> tuple[Fraction, int | None] | None:
    text = _DECIMAL_COMMA.sub(r"\1.\2", text)
    found = _DECIMAL.fullmatch(text)
    if not found or len(text) > LONGEST or abs(int(found[2] or 0)) > 308:
        return None
    plain = re.sub(r"[, ']" + (r"|\." if found[1].count(".") > 1 else ""), "", found[1])
    places = len(plain.partition(".")[2]) - int(found[2] or 0)
    return Fraction(f"{plain}e{found[2] or 0}"), max(0, places)


def _power(text: str) -> tuple[Fraction, int | None] | None:
    found = _POWER.fullmatch(text)
    if not found:
        return None
    base, exponent = int(found[1]), int(found[2] or found[3] or found[4])
    if abs(exponent) * len(found[1]) > LONGEST or (not base and exponent < 1):
        return None
    return Fraction(base) ** exponent, None
