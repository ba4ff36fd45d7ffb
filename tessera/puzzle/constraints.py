"""Budgets as people write them, made linear for the integer program (Puzzle §2.6).

throughput = "1.25x"    at least 1.25 times the parent's tokens a second
latency = "0.8 s"       prefill and every decode step of the scenario
bytes = "0.7x"          weights and KV cache at most 0.7 of the parent's
fits = "1x H100, 32k context, 16 sequences"
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tessera.devices import Device, DeviceError, find_device
from tessera.puzzle.cost_table import Costs, CostTable, Scenario, Words
from tessera.table import nearest, size

Given = float | str  # the value of a budget in a recipe

UTILISATION = 0.9  # share of a device's memory that serving engines fill; vLLM's default
UNITS: dict[str, dict[str, float]] = {
    "count": {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12},
    "bytes": {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
              "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
    "time": {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0},
    "rate": {"tokens/s": 1.0},
}  # fmt: skip
EXAMPLES = {"count": "49B", "bytes": "60 GiB", "time": "30 ms", "rate": "500 tokens/s"}
# budget -> (the cost column it bounds, the dimension of its units)
COLUMNS = {
    "parameters": ("parameters", "count"),
    "bytes": ("bytes", "bytes"),
    "kv_bytes_per_token": ("kv_bytes_per_token", "bytes"),
    "time_to_first_token": ("prefill_seconds", "time"),
    "inter_token_latency": ("decode_seconds", "time"),
    "latency": ("seconds", "time"),
    "throughput": ("seconds", "rate"),
}
NAMES = (*COLUMNS, "fits")
COUNTED = ("parameters", "bytes", "kv_bytes_per_token", "fits")  # these need no seconds
_EVERYWHERE = ("parameters", "kv_bytes_per_token")  # the same in every scenario, at every batch
_AMOUNT = re.compile(r"(\d[\d,]*\.?\d*(?:[eE][+-]?\d+)?|\.\d+)\s*(.*)")
_DEVICES = re.compile(r"(?:(\d+)\s*[x×]\s*)?([A-Za-z].*)")  # noqa: RUF001
_TOKENS = re.compile(r"(\d[\d,]*(?:\.\d+)?)\s*([kKM]?)\s+(.+)")


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

    def text(self, number: float) -> str:
        """Another number in this unit, as a recipe would have it: `"34 ms"`, `12,400`."""
        if not self.unit:
            return f"{number:,.6g}"
        closed = self.unit == "x" or (self.unit in UNITS["count"] and self.factor > 1)  # B: bytes
        return f'"{number:,.6g}{"" if closed else " "}{self.unit}"'


def read_amount(name: str, given: Given, dimension: str) -> Amount:
    """The amount of a budget. dimension: a key of UNITS. Raises ConstraintError."""
    match = _AMOUNT.fullmatch(str(given).strip())
    number = float(match[1].replace(",", "")) if match else -1.0
    if not match or not 0 < number < float("inf"):
        raise ConstraintError(
            f'{name} = {given!r}: give a positive number, an amount such as "'
            f'{EXAMPLES[dimension]}", or a share of the parent such as "'
            f'{"1.5x" if dimension == "rate" else "0.8x"}"'
        )
    unit, known = match[2].strip(), UNITS[dimension]
    if unit in ("", "x"):
        return Amount(number, unit, 1.0)
    alike = [word for word in known if word.lower() == unit.lower()]  # "kb", unless "b" and "B"
    if unit not in known and len(alike) != 1:
        raise ConstraintError(
            f"{name} = {given!r}: {unit!r} is no unit of {name}; {nearest(unit, [*known, 'x'])} "
            "(x: of the parent's)"
        )
    word = unit if unit in known else alike[0]
    return Amount(number, word, known[word])


@dataclass(frozen=True)
class Fits:
    """Devices, and what they must hold beside the weights; None: as the scenario has it."""

    count: int
    device: Device
    context: int | None = None
    sequences: int | None = None
    cached: int | None = None  # tokens altogether, in place of context and sequences

    @property
    def memory(self) -> float:
        """Bytes that weights and KV cache may take."""
        return self.count * self.device.memory * UTILISATION

    @property
    def complete(self) -> bool:
        """Whether the number of cached tokens does not depend on the scenario."""
        return self.cached is not None or None not in (self.context, self.sequences)

    def tokens(self, scenario: Scenario) -> int:
        """Tokens in the KV cache."""
        if self.cached is not None:
            return self.cached
        context = self.context or scenario.prompt + scenario.new
        return context * (self.sequences or scenario.batch)


def read_fits(given: Given) -> Fits:
    """What `fits = given` asks for, such as "1x H100, 32k context, 16 sequences".

    In a number of tokens k is 1,024, as in the names of context lengths. Raises ConstraintError.
    """

    def error(why: str) -> ConstraintError:
        example = 'For example "1x H100, 32k context, 16 sequences"'
        return ConstraintError(f"fits = {given!r}: {why}. {example}")

    count, device, loads = 0, None, {}
    for part in (part.strip() for part in re.split(r",(?!\d{3}\b)", str(given))):
        if match := _DEVICES.fullmatch(part):
            if device is not None:
                raise error(f"{part!r} is a second kind of device; name one")
            try:
                count, device = int(match[1] or 1), find_device(match[2])
            except DeviceError as unknown:
                raise error(str(unknown)) from None
            continue
        match = _TOKENS.fullmatch(part)
        load = " ".join(match[3].split()) if match else part
        load = "sequences" if load == "sequence" else load
        known = ["context", "sequences", "cached tokens"]
        if not match or load not in known:
            raise error(f"{part!r} is neither a device nor a load; {nearest(load, known)}")
        factor = {"": 1, "k": 2**10, "M": 2**20}[match[2].replace("K", "k")]
        number = round(float(match[1].replace(",", "")) * factor)
        if number < 1:
            raise error(f"{part!r} is no load; give a number above 0")
        if load in loads:
            raise error(f"{load} is said twice")
        loads[load] = number
    if device is None or count < 1:
        raise error("it names no device")
    if "cached tokens" in loads and len(loads) > 1:
        raise error("cached tokens are context times sequences already; give one or the other")
    held = (loads.get(load) for load in ("context", "sequences", "cached tokens"))
    return Fits(count, device, *held)


def check_budgets(constraints: Mapping[str, Given]) -> None:
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
class Budgets:
    """The budgets of all scenarios, those of one, which replace them by name, and their weights."""

    constraints: Mapping[str, Given]
    own: Mapping[str, Mapping[str, Given]]
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Constraint:
    """A linear constraint, Σ coefficient·column <= bound over an architecture, base included.

    The total in the user's unit is total / unit, or unit / total of a throughput.
    """

    name: str
    given: Given
    amount: Amount
    coefficients: Mapping[tuple[str, str], float]  # (scenario, column) ->
    bound: float
    unit: float
    scenario: str = ""  # where it holds; "" for all of them together, or the only one
    budget: str = ""  # the budget of the recipe that it comes from: `latency`, `latency of chat`

    @property
    def key(self) -> str:
        return f"{self.name} in {self.scenario}" if self.scenario else self.name

    @property
    def inverse(self) -> bool:
        """Whether more of the budget is better."""
        return self.name == "throughput"

    def in_unit(self, total: float) -> float:
        """A total in the user's unit."""
        return self.unit / max(total, 1e-30) if self.inverse else total / self.unit

    def total(self, columns: Mapping[str, Mapping[str, float]]) -> float:
        """Its left side, given the columns of an architecture, a word or the base by scenario."""
        return sum(w * columns[s][c] for (s, c), w in self.coefficients.items())


