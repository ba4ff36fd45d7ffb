"""A race on a tiny library: rungs halve the field, and a killed race goes on to the same table."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera import dist
from tessera.data.batch import Batch
from tessera.model.checkpoint import load_model, open_model
from tessera.objectives.kd import KD, KDConfig, raced
from tessera.objectives.lm import documents
from tessera.pipeline import STAGES, run_recipe
from tessera.puzzle.library import assemble
from tessera.puzzle.race import RaceConfig, candidates, heat, ranking, unigram_entropy
from tessera.runs.files import FailureError, RunError
from tessera.runs.plan import plan
from tessera.runs.recipe import RecipeError, loads, validate
from tessera.runs.run import Run, read_json, read_metrics, read_table
from tessera.train.engine import Trainer
from tessera.train.optim import TrainConfig
from tests.test_dist import run_ranks

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
source = "counted"
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
RUNGS = ["race.rungs=3", "race.keep=0.6", "race.lrs=[1e-4, 1e-2]"]
SEARCHES = ("search", "search-dropped")


def race(runs: Path, *overrides: str) -> Path:
    run_recipe(loads(RECIPE, overrides), runs, quiet=True)
    return runs / "recipe" / "race"


def test_the_winner_has_the_lowest_held_out_kl(tmp_path: Path):
    path = race(tmp_path)
    rows = read_table(path, "race")
    field = candidates([tmp_path / "recipe" / name for name in SEARCHES])
    assert {row["candidate"] for row in rows} == {c["name"] for c in field} and len(rows) > 2
    assert [row["kl"] for row in rows] == sorted(row["kl"] for row in rows)
    assert [row["place"] for row in rows] == list(range(1, len(rows) + 1))
    winner = read_json(path, "architecture")
    assert winner["name"] == rows[0]["candidate"] and winner["lr"] == rows[0]["lr"] == 1e-3
    config = json.loads((tmp_path / "recipe" / "child" / "model" / "config.json").read_text())
    assert config.get("blocks", winner["words"]) == winner["words"]


def heat_in_ranks() -> None:
    """The heat of an architecture, and how many of the child's parameters this process holds."""
    home, words = Path(sys.argv[1]), json.loads(sys.argv[2])
    train = {"steps": 3, "tokens_per_step": 64, "microbatch_tokens": 64, "sequence_length": 32}
    config = validate(RaceConfig, {"train": train, "tokens": 64}, "race").heat(1, 1e-3)
    inputs = {"parent": home / "parent", "library": home / "bld", "data": home / "data"}
    child = assemble(open_model(inputs["parent"]), inputs["library"] / "library", words)
    opened = {"stage": "race", "config": {}, "inputs": {}, "seed": 0, "quiet": True}
    with dist.processes(), Run.open(home / "two", **opened) as run:
        parts = config.train.placement.load(child).parameters()
        row = heat(home / "two" / "heat", words, config, run, inputs)
        print(json.dumps([row, sum(part.to_local().numel() for part in parts)]))


def test_a_heat_is_a_distillation_and_no_more_in_one_process_or_two(tmp_path: Path):
    """Every row of a race of one rung is what KD of the assembled child alone arrives at."""
    path = race(tmp_path)
    home = path.parent
    row = read_table(path, "race")[-1]
    (chosen,) = (
        c for c in candidates([home / name for name in SEARCHES]) if c["name"] == row["candidate"]
    )
    parent = load_model(home / "parent", frozen=True)
    library = home / "bld" / "library"
    child = load_model(assemble(open_model(home / "parent"), library, chosen["words"]))
    train = TrainConfig(steps=3, tokens_per_step=64, microbatch_tokens=64, sequence_length=32)
    source = documents(home / "data", train, 0)
    with Run.open(tmp_path / "own", stage="t", config={}, inputs={}, seed=0, quiet=True) as run:
        Trainer(child, KD(parent, KDConfig(train=train)), source, train, run).fit()
    own = path / "heats" / f"1-{row['candidate']}"
    assert read_metrics(own) == read_metrics(tmp_path / "own")
    code = "from tests.puzzle.test_race import heat_in_ranks; heat_in_ranks()"
    printed = map(json.loads, run_ranks(code, str(home), json.dumps(chosen["words"])))
    for two, held in printed:
        assert two == pytest.approx({key: row[key] for key in two}, rel=1e-4)
        assert held <= 0.51 * child.config.num_params()


