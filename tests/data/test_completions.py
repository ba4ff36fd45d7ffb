"""Prompts with completions: what is trained is the completion, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tessera.data.documents import Documents
from tessera.data.readers import DataError
from tessera.data.tokenizer import load_tokenizer
from tessera.pipeline import run_recipe
from tessera.runs.recipe import loads
from tessera.runs.run import read_table

SUMS = [(a, b) for a in range(8) for b in range(9)]
ROWS = [{"prompt": f"{a} plus {b}?\n", "completion": f"{a + b}"} for a, b in SUMS]


def made(tmp_path: Path, rows: list, more: str = "") -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = f'[data]\ntokenizer = "byte"\nformat = "completion"\npaths = "{tmp_path}/rows.jsonl"\n'
    run_recipe(loads(text + more), tmp_path / "runs", quiet=True)
    return tmp_path / "runs" / "recipe" / "data"


def trained(data: Path, split: str = "train") -> list[tuple[str, str]]:
    """(untrained, trained) text of every document."""
    tokenizer, found = load_tokenizer(data), []
    source = Documents(
        data, split=split, sequence_length=64, tokens_per_step=64, microbatch_tokens=64, seed=0
    )
    (part,) = source.parts
    assert part.trained is not None
    for start, stop in zip(part.offsets, part.offsets[1:], strict=False):
        ids, mask = np.array(part.ids[start:stop]), np.array(part.trained[start:stop]) > 0
        found.append(tuple(tokenizer.decode(ids[chosen].tolist()) for chosen in (~mask, mask)))
    return found


def test_a_pair_is_one_document_of_which_the_completion_is_trained(tmp_path: Path):
    found = trained(made(tmp_path, ROWS, "heldout = 0.1\n"))
    known = {(row["prompt"], row["completion"]) for row in ROWS}
    assert set(found) < known and len(found) > 55
    held = trained(tmp_path / "runs" / "recipe" / "data", "heldout")
    assert set(held) == known - set(found)


def test_problems_are_trained_behind_their_question(tmp_path: Path):
    text = '[data]\ntokenizer = "byte"\nformat = "completion"\ntasks = { calc = 30 }\n'
    run_recipe(loads(text), tmp_path, quiet=True)
    for question, solution in trained(tmp_path / "recipe" / "data"):
        assert question.startswith("start ") and question.endswith(" mod 10\n")
        assert solution.startswith(("Work: ", "Answer: "))


def test_rows_of_another_form_are_quarantined(tmp_path: Path):
    bad = [{"prompt": "a"}, {"text": "b"}, {"prompt": "a", "completion": ""}]
    with pytest.raises(DataError, match="3 of 75"):
        made(tmp_path, ROWS + bad)
    again = tmp_path / "again"
    again.mkdir()
    data = made(again, ROWS + bad, "max_bad = 0.1\n")
    assert sum(row["documents"] for row in read_table(data, "summary")) == len(ROWS)
