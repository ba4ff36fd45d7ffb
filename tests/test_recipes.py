"""Every recipe in the house resolves, given the checkpoint and the text it asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tessera.pipeline import STAGES
from tessera.runs.plan import plan
from tessera.runs.recipe import load
from tests import tiny

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_resolves(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for split in ("math", "code", "science", "chat", "safety"):
        (tmp_path / "SFT" / split).mkdir(parents=True)
        (tmp_path / "SFT" / split / "rows.jsonl").touch()
    for name in ("math500", "gsm8k"):
        (tmp_path / "BENCHMARKS" / name).mkdir(parents=True)
        (tmp_path / "BENCHMARKS" / name / "test.jsonl").touch()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "prompts.jsonl").touch()
    text = tmp_path / "stories.txt"
    text.write_text("Once upon a time.<|endoftext|>The end.")
    overrides = []
    if "path: on the command line" in recipe.read_text():
        tiny.saved(tmp_path / "model")
        overrides.append(f"parent.path={tmp_path / 'model'}")
    told = recipe.read_text()
    reads = ("tasks", "SFT/", "[curate")
    if not any(one in told for one in reads) or "data.paths" in told:
        overrides.append(f'data.paths=["{text}"]')
    steps = plan(load(recipe, overrides), tmp_path / "runs", (), STAGES)
    assert [step.action for step in steps] == ["run"] * len(steps)