@dataclass(frozen=True)
class BatchChoice:
    """Each scenario at one batch, and the constraints that hold there.

    The batch is no variable of the integer program, because seconds and memory at another batch
    are other numbers: every choice of batches is a program of its own, and the best is kept.
    reference: scenario -> the table at the batch where the parent is served best, which shares of
    the parent refer to; None where it meets the memory asked for at no batch.
    """

    tables: Mapping[str, CostTable]
    reference: Mapping[str, CostTable | None]
    weights: Mapping[str, float]
    parent: Words
    bytes_per_parameter: float
    constraints: tuple[Constraint, ...] = ()

    def bounds(self) -> dict[str, float]:
        """Constraint's key -> the most that the words alone may sum to."""
        base = {name: table.base for name, table in self.tables.items()}
        return {one.key: one.bound - one.total(base) for one in self.constraints}

    def costs(self, words: Mapping[str, str]) -> dict[str, float]:
        """Constraint's key -> what the words of a place (kind -> word) cost."""
        columns = [{s: t.words[key] for s, t in self.tables.items()} for key in words.items()]
        return {one.key: sum(map(one.total, columns)) for one in self.constraints}

    def totals(self, words: Words) -> dict[str, dict[str, float]]:
        """Scenario -> every column of an architecture."""
        return {name: table.total(words) for name, table in self.tables.items()}

    def excess(self, words: Words) -> float:
        """The largest total of an architecture as a share of its bound; at most 1 meets all."""
        totals = self.totals(words)
        return max(one.total(totals) / one.bound for one in self.constraints)

    def seconds_per_token(self, words: Words) -> float:
        """Weighted over scenarios; 0 where nothing was measured."""
        found = 0.0
        for name, total in self.totals(words).items():
            if "seconds" in total:
                found += self.weights[name] / total["throughput"]
        return found

    def scaled(self, budget: str, factor: float) -> BatchChoice:
        """With one budget of the recipe looser (factor above 1) or tighter."""
        changed = (
            replace(one, bound=one.bound * factor) if one.budget == budget else one
            for one in self.constraints
        )
        return replace(self, constraints=tuple(changed))

    def towards(self, share: float) -> BatchChoice:
        """With bounds only `share` of the way from the parent's own cost here to what was asked."""
        totals = self.totals(self.parent)
        own = [one.total(totals) for one in self.constraints]
        moved = (
            replace(one, bound=spent + share * (one.bound - spent))
            for one, spent in zip(self.constraints, own, strict=True)
        )
        return replace(self, constraints=tuple(moved))

    def __str__(self) -> str:
        """`batch 16`, or `batches chat 16, long 4`."""
        batches = {name: table.scenario.batch for name, table in self.tables.items()}
        if len(batches) == 1:
            return f"batch {next(iter(batches.values()))}"
        return "batches " + ", ".join(f"{name} {batch}" for name, batch in batches.items())

    def linear(self, budgets: Budgets) -> tuple[Constraint, ...]:
        """Every constraint that the budgets mean. A share of the parent's time is one constraint
        over all scenarios, Σ w·seconds/seconds(parent) / Σ w; every other holds in each of them.

        Raises ConstraintError for seconds that were not measured, and shares of a parent that fits
        nowhere.
        """
        found: list[Constraint] = []
        for name, given in budgets.constraints.items():
            where = [s for s in self.tables if name not in budgets.own.get(s, {})]
            found += [replace(one, budget=name) for one in self._linear(name, given, where)]
        for scenario, own in budgets.own.items():
            for name, given in own.items():
                (one,) = self._linear(name, given, [scenario])
                found.append(replace(one, scenario=scenario, budget=f"{name} of {scenario}"))
        return tuple(found)

    def _linear(self, name: str, given: Given, where: Sequence[str]) -> list[Constraint]:
        if name not in COUNTED and not all(table.measured for table in self.tables.values()):
            raise ConstraintError(
                f"the constraint {name} needs seconds, and the cost stage ran with source = "
                '"counted"; set cost.source = "measured", or constrain parameters or bytes'
            )
        if name == "fits":
            fits = read_fits(given)
            once, each = fits.complete, [self._memory(given, fits, s) for s in where]
        else:
            amount = read_amount(name, given, COLUMNS[name][1])
            if amount.relative and name not in COUNTED:
                return [self._bounded(name, given, amount, where)] if where else []
            once = name in _EVERYWHERE
            each = [self._bounded(name, given, amount, [s]) for s in where]
        if once or len(self.tables) == 1:
            return each[:1] if once else each
        return [replace(one, scenario=s) for one, s in zip(each, where, strict=True)]

    def _memory(self, given: Given, fits: Fits, scenario: str) -> Constraint:
        """Weights and the KV cache of so many tokens within the devices' memory."""
        coefficients = {
            (scenario, "parameters"): self.bytes_per_parameter,
            (scenario, "kv_bytes_per_token"): float(fits.tokens(self.tables[scenario].scenario)),
        }
        gib = Amount(fits.memory / 2**30, "GiB", 2**30)
        return Constraint("fits", given, gib, coefficients, fits.memory, gib.factor)

    def _bounded(self, name: str, given: Given, amount: Amount, where: Sequence[str]) -> Constraint:
        """A bound on the weighted mean over scenarios, in the unit of the first of them."""
        units = {s: self._unit(name, amount, s) for s in where}
        unit, mass = units[where[0]], sum(self.weights[s] for s in where)
        column = COLUMNS[name][0]
        weights = {(s, column): self.weights[s] / mass * (unit / units[s]) for s in where}
        bound = unit / amount.number if name == "throughput" else amount.number * unit
        return Constraint(name, given, amount, weights, bound, unit)

    def _unit(self, name: str, amount: Amount, scenario: str) -> float:
        """What an amount of 1 is in the bounded column; of a throughput, the seconds it leaves."""
        if name != "throughput":
            own = COLUMNS[name][0]
            return self._parents(own, name, scenario) if amount.relative else amount.factor
        rate = self._parents(name, name, scenario) if amount.relative else amount.factor
        work = self.tables[scenario].scenario
        return work.batch * work.new / rate

    def _parents(self, column: str, name: str, scenario: str) -> float:
        """A column of the parent in a scenario. Raises ConstraintError where it fits nowhere."""
        table, here = self.reference[scenario], self.tables[scenario]
        if table is None and column in _EVERYWHERE:
            table = here
        if table is None:
            raise ConstraintError(
                f"{name} is asked as a share of the parent's, but the parent meets the memory "
                "asked for at none of the batches that the cost stage priced (at batch "
                f"{here.scenario.batch} it takes {size(here.total(self.parent)['bytes'])}); "
                f'give it in units ("{EXAMPLES[COLUMNS[name][1]]}"), allow more memory, or price '
                "smaller batches in cost.batches"
            )
        return table.total(self.parent)[column]


