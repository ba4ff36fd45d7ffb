"""What is asked and cannot be had is told in the user's units, with the nearest that can."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tessera.puzzle.constraints import Budgets, batch_choices
from tessera.puzzle.cost_table import CostTable, Scenario
from tessera.puzzle.program import Infeasible
from tessera.puzzle.search import Solver, explain
from tests.searching import brute_force, candidates, choices_of, priced, table

SCENARIO = Scenario(batch=2, prompt=4, new=10)
WORD = {"parameters": 100, "bytes": 400, "kv_bytes_per_token": 8}
ROWS = [
    {"kind": kind, "word": word, **WORD, "prefill_seconds": 0.5, "decode_seconds": 0.0}
    for kind, word in (("base", ""), ("attention", "gqa-2"), ("ffn", "swiglu-8"))
]
COSTS = CostTable.from_rows(ROWS, SCENARIO)  # the parent: 1.5 s and 300 parameters
PARENT = [("gqa-2", "swiglu-8")]


def told(constraints, least, **slack: float) -> list[str]:
    (case,) = batch_choices(Budgets(constraints, {}, {}), priced(COSTS), PARENT)
    given = dict.fromkeys(constraints, 0.0) | slack
    return explain(case, given, least).splitlines()[1:-1]


def test_a_constraint_that_binds_alone_is_told_alone():
    constraints = {"throughput": "4x", "parameters": 150}
    least = {"throughput": 0.2, "parameters": 10}
    lines = told(constraints, lambda key, others: least[key], throughput=0.2 + 0.5 - 1.5 / 4)
    assert lines == [
        '  throughput = "4x": at most "2.14x" can be reached in this space',
        'The cheapest way out: throughput = "2.14x" (46 % less), the others as asked',
    ]


def test_constraints_that_clash_are_told_with_the_others_as_asked():
    alone, beside = {"latency": 0.0, "parameters": 10}, {"latency": 0.2, "parameters": 123.4}
    lines = told(
        {"latency": "600 ms", "parameters": 150},
        lambda key, others: beside[key] if others else alone[key],
        latency=0.06,
        parameters=15.0,
    )
    assert lines == [
        '  latency = "600 ms": at least "700 ms" is needed with the others as asked',
        "  parameters = 150: at least 224 is needed with the others as asked",
        'The cheapest way out: latency = "660 ms" (10 % more), parameters = 165 (10 % more)',
    ]


def test_what_devices_hold_is_told_in_gib():
    lines = told({"fits": "1x H100"}, lambda key, others: 100e9, fits=28e9)
    needed = '"93.2 GiB" is needed, of the "67.1 GiB" that there are'
    assert lines[0] == f'  fits = "1x H100": at least {needed} in this space'
    assert lines[1].startswith('The cheapest way out: fits in "93.2 GiB" (39 % more)')


def test_what_no_relaxing_helps_is_told_too():
    words = candidates(0, ("llama.cpp",))
    bare = words.space.__class__(((("noop",), ("swiglu-48",)),) * 2)
    stuck = words.__class__(words.parent, bare, (), {})
    with pytest.raises(Infeasible, match="no two words"):
        Solver(stuck, choices_of({"parameters": 9}, priced(table(0)))).architectures()


def _limits(parameters: int, seconds: int):
    # Whole costs and limits between whole numbers: nothing hangs on the last bit.
    return {"parameters": parameters + 0.5, "time_to_first_token": f"{seconds}.5 s"}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(2, 30))
def test_the_nearest_can_be_met_and_a_little_less_cannot(seed: int, parameters: int, seconds: int):
    words, costs = candidates(seed), priced(table(seed, measured=True))
    asked = _limits(parameters, seconds)
    try:
        Solver(words, choices_of(asked, costs)).architectures()
    except Infeasible as error:
        message = str(error)
    else:
        assume(False)
        return
    lines = re.findall(r'  (\w+) = .*: at least "?([\d.,]+)( s)?"? is needed (.*)', message)
    assert lines or "not all of them together" in message
    for name, number, unit, when in lines:
        nearest = float(number.replace(",", ""))
        rest = {} if "space" in when else {k: v for k, v in asked.items() if k != name}
        met = {**rest, name: f"{nearest}{unit}" if unit else nearest}
        assert brute_force(words, choices_of(met, costs)) is not None
        less = f"{nearest * 0.985 - 1e-3}{unit}" if unit else nearest * 0.985 - 1e-3
        assert brute_force(words, choices_of({**rest, name: less}, costs)) is None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(2, 30))
def test_the_cheapest_way_out_can_be_gone_and_is_the_cheapest(seed, parameters, seconds):
    from tests.searching import architectures

    words, costs = candidates(seed), priced(table(seed, measured=True))
    (case,) = choices_of(_limits(parameters, seconds), costs)
    slack = Solver(words, [case]).slack(case)
    assert slack is not None

    def way(architecture) -> float:
        totals = case.totals(architecture)
        return sum(max(0.0, one.total(totals) - one.bound) / one.bound for one in case.constraints)

    least = min(way(a) for a in architectures() if not words.refuses(a))
    assert sum(slack[one.key] / one.bound for one in case.constraints) == pytest.approx(
        least, abs=1e-6
    )
    if least == 0:
        return
    with pytest.raises(Infeasible) as error:
        Solver(words, (case,)).architectures()
    (line,) = [x for x in str(error.value).splitlines() if x.startswith("The cheapest way out")]
    changed = dict(re.findall(r'(\w+) = "?([\d.,]+(?: s)?)"? \(', line))
    loosened = _limits(parameters, seconds) | {k: v.replace(",", "") for k, v in changed.items()}
    assert changed and Solver(words, choices_of(loosened, costs)).architectures()
