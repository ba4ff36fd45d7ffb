"""Hashes of words, near duplicates and overlaps against the plain way of computing them."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.curate.steps.contamination import Decontaminate, word_grams
from tessera.curate.steps.duplicates import bands_for, clusters, signatures
from tests.curate.conftest import write_lines

SYLLABLES = ("bdfgklmnprtvz", "aeiou", "klmnprtvz", "aeiou", "lmnr")
WORDS = ["".join(letters) for letters in itertools.product(*SYLLABLES)]


def plain_grams(text: str, n: int) -> list[tuple[str, ...]]:
    found = [w for w in re.findall(r"[a-zé]+", text.lower())]
    if len(found) < n:
        return [tuple(found)] if found else []
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]


@settings(max_examples=200, deadline=None)
@given(st.text("aAbB c.é\n", max_size=20), st.integers(1, 4))
def test_grams_are_runs_of_words(text: str, n: int):
    assert word_grams(text, n) == {hash(one) for one in plain_grams(text, n)}


def test_numbers_count_as_one_word_when_masked():
    a, b, c = (word_grams(f"Tom has {n} red balls", 3, mask_digits=True) for n in "12x")
    assert a == b != c


def test_signatures_estimate_the_jaccard_index():
    rng = random.Random(0)
    vocabulary = WORDS[:5000]
    errors = []
    for _ in range(40):
        left = rng.sample(vocabulary, 120)
        right = left[: rng.randrange(20, 120)] + rng.sample(vocabulary, 60)
        a, b = signatures([" ".join(left), " ".join(right)], 1)[:, :128]
        both = len(set(left) & set(right)) / len(set(left) | set(right))
        errors.append((a == b).mean() - both)
    assert abs(np.mean(errors)) < 0.01
    assert np.std(errors) < 0.06  # sqrt(J (1 - J) / 128) is 0.044 at most


def test_near_copies_fall_into_the_first_one_s_cluster():
    rng = random.Random(1)
    vocabulary = WORDS[:3000]
    firsts = [rng.choices(vocabulary, k=60) for _ in range(300)]
    copies = [[*one[:59], "other"] for one in firsts]
    found = signatures([" ".join(one) for one in firsts + copies], 2)
    labels = clusters(found, 0.8)
    assert np.array_equal(labels[:300], np.arange(300))
    assert (labels[300:] == np.arange(300)).mean() > 0.99


def test_texts_without_words_are_nobody_s_copies():
    assert clusters(signatures(["!", "?", ""], 2), 0.8).tolist() == [0, 1, 2]
    assert clusters(signatures([], 2), 0.8).tolist() == []


def test_bands_catch_the_pairs_at_the_threshold():
    for threshold in (0.5, 0.7, 0.8, 0.9):
        bands, size = bands_for(threshold)
        assert bands * size <= 128
        assert 1 - (1 - threshold**size) ** bands >= 0.98


def test_overlaps_are_those_of_the_sets(tmp_path: Path):
    rng = random.Random(2)
    problems = [" ".join(rng.choices("abcdefgh", k=rng.randrange(1, 20))) for _ in range(50)]
    asked = [" ".join(rng.choices("abcdefgh", k=rng.randrange(0, 30))) for _ in range(80)]
    asked += problems[:10]
    exam = write_lines(tmp_path / "exam.jsonl", [{"p": one} for one in problems])
    step = Decontaminate.model_validate(
        {"step": "decontaminate", "against": [{"paths": str(exam), "field": "p"}], "n": 2}
    )
    sets = [set(plain_grams(one, 2)) for one in problems]
    for text in asked:
        share, found = step.overlap(text)
        own = set(plain_grams(text, 2))
        plain = [
            len(own & other) / min(len(own), len(other))
            if own and len(own & other) >= min(step.least, len(other))
            else 0.0
            for other in sets
        ]
        assert share == max(plain)
        assert plain[found] == share or share == 0
