"""Budgets as people write them: `30 ms`, `60 GiB`, `49B`, `1.5x`, `1x H100, 32k context`.

An amount is a number, alone or with a unit of what the constraint bounds, or a share of the
parent (`0.7x`). What must fit is a number of devices and what they hold: a context length and how
many sequences of it, or the cached tokens altogether; what is not said comes from the scenario.
In a number of tokens k is 1,024, as in the names of context lengths. Torch-free.

The ways of serving that a search may choose from: each scenario at one batch (Puzzle §2.6).

The batch is no variable of the integer program, because seconds and memory at another batch are
other numbers: each choice of batches is a case of its own, solved by itself, and the best is kept.

The parent is held to the same rule as the child: shares of it are taken at its own best batch,
the one with the most tokens a second among those where it meets the memory that was asked for in
units. A child with a smaller KV cache then gains twice, by its words and by a larger batch.

Budgets in the user's words made linear (Puzzle §2.6).

    throughput = "1.25x"     at least 1.25 times the parent's tokens a second
    latency = "0.8 s"        prefill and every decode step of the scenario
    bytes = "0.7x"           weights and KV cache at most 0.7 of the parent's
    fits = "1x H100, 32k context, 16 sequences"

`throughput` >= T becomes seconds <= batch·new / T; every other bound is a weighted sum of columns
over words, plus the base (embedding, head, sampling). A share of the parent's time is one bound
over all scenarios, Σ w·seconds/seconds(parent) / Σ w; every other bound holds in each of them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tessera.devices import Device, DeviceError, find_device
from tessera.puzzle.cost_table import Costs, CostTable, Scenario, Words
from tessera.table import nearest

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


@dataclass(frozen=True)
class Demand:
    """What serving may cost: budgets for every scenario, budgets of one, and their weights."""

    constraints: Mapping[str, Asked]
    own: Mapping[str, Mapping[str, Asked]]
    weights: Mapping[str, float]

    def at(self, scenario: str) -> dict[str, Asked]:
        """The budgets that hold in a scenario, by name."""
        return {**self.constraints, **self.own.get(scenario, {})}

    def check(self, costs: Costs) -> None:
        """Raise ConstraintError for a scenario that was not priced."""
        for name in {**self.own, **self.weights}:
            if name not in costs.scenarios:
                raise ConstraintError(
                    f"search.scenarios.{name}: the cost stage priced no such scenario; "
                    f"{nearest(name, costs.scenarios)}"
                )


@dataclass(frozen=True)
class Case:
    """Each scenario at one batch, and the bounds that hold there.

    reference: the parent's own tables, as in `constraints.Setting`.
    """

    tables: Mapping[str, CostTable]
    reference: Mapping[str, CostTable | None]
    weights: Mapping[str, float]
    limits: tuple[Limit, ...]

    def room(self) -> dict[str, float]:
        """Limit's key -> the most that the words may sum to."""
        return {one.key: one.most - one.base(self.tables) for one in self.limits}

    def costs(self, words: Mapping[str, str]) -> dict[str, float]:
        """Limit's key -> what the words of a place (kind -> word) cost."""
        return {
            one.key: sum(one.of(self.tables, *key) for key in words.items()) for one in self.limits
        }

    def totals(self, words: Words) -> dict[str, dict[str, float]]:
        """Scenario -> every column of an architecture."""
        return {name: table.total(words) for name, table in self.tables.items()}

    def excess(self, words: Words) -> float:
        """The largest total of an architecture as a share of its bound; at most 1 meets all."""
        totals = self.totals(words)
        return max(one.total(totals) / one.most for one in self.limits)

    def seconds_per_token(self, words: Words) -> float:
        """Weighted over scenarios; 0 where nothing was measured."""
        found = 0.0
        for name, total in self.totals(words).items():
            if "seconds" in total:
                found += self.weights[name] / total["throughput"]
        return found

    def scaled(self, budget: str, factor: float) -> Case:
        """With one budget of the recipe looser (factor above 1) or tighter."""
        changed = (o.scaled(factor) if o.budget == budget else o for o in self.limits)
        return replace(self, limits=tuple(changed))

    def towards(self, parent: Words, share: float) -> Case:
        """With bounds only `share` of the way from the parent's own cost here to what was asked."""
        totals = self.totals(parent)
        own = [one.total(totals) for one in self.limits]
        moved = (
            replace(one, most=spent + share * (one.most - spent))
            for one, spent in zip(self.limits, own, strict=True)
        )
        return replace(self, limits=tuple(moved))

    def __str__(self) -> str:
        """`batch 16`, or `batches chat 16, long 4`."""
        batches = {name: table.scenario.batch for name, table in self.tables.items()}
        if len(batches) == 1:
            return f"batch {next(iter(batches.values()))}"
        return "batches " + ", ".join(f"{name} {batch}" for name, batch in batches.items())


