"""Paraphrases found with no endpoint: a teacher of kind "embedder", in the process of the stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tessera.ask.local import Embedder
from tessera.curate.config import CurateConfig
from tessera.runs.files import FailureError
from tessera.runs.recipe import RecipeError, validate
from tests import encoder
from tests.curate.conftest import run_stage, write_lines

EXAM = ("red car buys tree", "two apple eats five")
ROWS = ("red car buys tree", "buys red car tree", "nine pear has house", "two apple eats nine")


def table(where: Path, **more: Any) -> dict[str, Any]:
    if not (where / "encoder").exists():
        encoder.saved(where / "encoder")
    exam = write_lines(where / "exam.jsonl", [{"p": text} for text in EXAM])
    rows = write_lines(where / "rows.jsonl", [{"q": text} for text in ROWS])
    local = {"kind": "embedder", "model": str(where / "encoder"), **more}
    return {
        "sources": [{"paths": str(rows), "question": "q"}],
        "steps": [{"step": "nearest", "against": [{"paths": str(exam), "field": "p"}]}],
        "teachers": {"embedder": local},
    }


def test_rows_find_their_nearest_problem(tmp_path: Path):
    made = run_stage(tmp_path / "run", table(tmp_path))
    found = [row["nearest"] for row in made.rows]
    assert [found[0], found[1], found[3]] == [EXAM[0], EXAM[0], EXAM[1]]
    assert made.rows[0]["nearest_score"] == 1.0
    assert 0.5 < made.rows[1]["nearest_score"] < 1


def test_what_is_over_drop_is_left_out(tmp_path: Path):
    told = table(tmp_path)
    told["steps"][0]["drop"] = 0.999
    made = run_stage(tmp_path / "run", told)
    assert made.counts()["1 nearest"] == (4, 3)
    assert made.removed[0]["reason"] == "contaminated by its embedding"


def test_a_stopped_run_embeds_no_text_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = run_stage(tmp_path / "whole", table(tmp_path, batch=1))
    plain, texts, full = Embedder._vectors, [], 3

    def stopping(self: Embedder, tokens: list[list[int]]) -> list[list[float]]:
        if len(texts) == full:
            raise FailureError("stopped")
        texts.append(tokens)
        return plain(self, tokens)

    monkeypatch.setattr(Embedder, "_vectors", stopping)
    with pytest.raises(FailureError, match="stopped"):
        run_stage(tmp_path / "run", table(tmp_path, batch=1))
    full = len(EXAM) + len(ROWS)
    made = run_stage(tmp_path / "run", table(tmp_path, batch=1))
    assert made.rows == whole.rows
    assert len(texts) == full


def test_a_batch_changes_no_row(tmp_path: Path):
    runs = [run_stage(tmp_path / f"run{n}", table(tmp_path, batch=n)) for n in (1, 3)]
    assert runs[0].rows == runs[1].rows


def test_the_run_follows_from_the_weights(tmp_path: Path):
    config = validate(CurateConfig, table(tmp_path), "curate")
    assert str(tmp_path / "encoder") in config.files


def test_vectors_and_answers_are_asked_of_those_who_give_them(tmp_path: Path):
    told = table(tmp_path)
    judging = {"step": "same_problem", "teacher": "embedder"}
    with pytest.raises(RecipeError, match="step 2 asks the teacher 'embedder' for answers"):
        validate(CurateConfig, told | {"steps": [*told["steps"], judging]}, "curate")
    with pytest.raises(RecipeError, match="for vectors, and an engine gives none.*embedder"):
        validate(CurateConfig, told | {"teachers": {"embedder": {"kind": "engine"}}}, "curate")
