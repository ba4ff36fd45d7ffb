"""Programs in answers as models write them, and what their tests say."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tessera.rl.jail.run import JailError, Limits, require_isolation
from tessera.rl.verifiers import code
from tessera.rl.verifiers.blocks import extract_code, fenced, used_names
from tessera.rl.verifiers.judge import judge

CASES = Path(__file__).parent
KEYS = ("tests", "setup", "entry_point", "inputs", "outputs")
try:
    require_isolation()
    refused = ""
except JailError as error:
    refused = str(error)
jailed = pytest.mark.skipif(bool(refused), reason=refused or "isolated")


def rows(folder: Path = CASES) -> list[dict[str, Any]]:
    text = (folder / "code.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def verdict(row: dict[str, Any]) -> str:
    given = {key: row[key] for key in KEYS if key in row}
    limits = Limits(seconds=1, memory_mib=256)
    return judge("code", row["answer"], limits=limits, **given).verdict


def plain(row: dict[str, Any]) -> bool:
    """Whether a program of ours may be run here: it is right, and asks for nothing."""
    return row["want"] == "right" and "tests" in row and "entry_point" not in row


@pytest.mark.parametrize("row", [r for r in rows() if plain(r)], ids=lambda row: row["name"])
def test_the_program_is_found(row: dict[str, Any]):
    tests = row["tests"] if isinstance(row["tests"], str) else "\n".join(row["tests"])
    program = extract_code(row["answer"], used_names(f"{row.get('setup', '')}\n{tests}"))
    assert program is not None
    exec(f"{program}\n{row.get('setup', '')}\n{tests}", {"__name__": "__main__"})


@jailed
def test_each_row_has_its_verdict():
    found = [row for row in rows() if not plain(row)]
    with ThreadPoolExecutor(2) as pool:
        verdicts = list(pool.map(verdict, found))
    wanted = [row["want"] for row in found]
    names = [row["name"] for row in found]
    both = zip(names, wanted, verdicts, strict=True)
    assert [(name, given) for name, want, given in both if want != given] == []


@jailed
def test_the_clock_alone_judges_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(code, "CLOCK_TIMES", 0.5)
    busy = {"answer": "```python\nwhile True: pass\n```"}
    for given in ({"tests": ["assert 1 == x"]}, {"inputs": ["2"], "outputs": ["4"]}):
        assert verdict(busy | given) == "could-not-judge"


@jailed
def test_rows_of_the_issue_have_their_verdicts(shared: Path):
    found = rows(shared / "cases")
    assert [verdict(row) for row in found] == [row["want"] for row in found]


def test_what_tests_need_is_taken_and_no_more():
    helper, other = "def helper(): return 1", "def other(): return helper()"
    answer = f"```python\n{helper}\n```\n```python\n{other}\n```\n```python\nprint(3)\n```\n"
    assert extract_code(answer, {"other"}) == f"{helper}\n\n{other}\n"
    assert extract_code(answer, {"helper"}) == f"{helper}\n"
    assert extract_code(answer) == "print(3)\n"


def test_only_closed_fences_are_curated():
    assert fenced("```py\na\n```\n~~~python\nb\n~~~\n```python\nc\n", ("py", "python")) == [
        "a\n",
        "b\n",
    ]
    assert fenced("- x\n  ```c++17\n  int a;\n  ```", ("c++",)) == ["int a;\n"]
