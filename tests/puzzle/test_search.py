"""The search is brute force over scenarios and batches; it explains failures and prices budgets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tessera.export.engines import refusals
from tessera.model.checkpoint import save_model
from tessera.puzzle.candidates import Candidates
from tessera.puzzle.constraints import Budgets, batch_choices
from tessera.puzzle.cost import CostConfig, price
from tessera.puzzle.cost_table import Costs, CostTable, Scenario
from tessera.puzzle.program import (
    Infeasible,
    SearchError,
)
from tessera.puzzle.search import (
    STEPS,
    SearchConfig,
    Solver,
    explain,
    find,
    optimality,
    shadow_prices,
    stage,
)
from tessera.puzzle.space import Space, SpaceConfig, build_space
from tessera.runs.recipe import RecipeError, validate
from tessera.runs.run import Run, read_json, read_table
from tests.searching import (
    LAYERS,
    PAIRS,
    PARENT,
    SPACE,
    architectures,
    brute_force,
    candidates,
    choices_of,
    priced,
    scores,
    search,
    table,
)
from tests.toy import toy_config, toy_model

CHAT, LONG = Scenario(batch=2, prompt=4, new=10), Scenario(batch=3, prompt=40, new=5)


def _written(folder: Path, name: str, rows: object) -> None:
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    lines = isinstance(rows, list) and rows and isinstance(rows[0], dict)
    text = "\n".join(map(json.dumps, rows)) + "\n" if lines else json.dumps(rows)  # type: ignore[arg-type]
    (folder / "tables" / f"{name}.{'jsonl' if lines else 'json'}").write_text(text)


def _inputs(folder: Path, scenarios: dict[str, Scenario], batches: tuple[int, ...]) -> dict:
    """The runs that a search reads, as their stages would leave them."""
    save_model(toy_model(layers=2), folder / "parent")
    extra = {"lm_loss": 0.5, "agreement": -0.1, "tokens": 9}
    _written(folder / "score", "scores", [row | extra | {"task.calc": 1.0} for row in scores(3)])
    _written(folder / "score", "space", [[list(words) for words in pair] for pair in SPACE.layers])
    _written(folder / "score", "pairs", [[p.layer, *p.word.split("+")] for p in PAIRS])
    _written(folder / "score", "servable", [])
    _written(folder / "score", "block_influence", [0.2, 0.1])
    rows = []
    for number, (name, scenario) in enumerate(scenarios.items()):
        for batch in batches or (scenario.batch,):
            served = scenario.model_copy(update={"batch": batch})
            found = table(3 + number + batch, served, measured=True)
            for (kind, word), columns in {("base", ""): found.base, **found.words}.items():
                plain = {k: v for k, v in columns.items() if k != "seconds"}
                key = {"scenario": name, "batch": batch, "kind": kind, "word": word}
                rows.append(key | plain)
    _written(folder / "cost", "costs", rows)
    told = {"scenarios": {name: one.model_dump() for name, one in scenarios.items()},
            "batches": list(batches), "source": "measured", "device": None,
            "bytes_per_parameter": 1.0, "bytes_per_kv": 1.0}  # fmt: skip
    _written(folder / "cost", "scenarios", told)
    return {name: folder / name for name in ("parent",)} | {
        "scores": folder / "score", "costs": folder / "cost", "library": None, "data": None,
    }  # fmt: skip


def test_one_scenario_is_a_plain_row(tmp_path: Path):
    inputs = _inputs(tmp_path, {"default": CHAT}, ())
    (row,), *_ = find(SearchConfig(constraints={"throughput": "1.5x"}), inputs)
    assert "scenarios" not in row and row["method"] == "mip" and row["gap"] < 1e-6
    assert row["scenario"] == CHAT.model_dump() and row["meets"]
    assert row["predicted"]["throughput"] >= 1.5 * row["parent"]["throughput"]


@pytest.mark.parametrize("method", ["mip", "uniform", "dropped", "dropped-attention", "greedy"])
def test_every_method_serves_scenarios_and_batches(tmp_path: Path, method: str):
    inputs = _inputs(tmp_path, {"chat": CHAT, "long": LONG}, (1, 4))
    scenarios = {"long": {"weight": 3.0, "constraints": {"bytes": "0.95x"}}}
    asked = {"constraints": {"throughput": "1.2x"}, "scenarios": scenarios, "method": method}
    lines: list[str] = []
    (row,), *_ = find(validate(SearchConfig, asked, "search"), inputs, lines.append)
    assert set(row["scenarios"]) == {"chat", "long"}
    assert row["predicted"] == row["scenarios"]["long"]["predicted"]  # it weighs most
    assert row["method"] == method and len(row["words"]) == 2
    assert lines[0].startswith("chat: ") and "; long: " in lines[0]
    assert ("does NOT meet" in lines[0]) == (not row["meets"])


def test_the_stage_leaves_architectures_and_prices(tmp_path: Path):
    inputs = _inputs(tmp_path, {"default": CHAT}, (1, 2, 4))
    config = SearchConfig(constraints={"throughput": "1.5x", "bytes": "75 B"}, solutions=2)
    out = tmp_path / "search"
    with Run.open(out, stage="search", config={}, inputs={}, seed=0, quiet=True) as run:
        stage(config, run, inputs)
        run.finish()
    first, *_ = read_json(out, "architectures")
    assert read_json(out, "architecture") == first
    prices = read_table(out, "prices")
    assert [row["budget"] for row in prices] == ["throughput", "bytes"]
    assert all(row["gain"] >= 0 and row["told"] in (out / "log.txt").read_text() for row in prices)


def test_any_damage_can_be_minimised_and_nothing_else(tmp_path: Path):
    inputs = _inputs(tmp_path, {"default": CHAT}, ())
    asked = {"parameters": "0.8x"}
    (row,), *_ = find(SearchConfig(constraints=asked, minimize="task.calc"), inputs)
    assert row["score"] == round(row["score"])  # every word costs 1 there
    for name, told in (
        ("task.calk", "scores.jsonl has none; did you mean 'task.calc'"),
        ("agreement", "higher is better"),
    ):
        with pytest.raises(SearchError, match=told) as error:
            find(SearchConfig(constraints=asked, minimize=name), inputs)
        assert "kl, lm_loss, task.calc" in str(error.value)
    follow = SearchConfig(constraints=asked, minimize="task.calc", conditional={"rounds": 2})  # type: ignore[arg-type]
    with pytest.raises(SearchError, match="needs a library run"):
        find(follow, inputs)
    with pytest.raises(SearchError, match="no task.calc"):
        find(follow, inputs | {"library": tmp_path, "data": tmp_path})


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"constraints": {}}, "search.constraints: empty"),
        ({}, "search.constraints: empty"),
        ({"constraints": {"latency": True}}, "latency = True: give a number, or words in quotes"),
        ({"constraints": {"latensy": "3 ms"}}, "did you mean 'latency'"),
        ({"constraints": {"latency": "3 msec"}}, "'msec' is no unit of latency; did you mean 'ms'"),
        ({"constraints": {"fits": "1x H10"}}, "did you mean 'H100'"),
        ({"constraints": {"bytes": "1x"}, "scenarios": {"chat": {"wait": 2}}}, "chat.wait"),
        ({"scenarios": {"chat": {"constraints": {"latency": "3 mss"}}}}, "chat.constraints: lat"),
    ],
)
def test_a_recipe_that_is_off_is_told_so(changed: dict, told: str):
    with pytest.raises(RecipeError) as error:
        validate(SearchConfig, changed, "search")
    assert told in str(error.value)


def test_a_scenario_may_hold_all_the_budgets():
    config = SearchConfig(scenarios={"chat": {"constraints": {"latency": "3 ms"}}})  # type: ignore[arg-type]
    assert config.budgets.own == {"chat": {"latency": "3 ms"}}


def test_a_library_made_for_an_engine_binds_its_searches():
    space = SimpleNamespace(servable=("vllm",), layers=SPACE.layers, pairs=())
    found = Candidates.of(PARENT, space, ("llama.cpp", "vllm"), scores(0), "kl")  # type: ignore[arg-type]
    assert found.engines == ("llama.cpp", "vllm")
    assert Candidates.of(PARENT, space, (), scores(0), "kl").engines == ("vllm",)  # type: ignore[arg-type]


def test_what_is_proved_and_what_is_not():
    solution = SimpleNamespace(score=2.0, gap=0.0, seconds=0.25)
    assert optimality(solution) == "score 2.0000; optimal, proved: gap 0; 0.25 s"  # type: ignore[arg-type]
    solution.gap, solution.seconds = 0.012, 60.2
    told = "score 2.0000; gap 1.2 % after 60 s; raise search.time_limit to prove more"
    assert optimality(solution) == told  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60), st.integers(2, 60))
def test_search_with_pairs_is_brute_force(seed: int, parameters: int, memory: int):
    costs, words = priced(table(seed)), candidates(seed)
    budgets = {"parameters": parameters + 0.5, "bytes": memory + 0.5}
    config = SearchConfig(constraints={**budgets})
    best = brute_force(words, choices_of(budgets, costs))
    if best is None:
        with pytest.raises(Infeasible):
            search(config, PARENT, SPACE, scores(seed), costs)
        return
    (found,) = search(config, PARENT, SPACE, scores(seed), costs)
    assert found.solution is not None and found.solution.gap < 1e-6
    assert found.solution.score == pytest.approx(best, abs=1e-9)
    assert words.total(found.words) == pytest.approx(best, abs=1e-9)
    assert found.choice.excess(found.words) <= 1


def test_an_architecture_without_attention_is_refused_however_cheap():
    costs = priced(table(0))
    least = table(0).total([("noop", "noop")] * LAYERS)["parameters"]
    config = SearchConfig(constraints={"parameters": least + 0.5})
    with pytest.raises(Infeasible, match="One attention and one FFN always stay"):
        search(config, PARENT, SPACE, scores(0), costs)


def _counted(parent, space) -> tuple[list[dict], Costs]:
    """Equal scores, and counted costs, of every word of a space."""
    settings = CostConfig(source="counted")
    words = [(kind, word) for kind in ("attention", "ffn") for word in space.words(0, kind)]
    costs = CostTable.from_rows(price(parent, words, settings, "cost")[0], settings.scenario)
    places = space.replacements()
    rows = [{"layer": i, "kind": k, "word": w, "kl": 1.0} for i, k, w in places]
    return rows, priced(costs)


def test_an_impossible_constraint_is_named_with_the_nearest_that_can_be_met():
    parent = toy_config(layers=3)
    space = build_space(SpaceConfig(attention=("gqa-2",), ffn=("50%",)), parent)
    scores, costs = _counted(parent, space)

    def found(**constraints: float | str):
        return search(SearchConfig(constraints=constraints), parent, space, scores, costs)

    with pytest.raises(Infeasible, match='parameters = "0.1x": at least "0.*x" is needed') as told:
        found(parameters="0.1x", kv_bytes_per_token="0.9x")
    assert "kv_bytes_per_token" not in str(told.value)
    nearest = re.findall(r'"([0-9.]+x)" is needed', str(told.value))[0]
    assert found(parameters=nearest)
    slightly_less = f"{float(nearest.removesuffix('x')) - 0.002}x"
    with pytest.raises(Infeasible, match=f'at least "{nearest}" is needed in this space'):
        found(parameters=slightly_less)


def test_what_an_engine_refuses_is_among_the_reasons():
    parent = toy_config(layers=1)
    space = Space(((("gqa-4", "noop"), ("swiglu-48", "swiglu-24")),))
    scores, costs = _counted(parent, space)
    clash = SearchConfig(
        constraints={"parameters": "0.9x", "kv_bytes_per_token": "0.5x"}, servable=("llama.cpp",)
    )
    with pytest.raises(Infeasible, match="kv_bytes_per_token"):  # layer 0 needs attention there
        search(clash, parent, space, scores, costs)


def test_what_an_engine_refuses_as_a_whole_is_searched_again():
    """Layers 0 and 1 empty, then a bare FFN: each pair is fine alone, vLLM refuses the run."""
    parent = toy_config(layers=3)
    space = Space((((("gqa-4", "noop")), ("swiglu-48", "noop")),) * 3)
    scores = [
        {"layer": i, "kind": k, "word": "noop", "kl": (9.0 if (i, k) == (1, "ffn") else 0.1)}
        for i in range(3)
        for k in ("attention", "ffn")
    ]
    scores[4]["kl"] = scores[5]["kl"] = 5.0
    rows = [
        {"kind": k, "word": w, "parameters": int(w != "noop"), "bytes": 0, "kv_bytes_per_token": 0}
        for k, w in (("base", ""), ("attention", "gqa-4"), ("attention", "noop"),
                     ("ffn", "swiglu-48"), ("ffn", "noop"))
    ]  # fmt: skip
    rows[0]["parameters"] = 0
    costs = priced(CostTable.from_rows(rows, Scenario()))
    free = SearchConfig(constraints={"parameters": 3})
    bound = SearchConfig(constraints={"parameters": 3}, servable=("vllm",))
    (found,) = search(free, parent, space, scores, costs)
    assert found.words == [("noop", "noop"), ("noop", "swiglu-48"), ("gqa-4", "swiglu-48")]
    (found,) = search(bound, parent, space, scores, costs)
    assert not refusals(parent.with_words(found.words), "vllm")


def _two(seed: int) -> Costs:
    """Two scenarios at two batches each."""
    tables = []
    for number, scenario in enumerate((CHAT, LONG)):
        for batch in (1, 4):
            own = table(
                seed + 10 * number + batch, scenario.model_copy(update={"batch": batch}), True
            )
            tables.append(own)
    return priced(*tables, names=("chat", "long"), batches=(1, 4))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000),
    st.floats(0.3, 2.5),
    st.floats(0.4, 1.1),
    st.floats(0.3, 1.1),
    st.floats(0.2, 5.0),
    st.sampled_from([(), ("vllm",), ("llama.cpp",)]),
)
def test_search_over_scenarios_and_batches_is_brute_force(
    seed, rate, memory, first, weight, engines
):
    asked = {"throughput": f"{rate}x", "bytes": f"{memory}x"}
    own = {"long": {"time_to_first_token": f"{first}x"}}
    words = candidates(seed, engines)
    choices = choices_of(asked, _two(seed), own, chat=weight)
    best = brute_force(words, choices)
    if best is None:
        with pytest.raises(Infeasible, match="The cheapest way out"):
            Solver(words, choices).architectures()
        return
    (found,) = Solver(words, choices).architectures()
    assert found.solution is not None and found.solution.gap < 1e-6
    assert found.solution.score == pytest.approx(best, abs=1e-6)
    assert found.choice.excess(found.words) <= 1 + 1e-6 and not words.refuses(found.words)


def _found(seed: int, parameters: float, seconds: float) -> tuple:
    words = candidates(seed)
    asked = {"parameters": parameters, "latency": f"{seconds} s"}
    choices = choices_of(asked, priced(table(seed, CHAT, measured=True)))
    try:
        (found,) = Solver(words, choices).architectures()
    except Infeasible:
        found = None
    return words, choices, found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(10, 40), st.integers(60, 400))
def test_shadow_prices_are_what_the_budgets_next_to_it_give(seed, parameters, seconds):
    words, choices, found = _found(seed, parameters + 0.25, seconds + 0.25)
    assume(found is not None)
    rows = shadow_prices(Solver(words, choices), found)
    assert [row["budget"] for row in rows] == ["parameters", "latency"]
    score = found.solution.score
    for row in rows:
        assert row["gain"] >= 0 and row["price"] >= 0
        better = [_optimum(words, choices, row["budget"], 1 + step) for step in STEPS]
        assert row["gain"] == pytest.approx(score - _first_other(score, better), abs=1e-6)
        worse = [_optimum(words, choices, row["budget"], 1 - step) for step in STEPS]
        other = _first_other(score, worse)
        assert row["tighter_possible"] == (other < float("inf"))
        if row["tighter_possible"]:
            assert row["loss"] == pytest.approx(other - score, abs=1e-6)
        assert row["binds"] == (row["gain"] > 1e-6 or other > score + 1e-6)


def _optimum(words, choices, budget: str, factor: float) -> float:
    best = brute_force(words, tuple(case.scaled(budget, factor) for case in choices))
    return float("inf") if best is None else best


def _first_other(score: float, optima: list[float]) -> float:
    return next((one for one in optima if abs(one - score) > 1e-6), score)


def test_a_budget_that_does_not_bind_says_so():
    words, choices, found = _found(1, 10_000.0, 1e6)
    for row in shadow_prices(Solver(words, choices), found):
        assert not row["binds"] and row["price"] == 0 and "does not bind" in row["told"]
    assert found.solution.score <= brute_force(words, choices) + 1e-9


def test_a_smaller_cache_gains_by_a_larger_batch():
    """Seconds are of reading weights, the same at each batch: only memory keeps it small."""
    tables = []
    for batch in (1, 2, 4):
        own = table(5, Scenario(batch=batch, prompt=4, new=10), True)
        for (kind, word), columns in own.words.items():
            cache = {"gqa-4": 100, "gqa-1": 25}.get(word, 0) * batch
            columns["bytes"] = cache + (10 if kind == "ffn" else 0)  # type: ignore[index]
            columns["prefill_seconds"] = columns["decode_seconds"] = columns["seconds"] = 1.0  # type: ignore[index]
        tables.append(own)
    costs = priced(*tables, batches=(1, 2, 4))
    choices = choices_of({"bytes": 230, "throughput": "3.9x"}, costs)
    assert choices[0].reference["default"] is tables[0]  # the parent's cache fits at batch 1 alone
    (found,) = Solver(candidates(5), choices).architectures()
    assert str(found.choice) == "batch 4"
    assert found.choice.excess(found.words) <= 1


def test_solutions_differ_across_batches_and_come_best_first():
    words = candidates(11)
    choices = choices_of({"throughput": "0.6x"}, _two(11))
    found = Solver(words, choices, solutions=4, overlap=0.6).architectures()
    scores = [words.total(one.words) for one in found]
    assert len(found) > 1 and scores == sorted(scores)
    for i, one in enumerate(found):
        for other in found[:i]:
            places = zip(sum(one.words, ()), sum(other.words, ()), strict=True)
            assert sum(a == b for a, b in places) <= 3  # of four: pairs may be counted apart


WORD = {"parameters": 100, "bytes": 400, "kv_bytes_per_token": 8}
ROWS = [
    {"kind": kind, "word": word, **WORD, "prefill_seconds": 0.5, "decode_seconds": 0.0}
    for kind, word in (("base", ""), ("attention", "gqa-2"), ("ffn", "swiglu-8"))
]
COSTS = CostTable.from_rows(ROWS, CHAT)  # the parent: 1.5 s and 300 parameters
OWN = [("gqa-2", "swiglu-8")]


def explained(constraints, least, **slack: float) -> list[str]:
    (case,) = batch_choices(Budgets(constraints, {}, {}), priced(COSTS), OWN)
    given = dict.fromkeys(constraints, 0.0) | slack
    return explain(case, given, least).splitlines()[1:-1]


def test_a_constraint_that_binds_alone_is_told_alone():
    constraints = {"throughput": "4x", "parameters": 150}
    least = {"throughput": 0.2, "parameters": 10}
    lines = explained(constraints, lambda key, others: least[key], throughput=0.2 + 0.5 - 1.5 / 4)
    assert lines == [
        '  throughput = "4x": at most "2.14x" can be reached in this space',
        'The cheapest way out: throughput = "2.14x" (46 % less), the others as asked',
    ]


def test_constraints_that_clash_are_told_with_the_others_as_asked():
    alone, beside = {"latency": 0.0, "parameters": 10}, {"latency": 0.2, "parameters": 123.4}
    lines = explained(
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
    lines = explained({"fits": "1x H100"}, lambda key, others: 100e9, fits=28e9)
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
