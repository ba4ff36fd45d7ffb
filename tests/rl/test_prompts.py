"""Prompts: each question once, the mode said as it is to be, answers not shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tessera.data.readers import DataError
from tessera.rl.profile import FILE, PromptsConfig, collect, read, write
from tessera.rl.rewards import InstructionsReward, require_fields


def test_problems_are_asked_once_and_never_held_out_ones():
    from tessera.data.problems import split_of

    found = collect(
        PromptsConfig(tasks={"calc@2": 200, "calc@3": 100}, off=0.25), 0, "detailed thinking"
    )
    questions = [one.messages[-1]["content"] for one in found]
    assert len(set(questions)) == len(questions)
    assert {split_of(question) for question in questions} == {"train"}
    off = sum(one.mode == "off" for one in found)
    assert off == pytest.approx(len(found) / 4, abs=1)
    for one in found:
        assert one.messages[0]["content"] == f"detailed thinking {one.mode}"


def test_rows_of_chats_are_asked_without_their_answers(tmp_path: Path):
    row = {"input": [{"role": "user", "content": "2+2?"}], "output": "<think>a</think>4"}
    row |= {"reasoning": "on", "system_prompt": "detailed thinking on", "expected_answer": "4"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (one,) = collect(PromptsConfig(paths=(str(path),)), 0)
    assert [m["role"] for m in one.messages] == ["system", "user"]
    assert one.fields["answer"] == "4"


def test_conversations_that_end_alike_are_different_questions(tmp_path: Path):
    chats = [
        [("user", "Name a colour."), ("assistant", "Red."), ("user", "Another one.")],
        [("user", "Name a fruit."), ("assistant", "Plum."), ("user", "Another one.")],
    ]
    rows = [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in chats]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    found = collect(PromptsConfig(paths=(str(path),), switch="enable_thinking"), 0)
    assert [one.messages for one in found] == [row["messages"] for row in rows]


def test_instructions_of_the_nemotron_rl_part_are_what_the_checker_reads(tmp_path: Path):
    told = {"instruction_id_list": ["punctuation:no_comma", "startend:end_checker"]}
    told["instruction_kwargs"] = [{"end_phrase": None}, {"end_phrase": "bye"}]
    row = {"input": [{"role": "user", "content": "Say bye."}], "args": told}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (one,) = collect(PromptsConfig(paths=(str(path),)), 0)
    require_fields([InstructionsReward(kind="instructions")], one.fields)
    assert one.fields["kwargs"] == [{}, {"end_phrase": "bye"}]


def test_a_model_without_a_switch_is_given_none():
    found = collect(PromptsConfig(tasks={"calc@2": 3}, off=0.5), 0)
    assert all(one.mode is None and len(one.messages) == 1 for one in found)


def test_a_variable_of_the_template_leaves_the_messages_as_they_are():
    (one, *_) = collect(PromptsConfig(tasks={"calc@2": 3}, switch="enable_thinking"), 0)
    assert [m["role"] for m in one.messages] == ["user"]


def test_prompts_are_read_as_they_were_written(tmp_path: Path):
    found = collect(PromptsConfig(tasks={"calc@2": 20}), 0)
    (tmp_path / FILE).write_text(write(found))
    assert read(tmp_path) == found


def test_no_prompts_are_answered_with_what_to_give():
    with pytest.raises(DataError, match='"calc@6" = 400'):
        collect(PromptsConfig(), 0)
