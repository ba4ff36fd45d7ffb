"""Budgets as people write them: `30 ms`, `60 GiB`, `49B`, `1.5x`, `1x H100, 32k context`.

An amount is a number, alone or with a unit of what the constraint bounds, or a share of the
parent (`0.7x`). What must fit is a number of devices and what they hold: a context length and how
many sequences of it, or the cached tokens altogether; what is not said comes from the scenario.
In a number of tokens k is 1,024, as in the names of context lengths. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from tessera.devices import Device, DeviceError, find_device
from tessera.puzzle.cost_table import Scenario
from tessera.runs.recipe import nearest

UTILISATION = 0.9  # share of a device's memory that serving engines fill; vLLM's default

UNITS: dict[str, dict[str, float]] = {
    "count": {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12},
    "bytes": {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
              "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
    "time": {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0},
    "rate": {"tokens/s": 1.0},
}  # fmt: skip
EXAMPLES = {"count": "49B", "bytes": "60 GiB", "time": "30 ms", "rate": "500 tokens/s"}
_AMOUNT = re.compile(r"(\d[\d,]*\.?\d*(?:[eE][+-]?\d+)?|\.\d+)\s*(.*)")
_DEVICES = re.compile(r"(?:(\d+)\s*[x×]\s*)?([A-Za-z].*)")  # noqa: RUF001
_TOKENS = re.compile(r"(\d[\d,]*(?:\.\d+)?)\s*([kKM]?)\s+(.+)")
_HELD = {"context": "context", "sequence": "sequences", "sequences": "sequences",
         "cached tokens": "cached tokens"}  # fmt: skip
FITS_EXAMPLE = '"1x H100, 32k context, 16 sequences"'


class ConstraintError(ValueError):
    """A budget that cannot be understood; the text says which are."""


@dataclass(frozen=True)
class Amount:
    """A number in a unit. `unit` is as the user wrote it: "", "x" (of the parent), "ms", "GiB"."""

    number: float
    unit: str
    factor: float

    @property
    def relative(self) -> bool:
        return self.unit == "x"

    @property
    def value(self) -> float:
        """In seconds, bytes, tokens a second or units; a share stays a share."""
        return self.number * self.factor

    def told(self, number: float) -> str:
        """Another number in this unit, as a recipe would have it: `"34 ms"`, `12,400`."""
        if not self.unit:
            return f"{number:,.6g}"
        closed = self.unit == "x" or (self.unit in UNITS["count"] and self.factor > 1)  # B: bytes
        return f'"{number:,.6g}{"" if closed else " "}{self.unit}"'


def read_amount(name: str, given: float | str, dimension: str) -> Amount:
    """What `name = given` says. dimension: a key of UNITS. Raises ConstraintError."""
    text = str(given).strip()
    match = _AMOUNT.fullmatch(text)
    number = float(match[1].replace(",", "")) if match else -1.0
    if not match or not 0 < number < float("inf"):
        raise ConstraintError(
            f'{name} = {given!r}: give a positive number, an amount such as "'
            f'{EXAMPLES[dimension]}", or a share of the parent such as "'
            f'{"1.5x" if dimension == "rate" else "0.8x"}"'
        )
    unit = match[2].strip()
    if unit in ("", "x"):
        return Amount(number, unit, 1.0)
    return Amount(number, *_unit(name, given, unit, UNITS[dimension]))


def _unit(name: str, given: float | str, unit: str, known: Mapping[str, float]) -> tuple:
    """(the unit as we write it, its factor); upper and lower case are one where that is clear."""
    alike = [word for word in known if word.lower() == unit.lower()]
    word = unit if unit in known else alike[0] if len(alike) == 1 else None
    if word is None:
        raise ConstraintError(
            f"{name} = {given!r}: {unit!r} is no unit of {name}; {nearest(unit, [*known, 'x'])} "
            "(x: of the parent's)"
        )
    return word, known[word]


def in_bytes(value: float) -> str:
    """`60.1 GiB`: the largest unit of which there is one."""
    units = [(unit, UNITS["bytes"][unit]) for unit in ("TiB", "GiB", "MiB", "KiB")]
    unit, factor = next(((u, f) for u, f in units if value >= f), ("B", 1.0))
    return f"{value / factor:.3g} {unit}"


@dataclass(frozen=True)
class Fits:
    """Devices, and what they must hold beside the weights; None: as the scenario has it."""

    count: int
    device: Device
    context: int | None = None
    sequences: int | None = None
    cached: int | None = None

    @property
    def memory(self) -> float:
        """Bytes that weights and KV cache may take."""
        return self.count * self.device.memory * UTILISATION

    @property
    def whole(self) -> bool:
        """Whether it says by itself how many tokens are cached."""
        return self.cached is not None or None not in (self.context, self.sequences)

    def tokens(self, scenario: Scenario) -> int:
        """Tokens in the KV cache."""
        if self.cached is not None:
            return self.cached
        context = self.context or scenario.prompt + scenario.new
        return context * (self.sequences or scenario.batch)

    def __str__(self) -> str:
        said = {"context": self.context, "sequences": self.sequences, "cached tokens": self.cached}
        parts = [f"{number} {what}" for what, number in said.items() if number is not None]
        return ", ".join([f"{self.count}x {self.device.name}", *parts])


def read_fits(given: float | str) -> Fits:
    """What `fits = given` says, such as "1x H100, 32k context, 16 sequences".

    Raises ConstraintError.
    """
    count, device, held = 0, None, {}
    parts = [part.strip() for part in re.split(r",(?!\d{3}\b)", str(given))]
    for part in parts:
        if match := _DEVICES.fullmatch(part):
            if device is not None:
                raise _not_understood(given, f"{part!r} is a second kind of device; name one")
            count, device = int(match[1] or 1), _device(given, match[2])
        else:
            what, number = _held(given, part)
            if what in held:
                raise _not_understood(given, f"{what} is said twice")
            held[what] = number
    if device is None or count < 1:
        raise _not_understood(given, "it names no device")
    if "cached tokens" in held and len(held) > 1:
        raise _not_understood(
            given, "cached tokens are context times sequences already; give one or the other"
        )
    return Fits(
        count, device, held.get("context"), held.get("sequences"), held.get("cached tokens")
    )


def _device(given: float | str, name: str) -> Device:
    try:
        return find_device(name)
    except DeviceError as error:
        raise _not_understood(given, str(error)) from None


def _held(given: float | str, part: str) -> tuple[str, int]:
    """("context" | "sequences" | "cached tokens", how many)."""
    match = _TOKENS.fullmatch(part)
    what = " ".join(match[3].split()) if match else part
    if not match or what not in _HELD:
        words = ["context", "sequences", "cached tokens"]
        raise _not_understood(
            given, f"{part!r} is neither a device nor a load; {nearest(what, words)}"
        )
    factor = {"": 1, "k": 2**10, "M": 2**20}[match[2].replace("K", "k")]
    number = round(float(match[1].replace(",", "")) * factor)
    if number < 1:
        raise _not_understood(given, f"{part!r} is no load; give a number above 0")
    return _HELD[what], number


def _not_understood(given: float | str, why: str) -> ConstraintError:
    return ConstraintError(f"fits = {given!r}: {why}. For example {FITS_EXAMPLE}")
