"""A frontier is the searches it sweeps, measured; a killed one goes on to the same table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tessera.pipeline import run_recipe
from tessera.puzzle import frontier
from tessera.puzzle.candidates import Candidates
from tessera.puzzle.frontier import FrontierConfig
from tessera.puzzle.library import LibraryError
from tessera.puzzle.search import SearchConfig, find
from tessera.puzzle.space import Space, Unit
from tessera.runs.recipe import RecipeError, loads, validate
from tessera.runs.run import read_json, read_table
from tests.puzzle.test_race import RECIPE as RACE
from tests.puzzle.test_race import TRAIN
from tests.toy import toy_config

RECIPE = (
    RACE[: RACE.index("[search]")]
    + """
[frontier]
constraint = "parameters"
points = [0.95, 0.9, 0.7]
methods = ["mip", "uniform", "dropped-attention"]
tokens = 64
search = { time_limit = 30.0 }
[child]
architecture = "frontier"
point = "mip-0.9"
"""
)


def sweep(runs: Path, *overrides: str) -> Path:
    run_recipe(loads(RECIPE, overrides), runs, quiet=True)
    return runs / "recipe" / "frontier"


def test_every_point_is_what_its_own_search_finds(tmp_path: Path):
    path = sweep(tmp_path)
    home, rows = path.parent, read_table(path, "frontier")
    inputs = {name: home / name for name in ("parent", "data")}
    inputs |= {"library": home / "bld", "scores": home / "score", "costs": home / "cost"}
    for row in rows:
        if row["method"] == "mip" and row["meets"]:
            config = SearchConfig(constraints={"parameters": f"{row['point']}x"})
            (own,), *_ = find(config, inputs)
            assert own["words"] == [tuple(pair) for pair in row["words"]]
            assert row["score"] == pytest.approx(own["score"], abs=1e-6)
            assert row["share"] <= row["point"] and row["kl"] == row["kl_before"]
    by_kl = [row["kl_before"] for row in rows if row["method"] == "mip" and row["meets"]]
    assert len(by_kl) >= 2
    words = read_json(home / "child", "architecture")["words"]
    assert [words] == [row["words"] for row in rows if row["name"] == "mip-0.9"]


def test_what_a_method_cannot_reach_is_shown_as_that(tmp_path: Path):
    rows = read_table(sweep(tmp_path), "frontier")
    missing = [row for row in rows if not row["meets"]]
    for row in missing:
        assert row.get("reason") or row["share"] > row["point"]
    refused = {row["method"] for row in missing if "reason" in row}
    assert refused == {"mip"}  # it proves that nothing is there; the simple methods come near


def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train = f"frontier.train={TRAIN}"
    a = sweep(tmp_path / "straight", train, "frontier.lrs=[1e-3, 1e-2]")
    plain, seen = frontier.measured_quality, []

    def dying(*arguments):
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(frontier, "measured_quality", dying)
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path / "killed", train, "frontier.lrs=[1e-3, 1e-2]")
    monkeypatch.setattr(frontier, "find", None)  # every search is finished, and none is repeated
    b = sweep(tmp_path / "killed", train, "frontier.lrs=[1e-3, 1e-2]")
    assert read_table(a, "frontier") == read_table(b, "frontier")
    rows = read_table(a, "frontier")
    words = {json.dumps(row["words"]) for row in rows if row.get("words")}
    assert len(seen) - 1 == len(words)  # each architecture once, however many points it is


def test_speed_is_measured_in_pairs_where_asked_for(tmp_path: Path):
    overrides = ["frontier.points=[0.9]", 'frontier.methods=["mip"]', "frontier.rounds=3"]
    scenario = "cost.scenario={ batch = 1, prompt = 4, new = 4 }"
    (row,) = read_table(sweep(tmp_path, scenario, "frontier.measure=true", *overrides), "frontier")
    assert row["speedup"] > 0


def test_a_pair_counts_once():
    scores = [
        {"layer": 0, "kind": "attention", "word": "gqa-1", "kl": 1.0},
        {"layer": 0, "kind": "ffn", "word": "noop", "kl": 2.0},
        {"layer": 0, "kind": "block", "word": "gqa-1+noop", "kl": 2.5},
        {"layer": 1, "kind": "ffn", "word": "noop", "kl": 4.0},
    ]
    space = Space(
        ((("gqa-4", "gqa-1"), ("swiglu-48", "noop")),) * 2, (Unit.pair(0, "gqa-1", "noop"),)
    )
    words = Candidates.of(toy_config(layers=2), space, (), scores, "kl")
    assert words.total([("gqa-1", "noop"), ("gqa-4", "noop")]) == 6.5


def test_mistakes_are_told_before_anything_runs(tmp_path: Path):
    for table, told in (
        ({"constraint": "speed"}, "'speed' is no cost"),
        ({"search": {"servable": ["vlm"]}}, "vllm"),
        ({"search": {"servabel": []}}, "unknown key"),
        ({"points": [-1.0]}, "positive number"),
        ({"points": []}, "nothing to sweep"),
    ):
        with pytest.raises(RecipeError, match=told):
            validate(FrontierConfig, table, "frontier")
    with pytest.raises(LibraryError, match=r"points of .* are mip-0.95, mip-0.9"):
        sweep(tmp_path, "child.point=mip-9")
