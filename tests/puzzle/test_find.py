"""The search stage from the runs it reads to the tables it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tessera.model.checkpoint import save_model
from tessera.puzzle.candidates import Candidates
from tessera.puzzle.cost_table import Scenario
from tessera.puzzle.program import SearchError
from tessera.puzzle.search import SearchConfig, find, optimality, stage
from tessera.runs.recipe import RecipeError, validate
from tessera.runs.run import Run, read_json, read_table
from tests.searching import PAIRS, PARENT, SPACE, scores, table
from tests.toy import toy_model

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