def cases(demand: Demand, costs: Costs, parent: Words) -> tuple[Case, ...]:
    """Every choice of batches, smallest first; one where the cost stage priced none.

    Scenarios are served apart, so each may have a batch of its own. Raises ConstraintError for
    budgets that this cost stage cannot answer.
    """
    demand.check(costs)
    weights = {name: demand.weights.get(name, 1.0) for name in costs.scenarios}
    reference = {name: _reference(name, demand, costs, parent) for name in costs.scenarios}
    batches = [
        [(name, batch) for batch in sorted(costs.batches) or [scenario.batch]]
        for name, scenario in costs.scenarios.items()
    ]
    found = []
    for choice in itertools.product(*batches):
        tables = {name: costs.tables[name, batch] for name, batch in choice}
        setting = Setting(tables, parent, reference, weights, costs.bytes_per_parameter)
        bounds = limits(demand.constraints, demand.own, setting)
        found.append(Case(tables, reference, weights, bounds))
    return tuple(found)


def _reference(name: str, demand: Demand, costs: Costs, parent: Words) -> CostTable | None:
    """The table at the parent's best batch in a scenario; None where it meets memory at none."""
    if not costs.batches:
        return costs.tables[name, costs.scenarios[name].batch]
    tables = [costs.tables[name, batch] for batch in costs.batches]
    fitting = [t for t in tables if _in_memory(t, demand.at(name), costs, parent)]

    def speed(table: CostTable) -> float:
        return table.total(parent).get("throughput", table.scenario.batch)

    return max(fitting, key=speed, default=None)


def _in_memory(table: CostTable, asked: Mapping[str, Asked], costs: Costs, parent: Words) -> bool:
    """Whether the parent meets the bytes that were asked for in units."""
    total = table.total(parent)
    if "fits" in asked:
        fits = read_fits(asked["fits"])
        cached = total["kv_bytes_per_token"] * fits.tokens(table.scenario)
        if total["parameters"] * costs.bytes_per_parameter + cached > fits.memory:
            return False
    if "bytes" in asked:
        amount = read_amount("bytes", asked["bytes"], "bytes")
        return amount.relative or total["bytes"] <= amount.value
    return True


Asked = float | str
Terms = Mapping[tuple[str, str], float]

# name -> (the linear column it bounds, the dimension of its units)
COLUMNS: dict[str, tuple[str, str]] = {
    "parameters": ("parameters", "count"),
    "bytes": ("bytes", "bytes"),
    "kv_bytes_per_token": ("kv_bytes_per_token", "bytes"),
    "time_to_first_token": ("prefill_seconds", "time"),
    "prefill_seconds": ("prefill_seconds", "time"),
    "inter_token_latency": ("decode_seconds", "time"),
    "decode_seconds": ("decode_seconds", "time"),
    "latency": ("seconds", "time"),
    "throughput": ("seconds", "rate"),
}
NAMES = (*COLUMNS, "fits")
COUNTED = ("parameters", "bytes", "kv_bytes_per_token", "fits")
_EVERYWHERE = ("parameters", "kv_bytes_per_token")  # the same in every scenario, at every batch
_UPPER = {"throughput"}  # more is better: what is bounded is the time


@dataclass(frozen=True)
class Limit:
    """One linear bound, Σ terms <= most over a whole architecture, the base included.

    It is told in the user's unit: total / unit, or unit / total where more is better.
    """

    name: str
    asked: Asked
    amount: Amount
    terms: Terms  # (scenario, column) -> weight
    most: float
    unit: float
    scenario: str = ""  # where it holds; "" for all of them together, or the only one
    budget: str = ""  # which words of the recipe it comes from

    @property
    def key(self) -> str:
        return f"{self.name} in {self.scenario}" if self.scenario else self.name

    @property
    def inverse(self) -> bool:
        return self.name in _UPPER

    def number(self, total: float) -> float:
        """A total in the user's unit."""
        return self.unit / max(total, 1e-30) if self.inverse else total / self.unit

    def of(self, tables: Mapping[str, CostTable], kind: str, word: str) -> float:
        """What a word costs under it."""
        return sum(w * tables[s].words[kind, word][c] for (s, c), w in self.terms.items())

    def base(self, tables: Mapping[str, CostTable]) -> float:
        """What there is beside the words."""
        return sum(w * tables[s].base[c] for (s, c), w in self.terms.items())

    def total(self, totals: Mapping[str, Mapping[str, float]]) -> float:
        """The same of a whole architecture, given its columns in each scenario."""
        return sum(w * totals[s][c] for (s, c), w in self.terms.items())

    def scaled(self, factor: float) -> Limit:
        """Looser (factor above 1) or tighter."""
        return replace(self, most=self.most * factor)


def check(constraints: Mapping[str, Asked]) -> None:
    """Raise ConstraintError for names and values that no cost table could make sense of."""
    if not constraints:
        raise ConstraintError(
            f"empty, so the parent itself is the answer; give at least one of {', '.join(NAMES)}, "
            'for example constraints = { throughput = "1.5x" }'
        )
    for name, value in constraints.items():
        if name not in NAMES:
            raise ConstraintError(f"{name!r} is no cost; {nearest(name, NAMES)}")
        if isinstance(value, bool) or not isinstance(value, float | int | str):
            raise ConstraintError(f"{name} = {value!r}: give a number, or words in quotes")
        read_fits(value) if name == "fits" else read_amount(name, value, COLUMNS[name][1])


