"""Small search problems for tests: random whole-number costs, scores, scenarios, batches, pairs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tessera.model.config import ModelConfig
from tessera.puzzle.candidates import Architecture, Candidates, Found, keeps_both_kinds
from tessera.puzzle.constraints import BatchChoice, Budgets, batch_choices
from tessera.puzzle.cost_table import DEFAULT, Costs, CostTable, Scenario
from tessera.puzzle.search import SearchConfig, solver_of
from tessera.puzzle.space import Space, Unit
from tests.toy import toy_config

ATTENTION, FFN = ("gqa-4", "gqa-1", "noop"), ("swiglu-48", "swiglu-12", "noop")
PAIRS = (
    Unit.pair(0, "gqa-1", "swiglu-12"),
    Unit.pair(1, "noop", "swiglu-12"),
    Unit.pair(1, "noop", "swiglu-48"),
)
LAYERS = 2
SPACE = Space(((ATTENTION, FFN),) * LAYERS, PAIRS)
PARENT = toy_config(layers=LAYERS)
COUNTS = ("parameters", "bytes", "kv_bytes_per_token")


def priced(*tables: CostTable, names: tuple[str, ...] = (DEFAULT,), batches=()) -> Costs:
    """What a cost stage would have left: a table a scenario and batch, a byte a parameter."""
    order = itertools.product(names, batches or (None,))
    found = {
        (name, batch or table.scenario.batch): table
        for (name, batch), table in zip(order, tables, strict=True)
    }
    scenarios = {name: table.scenario for (name, _), table in found.items()}
    return Costs(found, scenarios, tuple(batches), "measured", None, 1.0, 1.0)


def table(seed: int, scenario: Scenario | None = None, measured: bool = False) -> CostTable:
    """Whole-number costs, the parent's the largest, a fixed base of 1."""
    rng = np.random.default_rng(seed)
    columns = COUNTS + (("prefill_seconds", "decode_seconds") if measured else ())
    rows: list[dict[str, Any]] = [{"kind": "base", "word": "", **{c: 1.0 for c in columns}}]
    for kind, words in (("attention", ATTENTION), ("ffn", FFN)):
        for i, word in enumerate(words):
            top = (9, 5, 0)[i]
            costs = {c: float(rng.integers(0, top + 1) + top) for c in columns}
            rows.append({"kind": kind, "word": word, **costs})
    return CostTable.from_rows(rows, scenario or Scenario())


def scores(seed: int) -> list[dict]:
    """A random damage of every word and pair."""
    rng = np.random.default_rng(seed)
    return [
        {"layer": layer, "kind": kind, "word": word, "kl": float(rng.uniform(0, 5))}
        for layer, kind, word in (*SPACE.replacements(), *PAIRS)
    ]


def candidates(seed: int, engines: tuple[str, ...] = ()) -> Candidates:
    return Candidates.of(PARENT, SPACE, engines, scores(seed), "kl")


def search(
    config: SearchConfig,
    parent: ModelConfig,
    space: Space,
    rows: list[dict],
    costs: Costs,
    share: float = 1.0,
    near: tuple[Architecture, int] | None = None,
) -> list[Found]:
    """The best architectures of the integer program, best first."""
    return solver_of(config, parent, space, rows, costs, share, near).architectures()


def choices_of(constraints: Mapping, costs: Costs, own: Mapping = {}, **weights: float):  # noqa: B006
    return batch_choices(Budgets(constraints, own, weights), costs, PARENT.words)


def architectures() -> Iterator[Architecture]:
    """Every one of the small space that keeps an attention and an FFN."""
    for words in itertools.product(itertools.product(ATTENTION, FFN), repeat=LAYERS):
        if keeps_both_kinds(words):
            yield list(words)


def brute_force(space: Candidates, choices: tuple[BatchChoice, ...]) -> float | None:
    """The least score of what meets every constraint at some choice of batches."""
    found = [
        space.total(words)
        for words in architectures()
        if not space.refuses(words) and any(one.excess(words) <= 1 + 1e-9 for one in choices)
    ]
    return min(found, default=None)
