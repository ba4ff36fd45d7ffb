"""`tessera judge`: rows of answers in, verdicts with their reasons out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tessera.cli.main import app

pytest.importorskip("math_verify", reason="needs the extra `rl`")
ROWS = [
    {"kind": "math", "answer": r"So \boxed{2\frac23}.", "gold": "8/3", "want": "right"},
    {"kind": "number", "answer": "It is 3.15", "gold": 3.14, "tolerance": 0.1},
    {"kind": "choice", "answer": "The answer is B.", "gold": "C", "want": "wrong"},
    {"kind": "math", "answer": r"\boxed{43}", "gold": "Answer is forty three."},
    {"answer": "<think>hm", "tests": "assert f() == 1"},
    {"answer": "a, b", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {"kind": "format", "answer": "<think>a</think>b", "gold": "on"},
]
VERDICTS = ["right", "right", "wrong", "could-not-judge", "wrong", "wrong", "right"]


def judged(text: str, *words: str):
    return CliRunner().invoke(app, ["judge", "-", *words], input=text)


def test_a_table_and_its_summary(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    told = CliRunner().invoke(app, ["judge", str(file)])
    assert told.exit_code == 0, told.output
    lines = told.stdout.splitlines()
    assert "verdict" in lines[0] and len(lines) == len(ROWS) + 4
    assert "cannot be read" in told.stdout
    assert lines[-1] == "7 rows: 3 right, 3 wrong, 1 could-not-judge; 2 of 2 as wanted"


def test_lines_for_machines():
    told = judged("\n".join(map(json.dumps, ROWS)), "--json")
    found = [json.loads(line) for line in told.stdout.splitlines()]
    assert [one["verdict"] for one in found] == VERDICTS
    assert [one["line"] for one in found] == list(range(1, 8))
    assert found[3]["score"] is None and found[0]["score"] == 1.0
    assert found[4]["reason"] == "no answer"


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("{", "line 2"),
        ("[1]", "`gold` or `tests`"),
        ('{"kind": "maths", "answer": "1", "gold": "1"}', "'math'"),
        ('{"answer": "1", "gold": "1"}', "exact"),
        ('{"kind": "math", "answer": "1"}', "gold"),
        ('{"kind": "math", "answer": 1, "gold": "1"}', "`answer`"),
        ('{"kind": "math", "answer": "1", "gold": {}}', "`gold`"),
        ('{"kind": "code", "answer": "1"}', "tests, or by inputs and outputs"),
        ('{"kind": "code", "answer": "1", "tests": [1]}', "`tests`"),
        ('{"kind": "number", "answer": "1", "gold": 1, "tolerance": "x"}', "`tolerance`"),
        ('{"kind": "math", "answer": "1", "gold": "1", "want": "true"}', "could-not-judge"),
        ('{"answer": "1", "instruction_id_list": ["x:y"], "kwargs": [{}]}', "'x:y'"),
    ],
)
def test_a_malformed_row_is_named_with_what_is_allowed(row: str, named: str):
    told = judged(f"{json.dumps(ROWS[0])}\n{row}\n")
    assert told.exit_code == 2
    assert "line 2" in told.stderr and named in told.stderr, told.stderr
    assert not told.stdout
