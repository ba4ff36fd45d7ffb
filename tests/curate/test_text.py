"""Hashes of words, near duplicates and overlaps against the plain way of computing them."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.curate.steps import duplicates
from tessera.curate.steps.contamination import Decontaminate
from tessera.curate.steps.duplicates import bands_for, clusters, signatures, word_grams
from tests.curate.conftest import write_lines

texts = st.lists(st.text("aAbB c1.é\n", max_size=20), min_size=1, max_size=8)


def plain_grams(text: str, n: int) -> list[tuple[str, ...]]:
    found = [w for w in re.findall(r"[a-z0-9é]+", text.lower())]
    if len(found) < n:
        return [tuple(found)] if found else []
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]


@settings(max_examples=200, deadline=None)
@given(texts, st.integers(1, 4))
def test_equal_hashes_mean_equal_grams(found: list[str], n: int):
    grams = word_grams(found, n)
    names: dict[int, tuple[str, ...]] = {}
    for index, text in enumerate(found):
        mine = grams.hashes[grams.starts[index] : grams.starts[index + 1]].tolist()
        plain = plain_grams(text, n)
        assert len(mine) == len(plain)
        for number, gram in zip(mine, plain, strict=True):
            assert names.setdefault(number, gram) == gram
    assert len(set(names.values())) == len(names)


def test_a_text_hashes_alike_wherever_it_stands(monkeypatch):
    found = [f"the {n} cats and 1{n} dogs, " * (n % 7) for n in range(200)]
    whole = word_grams(found, 3)
    monkeypatch.setattr(duplicates, "CHUNK", 100)
    pieces = word_grams(found, 3)
    assert np.array_equal(whole.hashes, pieces.hashes)
    assert np.array_equal(whole.starts, pieces.starts)


def test_numbers_count_as_one_word_when_masked():
    a, b, c = (word_grams([f"Tom has {n} red balls"], 3, mask_digits=True).hashes for n in "12x")
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_signatures_estimate_the_jaccard_index():
    rng = random.Random(0)
    vocabulary = [f"w{n}" for n in range(5000)]
    errors = []
    for _ in range(40):
        left = rng.sample(vocabulary, 120)
        right = left[: rng.randrange(20, 120)] + rng.sample(vocabulary, 60)
        a, b = signatures(word_grams([" ".join(left), " ".join(right)], 1))
        both = len(set(left) & set(right)) / len(set(left) | set(right))
        errors.append((a == b).mean() - both)
    assert abs(np.mean(errors)) < 0.01
    assert np.std(errors) < 0.06  # sqrt(J (1 - J) / 128) is 0.044 at most


def test_near_copies_fall_into_the_first_one_s_cluster():
    rng = random.Random(1)
    vocabulary = [f"w{n}" for n in range(3000)]
    firsts = [rng.choices(vocabulary, k=60) for _ in range(300)]
    copies = [[*one[:59], "other"] for one in firsts]
    found = signatures(word_grams([" ".join(one) for one in firsts + copies], 2))
    labels = clusters(found, 0.8)
    assert np.array_equal(labels[:300], np.arange(300))
    assert (labels[300:] == np.arange(300)).mean() > 0.99


def test_texts_without_words_are_nobody_s_copies():
    assert clusters(signatures(word_grams(["!", "?", ""], 2)), 0.8).tolist() == [0, 1, 2]
    assert clusters(signatures(word_grams([], 2)), 0.8).tolist() == []


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
    shares, nearest = step.overlaps(asked)
    sets = [set(plain_grams(one, 2)) for one in problems]
    for text, share, found in zip(asked, shares, nearest, strict=True):
        own = set(plain_grams(text, 2))
        plain = [
            len(own & other) / min(len(own), len(other))
            if own and len(own & other) >= min(step.least, len(other))
            else 0.0
            for other in sets
        ]
        assert share == max(plain)
        assert plain[found] == share or share == 0