@dataclass(frozen=True)
class Setting:
    """What makes budgets linear: the scenarios' tables, the parent and its own, the weights.

    reference: scenario -> the table at the batch where the parent is served best; None where it
    meets the memory asked for at no batch, so that a share of its time means nothing.
    """

    tables: Mapping[str, CostTable]
    parent: Words
    reference: Mapping[str, CostTable | None]
    weights: Mapping[str, float]
    bytes_per_parameter: float

    def own(self, scenario: str, column: str, name: str) -> float:
        """A column of the parent in a scenario. Raises ConstraintError where it fits nowhere."""
        table = self.reference[scenario]
        if table is None and column in _EVERYWHERE:
            table = self.tables[scenario]
        if table is None:
            here = self.tables[scenario]
            raise ConstraintError(
                f"{name} is asked as a share of the parent's, but the parent meets the memory "
                "asked for at none of the batches that the cost stage priced (at batch "
                f"{here.scenario.batch} it takes {in_bytes(here.total(self.parent)['bytes'])}); "
                f'give it in units ("{EXAMPLES[COLUMNS[name][1]]}"), allow more memory, or price '
                "smaller batches in cost.batches"
            )
        return table.total(self.parent)[column]


def limits(
    constraints: Mapping[str, Asked], own: Mapping[str, Mapping[str, Asked]], setting: Setting
) -> tuple[Limit, ...]:
    """Every bound that the words of a recipe mean.

    constraints: for all scenarios; own: scenario -> its own, which replace those of their name.
    Raises ConstraintError for seconds that were not measured, and shares of a parent that fits
    nowhere.
    """
    found: list[Limit] = []
    for name, asked in constraints.items():
        where = [s for s in setting.tables if name not in own.get(s, {})]
        found += [replace(one, budget=name) for one in _limits(name, asked, where, setting)]
    for scenario, words in own.items():
        for name, asked in words.items():
            (one,) = _limits(name, asked, [scenario], setting)
            found.append(replace(one, scenario=scenario, budget=f"{name} of {scenario}"))
    return tuple(found)


def _limits(name: str, asked: Asked, where: Sequence[str], setting: Setting) -> list[Limit]:
    if name not in COUNTED and not all(table.measured for table in setting.tables.values()):
        raise ConstraintError(
            f"the constraint {name} needs measured seconds, and the cost stage ran with "
            "measure = false; set cost.measure = true, or constrain parameters or bytes"
        )
    if name == "fits":
        fits = read_fits(asked)
        once, each = fits.whole, [_fitting(asked, fits, scenario, setting) for scenario in where]
    else:
        amount = read_amount(name, asked, COLUMNS[name][1])
        once = name in _EVERYWHERE
        if amount.relative and name not in COUNTED:
            return [_mixed(name, asked, amount, where, setting)] if where else []
        each = [_bound(name, asked, amount, scenario, setting) for scenario in where]
    told = len(setting.tables) > 1 and not once
    each = each[:1] if once else each
    return [replace(one, scenario=next(iter(one.terms))[0] if told else "") for one in each]


def _fitting(asked: Asked, fits: Fits, scenario: str, setting: Setting) -> Limit:
    """Weights and the KV cache of so many tokens within the devices' memory."""
    tokens = fits.tokens(setting.tables[scenario].scenario)
    terms = {
        (scenario, "parameters"): setting.bytes_per_parameter,
        (scenario, "kv_bytes_per_token"): float(tokens),
    }
    gib = Amount(fits.memory / 2**30, "GiB", 2**30)
    return Limit("fits", asked, gib, terms, fits.memory, gib.factor)


def _bound(name: str, asked: Asked, amount: Amount, scenario: str, setting: Setting) -> Limit:
    """A bound that holds in one scenario."""
    column = COLUMNS[name][0]
    if name in _UPPER:
        work = setting.tables[scenario].scenario
        unit = work.batch * work.new / amount.factor
    else:
        unit = setting.own(scenario, column, name) if amount.relative else amount.factor
    most = unit / amount.number if name in _UPPER else amount.number * unit
    return Limit(name, asked, amount, {(scenario, column): 1.0}, most, unit)


def _mixed(
    name: str, asked: Asked, amount: Amount, where: Sequence[str], setting: Setting
) -> Limit:
    """The weighted mean, over scenarios, of a time's share of the parent's.

    Where parent and child are served at different batches, throughput compares seconds a token.
    """
    column = COLUMNS[name][0]

    def parent(scenario: str) -> float:
        if name not in _UPPER:
            return setting.own(scenario, column, name)
        work = setting.tables[scenario].scenario
        return work.batch * work.new / setting.own(scenario, name, name)

    unit = parent(where[0])  # totals are told in the first scenario's own seconds
    mass = sum(setting.weights[s] for s in where)
    terms = {(s, column): setting.weights[s] / mass * (unit / parent(s)) for s in where}
    most = unit / amount.number if name in _UPPER else amount.number * unit
    return Limit(name, asked, amount, terms, most, unit)
