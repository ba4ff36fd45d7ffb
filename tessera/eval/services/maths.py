"""Arithmetic: no state, numbers as floats, and a refusal where there is no finite result."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import Any

from tessera.eval.services.base import Refused, Service, offered

PRECISION = 50  # significant digits at most
SI = {"nm": 1e-9, "um": 1e-6, "mm": 1e-3, "cm": 1e-2, "m": 1.0, "km": 1e3}
# One of the first unit in the second; degrees have a zero of their own and stand below.
IMPERIAL = {
    ("miles", "km"): 1.60934,
    ("feet", "m"): 0.3048,
    ("yards", "m"): 0.9144,
    ("inches", "cm"): 2.54,
    ("pounds", "kg"): 0.453592,
    ("ounces", "g"): 28.3495,
    ("gallons", "liters"): 3.78541,
}


class Maths(Service):
    @offered
    def absolute_value(self, number: float) -> Any:
        return _result(abs(number))

    @offered
    def add(self, a: float, b: float) -> Any:
        return _result(a + b)

    @offered
    def subtract(self, a: float, b: float) -> Any:
        return _result(a - b)

    @offered
    def multiply(self, a: float, b: float) -> Any:
        return _result(a * b)

    @offered
    def divide(self, a: float, b: float) -> Any:
        if b == 0:
            raise Refused("the denominator is zero")
        return _result(a / b)

    @offered
    def percentage(self, part: float, whole: float) -> Any:
        if whole == 0:
            raise Refused("the whole is zero")
        return _result(part / whole * 100)

    @offered
    def power(self, base: float, exponent: float) -> Any:
        try:
            found = base**exponent
        except (OverflowError, ZeroDivisionError):
            raise Refused("the power is not finite") from None
        if isinstance(found, complex):
            raise Refused("the power is not real")
        return _result(found)

    @offered
    def square_root(self, number: float, precision: int) -> Any:
        if number < 0:
            raise Refused("a negative number has no real square root")
        with localcontext(prec=_digits(precision)):
            return _result(float(Decimal(number).sqrt()))

    @offered
    def logarithm(self, value: float, base: float, precision: int) -> Any:
        if value <= 0 or base <= 0 or base == 1:
            raise Refused("value and base must be positive, and the base not 1")
        digits = _digits(precision)
        return _result(float(f"{math.log(value) / math.log(base):.{digits}g}"))

    @offered
    def round_number(self, number: float, decimal_places: int = 0) -> Any:
        if abs(decimal_places) > PRECISION:
            raise Refused(f"decimal_places goes to {PRECISION}")
        return _result(round(number, decimal_places))

    @offered
    def max_value(self, numbers: list[float]) -> Any:
        return _result(max(_some(numbers)))

    @offered
    def min_value(self, numbers: list[float]) -> Any:
        return _result(min(_some(numbers)))

    @offered
    def sum_values(self, numbers: list[float]) -> Any:
        return _result(sum(_some(numbers)))

    @offered
    def mean(self, numbers: list[float]) -> Any:
        return _result(sum(_some(numbers)) / len(numbers))

    @offered
    def standard_deviation(self, numbers: list[float]) -> Any:
        """That of the numbers themselves, not of what they were drawn from."""
        middle = sum(_some(numbers)) / len(numbers)
        return _result(math.sqrt(sum((one - middle) ** 2 for one in numbers) / len(numbers)))

    @offered
    def si_unit_conversion(self, value: float, unit_in: str, unit_out: str) -> Any:
        for unit in (unit_in, unit_out):
            if unit not in SI:
                raise Refused(f"the unit {unit!r} is not known; {', '.join(SI)} are")
        return _result(value * SI[unit_in] / SI[unit_out])

    @offered
    def imperial_si_conversion(self, value: float, unit_in: str, unit_out: str) -> Any:
        pair = (unit_in.lower(), unit_out.lower())
        if pair == ("fahrenheit", "celsius"):
            return _result((value - 32) * 5 / 9)
        if pair == ("celsius", "fahrenheit"):
            return _result(value * 9 / 5 + 32)
        if pair in IMPERIAL:
            return _result(value * IMPERIAL[pair])
        if (pair[1], pair[0]) in IMPERIAL:
            return _result(value / IMPERIAL[pair[1], pair[0]])
        raise Refused(f"there is no conversion of {unit_in!r} to {unit_out!r}")


def _result(value: float) -> dict[str, float]:
    if not math.isfinite(value):
        raise Refused("the result is not finite")
    return {"result": value}


def _some(numbers: list[float]) -> list[float]:
    if not numbers:
        raise Refused("the list holds no numbers")
    return numbers


def _digits(precision: int) -> int:
    if not 1 <= precision <= PRECISION:
        raise Refused(f"precision goes from 1 to {PRECISION} digits")
    return precision
