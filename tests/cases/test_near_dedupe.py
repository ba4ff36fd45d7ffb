"""Near-duplicates: problems that differ in little stay, copies in another dress go."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.curate.steps.contamination import Decontaminate
from tessera.curate.steps.duplicates import clusters, signatures
from tessera.curate.steps.words import counted, tokens

LINES = Path(__file__).with_name("near_dedupe.jsonl").read_text(encoding="utf-8").splitlines()
DIFFERENT, SAME = (
    [row[kind] for row in map(json.loads, LINES) if kind in row] for kind in ("different", "same")
)


def kept(texts: list[str], n: int = 3, threshold: float = 0.8) -> list[str]:
    labels = clusters(signatures(texts, n), threshold)
    return [text for row, text in enumerate(texts) if labels[row] == row]


@pytest.mark.parametrize(("n", "threshold"), [(3, 0.8), (2, 0.6), (3, 0.3)])
def test_different_problems_all_stay(n: int, threshold: float):
    for texts in DIFFERENT:
        assert kept(texts, n, threshold) == texts
        longer = [f"{text} Put the answer into a box at the end of the text." for text in texts]
        assert kept(longer, n, threshold) == longer


def test_copies_in_another_dress_go():
    for texts in SAME:
        assert kept(texts) == texts[:1]
        assert kept(texts[::-1]) == texts[-1:]


def test_words_and_what_counts_of_them():
    assert tokens(r"It's ($x^{2}$), $1,000.50") == ["it's", *"(x^(2))", "1000.5"]
    assert tokens("0.50 .5 .0 0 007 10 1,234 1,23") == [
        ".5",
        ".5",
        "0",
        "0",
        "007",
        "10",
        "1234",
        "1",
        "23",
    ]
    assert counted(tokens("A 5-year-old (he reads 3 books) T-shirt")) == ["5", "year", "3", "t"]
    assert counted(tokens("- 5 apples\n* **7** pears\n> <b>and</b> 3*4")) == [
        "5",
        "7",
        "3",
        "*",
        "4",
    ]
    assert (
        counted(tokens("pages 10-15, -x and km/h, x/y, covid-19, and/or"))
        == "10 - 15 - x km / h x / y 19 or".split()
    )
    assert counted(tokens(r"\left(x+1\right) (y) f(z)")) == ["(", "x", "+", "1", ")", "y", "f", "z"]
    assert counted(tokens("") + tokens("()") + tokens("a ) b (")) == ["b"]


@given(st.text() | st.text("0.,1aé ½²\\\\{}()[]$^-*/<>=!|% \\n三ก"))
def test_any_text_is_cut(text: str):
    found = tokens(text)
    assert all(found) and set(counted(found)) <= set(found)
    assert tokens(f"  {text.upper()}  ") is not None


def test_one_text_gets_one_digest_wherever_it_stands():
    texts = [text for texts in (*DIFFERENT, *SAME) for text in texts] + ["", "what is", "\udcff"]
    whole = dict(zip(texts, signatures(texts, 3).tolist(), strict=True))
    random.Random(0).shuffle(texts)
    for begin in range(0, len(texts), 7):
        part = texts[begin : begin + 7]
        assert signatures(part, 3).tolist() == [whole[text] for text in part]


def test_decontamination_tells_operators_and_reads_scripts_without_spaces(tmp_path: Path):
    problems = ["What is 12 + 7?", "小明有12个苹果，给了小红7个，现在小明有几个苹果？"]
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps({"q": text}) + "\n" for text in problems))
    step = Decontaminate.model_validate(
        {"step": "decontaminate", "against": [{"paths": str(file), "field": "q"}]}
    )
    for text, share in (
        ("Compute what is $12+7$, please.", 1.0),
        ("What is 12 - 7?", 0.0),
        ("请回答：小明有12个苹果，给了小红7个，现在小明有几个苹果？谢谢。", 1.0),
        ("小红喜欢在公园里散步，小明喜欢在家里看书。", 0.0),
    ):
        assert step.overlap(text)[0] == share
