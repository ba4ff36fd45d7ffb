"""Chat rows as people have them: what of each is trained, and behind which prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tessera.data.audit import audit
from tessera.data.chat import ChatError
from tessera.data.conversation import SchemaError
from tessera.data.dialects import read_row, write_row
from tests.cases.chat_tokenizers import made

HOME = Path(__file__).parent
CASES = [json.loads(line) for line in (HOME / "rows.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("template", ["builtin", "chatml"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["why"])
def test_what_is_trained_of_a_row(case: dict[str, Any], template: str) -> None:
    tokenizer = made(template)
    wanted = case.get(template, case)
    if isinstance(wanted, dict):
        with pytest.raises((SchemaError, ChatError)) as error:
            tokenizer.encoder().encode(read_row(case["row"]))
        assert wanted["refused"] in str(error.value)
        return
    documents = tokenizer.encoder().encode(read_row(case["row"]))
    assert tokenizer.trained(documents) == wanted
    asked = tokenizer.asked(case["asked"], case.get("tools"))
    last = documents[-1]
    answer = tokenizer.ids(wanted[-1] + tokenizer.end)
    assert last.ids == asked + answer and last.trained[-len(answer) - 1 :] == [False] + [
        True
    ] * len(answer)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["why"])
def test_a_row_read_is_written_and_read_again_as_it_was(case: dict[str, Any]) -> None:
    try:
        chat = read_row(case["row"])
    except SchemaError:
        return
    assert read_row(json.loads(json.dumps(write_row(chat)))) == chat


@pytest.mark.parametrize("template", ["builtin", "chatml"])
def test_audit_says_the_same_of_a_file(template: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    cases = [case for case in CASES if "is no row of a known dialect" not in case["why"]]
    file.write_text("".join(json.dumps(case["row"]) + "\n" for case in cases), "utf-8")
    report = audit(file, made(template).encoder())
    assert not report.violations
    refused = {number for numbers in report.refused.values() for number in numbers}
    assert refused == {
        number for number, case in enumerate(cases, 1) if isinstance(case.get(template, case), dict)
    }
