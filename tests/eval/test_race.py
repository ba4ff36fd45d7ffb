"""A race on a tiny library: the winner is the lowest held-out KL, and a killed race goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tessera.eval.race import candidates
from tessera.pipeline import run_recipe
from tessera.recipe import loads
from tessera.run import read_json, read_metrics, read_table

TRAIN = "{ steps = 3, tokens_per_step = 64, microbatch_tokens = 64, sequence_length = 32 }"
SHAPE = "{ hidden_size = 16, num_hidden_layers = 2, num_attention_heads = 2, intermediate_size = 16"
RECIPE = f"""
[data]
tokenizer = "byte"
tasks = {{ calc = 40 }}
heldout = 0.2
[parent]
architecture = {SHAPE}, num_key_value_heads = 2 }}
train = {TRAIN}
[bld]
train = {TRAIN}
calibration_tokens = 64
space = {{ ffn = ["50%", "noop"] }}
[score]
tokens = 64
microbatch_tokens = 64
sequence_length = 32
[cost]
measure = false
[search]
constraints = {{ parameters = "0.9x" }}
solutions = 3
[search-dropped]
method = "dropped"
constraints = {{ parameters = "0.9x" }}
[race]
searches = ["search", "search-dropped"]
train = {TRAIN}
tokens = 64
[child]
architecture = "race"
"""


def test_the_winner_has_the_lowest_held_out_kl(tmp_path: Path):
    run_recipe(loads(RECIPE), tmp_path, quiet=True)
    race = tmp_path / "recipe" / "race"
    rows = read_table(race, "race")
    field = candidates([tmp_path / "recipe" / n for n in ("search", "search-dropped")])
    assert [row["candidate"] for row in rows] == [c["name"] for c in field] and len(rows) > 2
    best = min(rows, key=lambda row: row["kl"])
    winner = read_json(race, "architecture")
    assert winner["name"] == best["candidate"]
    config = json.loads((tmp_path / "recipe" / "child" / "model" / "config.json").read_text())
    assert config.get("blocks", winner["words"]) == winner["words"]


def test_a_killed_race_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run_recipe(loads(RECIPE), tmp_path / "straight", quiet=True)
    import tessera.eval.race as race

    plain, seen = race._distil, []

    def dying(*arguments):
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(race, "_distil", dying)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(loads(RECIPE), tmp_path / "killed", quiet=True)
    run_recipe(loads(RECIPE), tmp_path / "killed", quiet=True)
    a, b = (tmp_path / name / "recipe" / "race" for name in ("straight", "killed"))
    assert read_table(a, "race") == read_table(b, "race")
    for heat in (a / "heats").iterdir():
        assert read_metrics(heat) == read_metrics(b / "heats" / heat.name)
