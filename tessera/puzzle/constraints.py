"""Budgets in the user's words made linear (Puzzle §2.6).

    throughput = "1.25x"     at least 1.25 times the parent's tokens a second
    latency = "0.8 s"        prefill and every decode step of the scenario
    bytes = "0.7x"           weights and KV cache at most 0.7 of the parent's
    fits = "1x H100, 32k context, 16 sequences"

`throughput` >= T becomes seconds <= batch·new / T; every other bound is a weighted sum of columns
over words, plus the base (embedding, head, sampling). A share of the parent's time is one bound
over all scenarios, Σ w·seconds/seconds(parent) / Σ w; every other bound holds in each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tessera.puzzle.budget_words import (
    EXAMPLES,
    Amount,
    ConstraintError,
    Fits,
    in_bytes,
    read_amount,
    read_fits,
)
from tessera.puzzle.cost_table import CostTable, Words
from tessera.runs.recipe import nearest

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
