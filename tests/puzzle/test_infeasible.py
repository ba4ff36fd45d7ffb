"""What is asked and cannot be had is told in the user's units, with the nearest that can."""

from __future__ import annotations

from tessera.puzzle.constraints import budgets
from tessera.puzzle.cost_table import CostTable, Scenario
from tessera.puzzle.infeasible import explain

SCENARIO = Scenario(batch=2, prompt=4, new=10)
WORD = {"parameters": 100, "bytes": 400, "kv_bytes_per_token": 8}
ROWS = [
    {"kind": kind, "word": word, **WORD, "prefill_seconds": 0.5, "decode_seconds": 0.0}
    for kind, word in (("base", ""), ("attention", "gqa-2"), ("ffn", "swiglu-8"))
]
COSTS = CostTable.from_rows(ROWS, SCENARIO)  # the parent: 1.5 s and 300 parameters
PARENT = [("gqa-2", "swiglu-8")]


def told(constraints, least) -> list[str]:
    limits = budgets(constraints, COSTS, PARENT)
    return explain(constraints, limits, COSTS, PARENT, least).splitlines()[1:-1]


def test_a_constraint_that_binds_alone_is_told_alone():
    constraints = {"throughput": "4x", "parameters": 150}
    lines = told(constraints, lambda column, others: {"seconds": 0.2, "parameters": 10}[column])
    assert lines == ['  throughput = "4x": at most "2.14x" can be reached in this space']


def test_constraints_that_clash_are_told_with_the_others_as_asked():
    alone, beside = {"seconds": 0.0, "parameters": 10}, {"seconds": 0.2, "parameters": 123.4}
    lines = told(
        {"latency": 0.6, "parameters": 150},
        lambda column, others: beside[column] if others else alone[column],
    )
    assert lines == [
        "  latency = 0.6: at least 0.7 is needed with the others as asked",
        "  parameters = 150: at least 224 is needed with the others as asked",
    ]


def test_what_no_relaxing_helps_is_told_too():
    assert "engines" in told({"parameters": 150}, lambda column, others: None)[0]
