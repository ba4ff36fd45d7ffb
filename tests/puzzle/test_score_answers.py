"""Accuracy without generating is the accuracy of generating; scores are those of whole passes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tessera.data.problems import problem
from tessera.data.tokenizer import byte_tokenizer
from tessera.generate.engine import SamplingParams
from tessera.generate.torch_engine import TorchEngine
from tessera.pipeline import run_recipe
from tessera.puzzle.library import BlockLibrary, load_unit, save_library
from tessera.puzzle.score import (
    LibraryUnits,
    ScoreConfig,
    TaskError,
    encode,
    pack_problems,
    procedural_problems,
    read_problems,
    score_given,
)
from tessera.puzzle.space import SpaceConfig, Unit, build_space
from tessera.puzzle.surgery import collect_statistics
from tessera.runs.recipe import RecipeError, loads, validate
from tessera.runs.run import read_json, read_table
from tests import tiny
from tests.puzzle.test_score import added_up
from tests.toy import toy_batch, toy_model

ANSWER = 4


def greedy(module, prompts) -> list[list[int]]:
    params = SamplingParams(max_tokens=ANSWER, temperature=0)
    return [found[0].token_ids for found in TorchEngine(module).generate(prompts, params)]


def problems(module) -> list[tuple[list[int], int]]:
    """Random prompts of several lengths; every third answer is wrong in one of its tokens."""
    prompts = [tiny.tokens(40, 3 + i % 5, seed=i).tolist() for i in range(12)]
    answers = greedy(module, prompts)
    for i in range(0, 12, 3):
        place = i // 3
        answers[i][place] = (answers[i][place] + 1) % 40
    return [(p + a, len(p)) for p, a in zip(prompts, answers, strict=True)]


def accuracy(module, found) -> float:
    said = greedy(module, [ids[:start] for ids, start in found])
    pairs = zip(said, found, strict=True)
    return sum(answer == ids[start:] for answer, (ids, start) in pairs) / len(found)


def total(module, portions, units=None) -> dict:
    found: dict = {}
    for portion in portions:
        for key, values in added_up(module, portion, units).items():
            known = found.setdefault(key, dict.fromkeys(values, (0.0, 0.0)))
            for metric, (value, weight) in values.items():
                known[metric] = known[metric][0] + value, known[metric][1] + weight
    return found


def test_accuracy_is_that_of_greedy_generation():
    module = toy_model().requires_grad_(False)
    found = problems(module)
    portions = pack_problems("t", found, row_length=30, pad_id=0)
    assert len(portions) > 1
    sums = total(module, portions)[()]
    assert sums["task.t.accuracy"] == (8, 12) and sums["task.t"][1] == 12 * ANSWER
    assert accuracy(module, found) == 8 / 12
    other = toy_model(seed=1).requires_grad_(False)
    assert total(other, portions)[()]["task.t.accuracy"][0] / 12 == accuracy(other, found)


def test_a_replacement_scores_as_the_whole_model_with_it(tmp_path: Path):
    parent = toy_model().requires_grad_(False)
    space = build_space(SpaceConfig(), parent.config)
    statistics = collect_statistics(parent, [toy_batch(9)])
    save_library(BlockLibrary.from_parent(parent, space, statistics), tmp_path)
    found = problems(parent)
    portions = pack_problems("t", found, row_length=40, pad_id=0)
    sums = total(parent, portions, LibraryUnits.of(tmp_path, parent, space))
    for layer, kind, word in space.replacements():
        swapped = toy_model().requires_grad_(False)
        unit = load_unit(tmp_path, parent.config, Unit(layer, kind, word))
        swapped.replace(layer, kind, unit)  # type: ignore[arg-type]
        own = sums[layer, kind, word]
        assert own["task.t.accuracy"][0] / 12 == accuracy(swapped, found)
        loss = 0.0
        for ids, start in found:
            with torch.no_grad():
                log_p = F.log_softmax(swapped.logits(swapped(torch.tensor([ids])))[0], -1)
            loss -= sum(float(log_p[i - 1, ids[i]]) for i in range(start, len(ids)))
        assert own["task.t"][0] == pytest.approx(loss, rel=1e-4)


def test_each_metric_is_averaged_with_its_own_weight(tmp_path: Path):
    parent = toy_model().requires_grad_(False)
    found = problems(parent)
    portions = pack_problems("t", found, row_length=40, pad_id=0)
    noop = Unit(1, "ffn", "noop")
    changed = {noop: load_unit(tmp_path, parent.config, noop)}
    batch = toy_batch(2)
    own, (row,) = score_given(parent, parent, changed, [batch], answers=portions)
    sums = total(parent, portions, changed)
    assert own["task.t.accuracy"] == 8 / 12
    loss = sums[()]["task.t"][0] / (12 * ANSWER)
    assert own["task.t"] == pytest.approx(loss)
    assert row["task.t"] == pytest.approx(sums[noop]["task.t"][0] / (12 * ANSWER) - loss)
    assert row["tokens"] == int(batch.weight.sum())


def test_problems_read_as_the_documents_they_were_trained_on():
    for work in (True, False):
        for index, (prompt, answer) in enumerate(procedural_problems("calc", 5, work)):
            one = problem("calc", 0, index, "heldout")
            assert prompt + answer == one.text(work)
            assert ("Work" in prompt) == work and one.answer in answer
    ids, start = encode(byte_tokenizer(), ("ab", " c"), bos=True)
    assert len(ids) == 5 and start == 3


def test_what_is_no_problem_is_told_by_its_line(tmp_path: Path):
    file = tmp_path / "t.jsonl"
    file.write_text('{"prompt": "2+2=", "answer": "4"}\n\n{"prompt": "2+2="}\n')
    assert read_problems(file, limit=1) == [("2+2=", "4")]
    with pytest.raises(TaskError, match="line 3: give an object"):
        read_problems(file, limit=9)
    with pytest.raises(TaskError, match=r"problem 1 has 3 tokens of prompt and 3 of answer"):
        pack_problems("t", [([1, 2, 3, 4, 5, 6], 3)], row_length=4, pad_id=0)
    with pytest.raises(RecipeError, match=r"score.tasks: .*calk.*calc"):
        validate(ScoreConfig, {"tasks": {"calk": 3}}, "score")
    with pytest.raises(RecipeError, match=r"mine: there is no file"):
        validate(ScoreConfig, {"tasks": {"mine": "nowhere.jsonl"}}, "score")


def test_a_score_stage_has_a_column_for_each_task(tmp_path: Path):
    from tests.puzzle.test_race import RECIPE

    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({"prompt": "start 3 a+1 mod 10\nAnswer:", "answer": " 4"}) + "\n")
    recipe = RECIPE[: RECIPE.index("[cost]")]
    tasks = f'score.tasks={{ calc = 3, mine = "{file}" }}'
    overrides = [tasks, "score.microbatch_tokens=128"]
    run_recipe(loads(recipe, overrides), tmp_path, quiet=True)
    score = tmp_path / "recipe" / "score"
    columns = {"task.calc", "task.calc.accuracy", "task.mine", "task.mine.accuracy"}
    assert all(columns <= row.keys() for row in read_table(score, "scores"))
    own = read_json(score, "parent")
    assert columns <= own.keys() and own["agreement"] == 1 and own["task.mine"] > 0
