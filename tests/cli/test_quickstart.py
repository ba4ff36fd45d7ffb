"""The quickstart's recipe resolves, its short form too, and its table says what the runs hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tessera.cli import quickstart
from tessera.cli.fetched import FILE
from tessera.cli.main import app
from tessera.data.problems import problem
from tessera.pipeline import STAGES
from tessera.runs.files import cache_home
from tessera.runs.plan import plan
from tessera.runs.recipe import RecipeError
from tests.cases.answering import saved


@pytest.mark.parametrize("task", quickstart.EXAMPLES)
@pytest.mark.parametrize("fast", [False, True], ids=["whole", "fast"])
def test_the_recipe_holds_every_stage_that_the_table_speaks_of(tmp_path: Path, fast, task):
    steps = plan(quickstart.recipe(task, fast), tmp_path, (), STAGES)
    names = {step.name for step in steps}
    assert {run for _, run, _, _ in quickstart.TOY.rows} | {"compare", "grpo", "export"} <= names
    compared = next(step for step in steps if step.name == "compare")
    models = {path.name for path in (compared.inputs["parent"], *compared.inputs["models"])}
    assert {speed for _, _, speed, _ in quickstart.TOY.rows} == models


def test_the_families_differ_in_their_problems_and_words_alone():
    def words(task: str) -> str:
        stages = {spec.name: spec.table for spec in quickstart.recipe(task).stages}
        tokens = stages["data"]["tokenizer"].pop("tokens")
        assert {*quickstart.TOKENS.get(task, ())} <= {*tokens} and len({*tokens}) == len(tokens)
        return json.dumps(stages).replace(f'"{task}', '"TASK')

    assert words("calc") == words("hop") and words("hop").count("TASK") == 16
    names = [quickstart.recipe(t, f).name for t in quickstart.EXAMPLES for f in (False, True)]
    assert len(set(names)) == 4
    assert quickstart.recipe("hop", overrides=["name=mine"]).name == "mine"
    with pytest.raises(RecipeError, match="calc.*hop"):
        quickstart.recipe("sort")


@pytest.mark.parametrize("fast", [False, True], ids=["whole", "fast"])
@pytest.mark.parametrize("part", [None, *quickstart.PARTS])
def test_the_real_models_recipe_resolves_whole_and_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, part: str | None
):
    monkeypatch.chdir(tmp_path)  # where no recipes/ is
    model = f"parent.path={saved(tmp_path / 'model')}"
    steps = plan(quickstart.real(part, fast, [model]), tmp_path, (), STAGES)
    names = {step.name for step in steps}
    assert {"parent", "eval-parent"} <= names
    assert (part == "reasoning") != ({"kd", "compare", "export-child"} <= names)
    rows = {run for _, run, _, mode in quickstart.SMOLLM2.rows if mode == "none"}
    assert part == "reasoning" or rows <= names


@pytest.mark.parametrize(
    ("task", "level", "form"),
    [
        ("calc", 3, r"start \d( [a-z][-+*]\d){3} mod 10"),
        ("hop", 2, r"table( \d=\d){4} start=\d( [a-z]){2} stop"),
    ],
)
def test_the_example_is_a_question_of_its_family(task: str, level: int, form: str):
    for question in (problem(task, 0, 0, level=level).question, quickstart.EXAMPLES[task]):
        assert re.fullmatch(form, question)


def _written(home: Path, run: str, table: str, rows: list) -> None:
    folder = home / run / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{table}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_table_is_read_from_the_runs(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(quickstart, "is_done", lambda path: path.is_dir())
    speed = {"decode_tokens_per_second": 9.0, "parameters": 5, "kv_bytes_per_token": 3}
    names = {speed for _, _, speed, _ in quickstart.TOY.rows}
    _written(tmp_path, "compare", "compare", [{"model": n, "speedup": 2.0, **speed} for n in names])
    for number, (_, run, _, mode) in enumerate(quickstart.TOY.rows):
        file = tmp_path / run / "tables" / "eval.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        before = list(map(json.loads, lines))
        one = {"mode": mode, "tokens": 4.0, "obedience": 1.0, "stderr": 0.01}
        hard = {"task": "calc@6", "value": number / 10}
        _written(
            tmp_path, run, "eval", [*before, {**one, "task": "calc@3", "value": 1.0}, one | hard]
        )
    found = quickstart.TOY.table(tmp_path)
    assert [row["hard"] for row in found] == [n / 10 for n in range(len(quickstart.TOY.rows))]
    assert found[0]["obedience"] is None and found[-1]["obedience"] == 1.0
    assert "100.0 ±1.0%" in quickstart.TOY.rendered(found)


@pytest.mark.slow
def test_the_short_quickstart_runs_and_every_stage_moves_its_number(tmp_path: Path):
    done = CliRunner().invoke(app, ["quickstart", "--fast", "--runs", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    rows = {row["model"]: row for row in json.loads(done.stdout)}
    assert rows["parent"]["easy"] > 0.2
    assert rows["child, distilled"]["speedup"] > 2.0
    assert rows["child, distilled"]["easy"] > rows["child, as assembled"]["easy"]
    assert rows["after RL, thinking on"]["obedience"] > 0.9


@pytest.mark.slow
def test_the_real_model_goes_through_every_stage(tmp_path: Path):
    model = cache_home() / "models" / Path(FILE).name
    if not model.is_file():
        pytest.skip("the model is not in this user's cache; `make real` fetches it")
    words = ["quickstart", "--model", "smollm2", "--fast", "--runs", str(tmp_path), "--json"]
    done = CliRunner().invoke(app, [*words, f"parent.path={model}"])
    assert done.exit_code == 0, done.output
    rows = {row["model"]: row for row in json.loads(done.stdout)}
    assert list(rows) == [name for name, *_ in quickstart.SMOLLM2.rows]
    assert rows["child, distilled"]["kl"] < rows["child, as assembled"]["kl"]
    assert rows["child, distilled"]["speedup"] > 1.2


def test_the_help_and_the_first_hour_agree_on_how_long_it_takes():
    told = " ".join(CliRunner().invoke(app, ["quickstart", "--help"]).output.split())
    page = (Path(__file__).parents[2] / "docs" / "first-hour.md").read_text(encoding="utf-8")
    assert "2 to 5" in told and "Run the whole path (2 to 5 minutes)" in page
