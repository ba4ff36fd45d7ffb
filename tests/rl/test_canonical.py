"""No canonical solution of HumanEval and MBPP is lost by the judge."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tessera.rl.jail.run import JailError, require_isolation
from tessera.rl.verifiers.code import verify_asserts
from tessera.rl.verifiers.outcome import Outcome


@pytest.mark.slow
def test_every_canonical_solution_is_right(shared: Path):
    try:
        require_isolation()
    except JailError as error:
        pytest.skip(str(error))
    work = []
    for row in rows(shared / "data/humaneval/HumanEval.jsonl"):
        tests = f"{row['test']}\ncheck({row['entry_point']})\n"
        work.append((row["task_id"], row["prompt"] + row["canonical_solution"], tests, ""))
    for row in rows(shared / "data/mbpp/mbpp.jsonl"):
        work.append((row["task_id"], row["code"], row["test_list"], row["test_setup_code"]))
    with ThreadPoolExecutor(2) as pool:
        lost = {name: one for name, one in pool.map(judged, work) if one.verdict != "right"}
    assert not lost and len(work) == 164 + 974


def judged(work: tuple) -> tuple[str, Outcome]:
    name, answer, tests, setup = work
    return name, verify_asserts(answer, tests, setup=setup)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