def test_each_rung_halves_the_field_on_equal_and_more_tokens(tmp_path: Path):
    path = race(tmp_path, *RUNGS)
    rows = read_table(path, "race")
    rungs = {n: [row for row in rows if row["rung"] == n] for n in (1, 2, 3)}
    field = candidates([tmp_path / "recipe" / name for name in SEARCHES])
    assert len(rungs[1]) == 2 * len(field)  # once a learning rate
    for number, steps in ((1, 3), (2, 6), (3, 12)):
        assert {row["tokens"] for row in rungs[number]} == {64 * steps}
        for row in rungs[number]:
            name = f"{number}-{row['candidate']}" + f"-lr{row['lr']:g}" * (number == 1)
            logged = read_metrics(path / "heats" / name)
            assert len(logged) == steps
    for before, after in ((1, 2), (2, 3)):
        placed = sorted(
            (row for row in rungs[before] if row["place"]), key=lambda row: row["place"]
        )
        went_on = [(row["candidate"], row["lr"]) for row in placed[: len(rungs[after])]]
        assert {(row["candidate"], row["lr"]) for row in rungs[after]} == set(went_on)
    table = {"train": {"steps": 3}, "rungs": 3, "keep": 0.6, "lrs": (1e-4, 1e-2)}
    planned = RaceConfig(**table).heats(len(field))
    assert [row["tokens"] // 64 for row in rows] == planned
    best = min(rungs[3], key=lambda row: row["kl"])
    winner = read_json(path, "architecture")
    assert (winner["name"], winner["lr"]) == (best["candidate"], best["lr"])


def test_a_killed_race_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    a = race(tmp_path / "straight", *RUNGS)
    import tessera.puzzle.race as module

    plain, seen = module._distil, []

    def dying(*arguments):
        seen.append(1)
        if len(seen) in (2, 7):
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(module, "_distil", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            race(tmp_path / "killed", *RUNGS)
    b = race(tmp_path / "killed", *RUNGS)
    assert read_table(a, "race") == read_table(b, "race")
    for one in (a / "heats").iterdir():
        assert read_metrics(one) == read_metrics(b / "heats" / one.name)


def row(candidate: str, kl: float | None, meets: bool = True) -> dict[str, Any]:
    return {"candidate": candidate, "kl": kl, "meets": meets}


def test_places_go_by_kl_then_by_order_and_the_hopeless_stand_last():
    rows = [row("a", 0.3), row("b", 0.2), row("a", 0.1), row("c", 0.2), row("d", None)]
    assert ranking(rows) == [2, 1, 3, 4]  # a's better rate; the tie of b and c in their order
    missed = [row("a", 0.1, meets=False), row("b", 0.5), row("c", None)]
    assert ranking(missed) == [1, 0, 2]
    assert ranking([row("a", 0.3, False), row("b", 0.2, False)]) == [1, 0]


def test_a_candidate_that_diverges_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = Trainer._check_finite

    def hot(self, step: int, metrics: dict[str, float]) -> None:
        plain(self, step, metrics | ({"loss": float("nan")} if self.config.lr > 1 else {}))

    monkeypatch.setattr(Trainer, "_check_finite", hot)
    rows = read_table(race(tmp_path, "race.lrs=[2.0, 1e-3]"), "race")
    cool = [row for row in rows if row["lr"] < 1]
    assert [row["place"] for row in cool] == list(range(1, len(cool) + 1))
    assert all(row["kl"] is None and row["place"] is None for row in rows if row["lr"] > 1)
    with pytest.raises(FailureError, match="no candidate ended rung 1"):
        race(tmp_path / "all", "race.train.lr=2.0")


def test_the_winners_rate_is_the_distillations(tmp_path: Path):
    config = KDConfig(train=TrainConfig(steps=1, lr=5e-4), lr_from="race")
    path = race(tmp_path, "race.lrs=[1e-4, 1e-2]")
    child = path.parent / "child"
    assert raced(config, child).train.lr == read_json(path, "architecture")["lr"]
    with pytest.raises(RunError, match="lr_from"):
        raced(config, path.parent / "parent")


def test_a_rate_that_is_not_used_is_said_before_and_at_the_start(tmp_path: Path):
    text = f'{RECIPE}[kd]\ntrain = {TRAIN}\nlr_from = "race"\n'

    def notes() -> list[str]:
        return plan(loads(text, ["kd.train.lr=1e9"]), tmp_path, (), STAGES)[-1].notes()

    assert notes() == ["lr, from race; train.lr = 1e+09 is not used"]
    run_recipe(loads(text, ["kd.train.lr=1e9"]), tmp_path, quiet=True)
    log = (tmp_path / "recipe" / "kd" / "log.txt").read_text()
    assert log.count("lr 0.001, from race; train.lr = 1e+09 is not used") == 1
    assert notes() == ["lr 0.001, from race; train.lr = 1e+09 is not used"]


def test_a_guess_without_context_is_the_entropy_of_the_labels():
    labels = torch.tensor([[3, 3, 5, 5, 9, 9]])
    weight = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]])
    batch = Batch(labels, labels, weight, labels, labels)
    assert unigram_entropy([batch, batch]) == pytest.approx(math.log(2))


def test_a_race_of_bad_candidates_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = race(tmp_path)  # three steps of everything: bytes are guessed at
    assert "all candidates are bad" in (path / "log.txt").read_text()
    monkeypatch.setattr("tessera.puzzle.race.unigram_entropy", lambda batches: 99.0)
    run_recipe(loads(RECIPE), tmp_path, redo=["race"], quiet=True)
    assert "all candidates are bad" not in (path / "log.txt").read_text()


def test_rates_are_different_and_above_zero():
    table = {"train": {"steps": 1}, "lrs": [1e-3, 1e-3]}
    with pytest.raises(RecipeError, match=r"race.lrs: give different learning rates"):
        validate(RaceConfig, table, "race")
