"""What IFEval's official checker says of texts, recorded; `benchmarks/rewards.py` compares more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tessera.rl.verifiers.english import sentences, tokens, words
from tessera.rl.verifiers.instructions import CONSTRAINTS, verify_instructions

CASES = Path(__file__).parent
COUNTS = {
    "number_sentences": lambda text: len(sentences(text)),
    "number_words": lambda text: len(words(text)),
    "capital_word_frequency": lambda text: sum(map(str.isupper, tokens(text))),
}
for _library in ("nltk", "punkt", "langdetect"):
    pytest.importorskip(_library, reason="needs the extra `rl`")


def rows(folder: Path = CASES) -> list[dict]:
    text = (folder / "ifeval.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def counted(found: list[dict]) -> list[tuple]:
    ours = [(row, COUNTS[row["instruction"]](row["text"])) for row in found]
    return [(row["text"], row["official"], own) for row, own in ours if row["official"] != own]


def test_sentences_words_and_capitals_are_counted_as_officially():
    found = [row for row in rows() if row["instruction"] in COUNTS]
    assert len(found) > 100
    assert counted(found) == []


def test_rows_of_the_issue_are_counted_as_officially(shared: Path):
    assert counted(rows(shared / "cases")) == []


def test_each_instruction_is_judged_as_officially():
    found = [row for row in rows() if "kwargs" in row]
    assert {row["instruction"] for row in found} == CONSTRAINTS.keys() - {
        "combination:repeat_prompt"  # the official checker is given the prompt
    }
    for row in found:
        ours = verify_instructions(row["text"], [row["instruction"]], [row["kwargs"]])
        assert (ours.verdict == "right") == row["official"], row