def batch_choices(budgets: Budgets, costs: Costs, parent: Words) -> tuple[BatchChoice, ...]:
    """Every choice of batches, smallest first; one where the cost stage priced none.

    Scenarios are served apart, so each may have a batch of its own. Raises ConstraintError for
    budgets that these costs cannot answer.
    """
    for name in {**budgets.own, **budgets.weights}:
        if name not in costs.scenarios:
            raise ConstraintError(
                f"search.scenarios.{name}: the cost stage priced no such scenario; "
                f"{nearest(name, costs.scenarios)}"
            )
    weights = {name: budgets.weights.get(name, 1.0) for name in costs.scenarios}
    reference = {name: _best_of_parent(name, budgets, costs, parent) for name in costs.scenarios}
    batches = [
        [(name, batch) for batch in sorted(costs.batches) or [scenario.batch]]
        for name, scenario in costs.scenarios.items()
    ]
    found = []
    for choice in itertools.product(*batches):
        tables = {name: costs.tables[name, batch] for name, batch in choice}
        one = BatchChoice(tables, reference, weights, parent, costs.bytes_per_parameter)
        found.append(replace(one, constraints=one.linear(budgets)))
    return tuple(found)


def _best_of_parent(name: str, budgets: Budgets, costs: Costs, parent: Words) -> CostTable | None:
    """The table at the parent's best batch in a scenario; None where it meets memory at none.

    The parent is held to the child's rule: of the batches where it meets the memory asked for in
    units, the one with the most tokens a second. A child with a smaller KV cache then gains twice,
    by its words and by a larger batch.
    """
    if not costs.batches:
        return costs.tables[name, costs.scenarios[name].batch]
    given = {**budgets.constraints, **budgets.own.get(name, {})}

    def in_memory(table: CostTable) -> bool:
        total = table.total(parent)
        if "fits" in given:
            fits = read_fits(given["fits"])
            cached = total["kv_bytes_per_token"] * fits.tokens(table.scenario)
            if total["parameters"] * costs.bytes_per_parameter + cached > fits.memory:
                return False
        if "bytes" in given:
            amount = read_amount("bytes", given["bytes"], "bytes")
            return amount.relative or total["bytes"] <= amount.value
        return True

    def speed(table: CostTable) -> float:
        return table.total(parent).get("throughput", table.scenario.batch)

    tables = [costs.tables[name, batch] for batch in costs.batches]
    return max(filter(in_memory, tables), key=speed, default=None)
