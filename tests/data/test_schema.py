"""Rows of chats: every dialect read into one form and back, and what is no conversation told."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tessera.data.conversation import Chat, SchemaError, fault
from tessera.data.dialects import Dialect, read_chats, read_row, write_row
from tessera.data.readers import Bad, DataError

THOUGHT = "<think>\nTwice two.\n</think>\n\nFour."
NEMOTRON: dict[str, Any] = {
    "input": [
        {"role": "user", "content": "Two and two?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "Sure?"},
    ],
    "output": THOUGHT,
    "reasoning": "on",
    "system_prompt": "detailed thinking on",
    "category": "math",
    "license": "cc-by-4.0",
    "generator": "DeepSeek-R1",
    "used_in_training": ["Ultra", "Nano"],
    "version": "v1.1",
}
RENDERED = {
    **{key: NEMOTRON[key] for key in ("reasoning", "category", "license", "generator")},
    "input": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ndetailed thinking on"
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nTwo and two?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "output": THOUGHT + "<|eot_id|>",
    "used_in_training": "yes",
    "version": "v1",
}
RL = {
    "input": [{"role": "user", "content": "Write at least 100 words about a pond."}],
    "args": {
        "instruction_id_list": ["length_constraints:number_words"],
        "instruction_kwargs": [{"relation": "at least", "num_words": 100}],
    },
    "category": "instruction following",
    "license": "odc-by",
}
CALL = {"name": "add", "arguments": {"a": 2, "b": 2}}
OPENAI = {
    "messages": [
        {"role": "system", "content": "detailed thinking on"},
        {"role": "user", "content": "Two and two?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Ask the tool.",
            "tool_calls": [{"id": "c1", "type": "function", "function": CALL}],
        },
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
        {"role": "assistant", "content": "Four.", "reasoning_content": "It says 4."},
    ],
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
    "source": "here",
}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "Two and two?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "Four."},
    ],
    "system": "Be brief.",
    "tools": '[{"name": "add"}]',
}
ALPACA = {
    "instruction": "Add.",
    "input": "2 and 2",
    "output": "4",
    "system": "Be brief.",
    "history": [["Hello", "Hi."]],
}
ROWS: dict[str, tuple[Dialect, dict[str, Any]]] = {
    "nemotron": ("nemotron", NEMOTRON),
    "nemotron-rendered": ("nemotron-rendered", RENDERED),
    "nemotron-rl": ("nemotron", RL),
    "openai": ("openai", OPENAI),
    "sharegpt": ("sharegpt", SHAREGPT),
    "alpaca": ("alpaca", ALPACA),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_read_and_written_and_read_is_the_row_read(name: str) -> None:
    dialect, row = ROWS[name]
    chat = read_row(row)
    assert read_row(write_row(chat, dialect)) == chat
    assert read_row(write_row(chat, "openai")) == chat
    assert Chat.from_json(chat.to_json()) == chat
    if name not in ("alpaca", "sharegpt"):  # where one conversation has several spellings
        assert write_row(chat, dialect) == row


def test_both_revisions_of_a_nemotron_row_are_the_same_conversation() -> None:
    plain = {**NEMOTRON, "input": NEMOTRON["input"][:1]}
    assert read_row(plain).messages == read_row(RENDERED).messages
    assert read_row(plain).mode == read_row(RENDERED).mode == "on"
    assert read_row(RENDERED).extra["used_in_training"] == "yes"


def test_a_row_of_reinforcement_learning_is_a_prompt() -> None:
    chat = read_row(RL)
    assert not chat.answered and chat.extra["args"] == RL["args"]
    assert fault(chat) == "no answer to train on"


def test_parts_of_content_and_calls_as_text_are_read() -> None:
    parts = [
        {"type": "reasoning", "value": "Ask."},
        {"type": "tool_call", "value": json.dumps(CALL)},
    ]
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Two and two?"}]},
            {"role": "assistant", "content": parts},
        ]
    }
    messages = read_row(row).messages
    assert messages[0]["content"] == "Two and two?"
    assert messages[1]["reasoning_content"] == "Ask."
    assert messages[1]["tool_calls"] == [{"type": "function", "function": CALL}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (3, "a int, not an object"),
        ({"text": "x"}, "no row of a known dialect: it has text"),
        ({"messages": []}, "no messages"),
        ({"messages": "hi"}, "messages is a str"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 0 has a int as content"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "message 0 has role 'boss'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no message of a user"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]}, "empty answer"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "not UTF-8"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "tool"}]}, "nobody made"),
        ({**NEMOTRON, "reasoning": "yes"}, "reasoning is 'yes'"),
        ({**NEMOTRON, "output": None, "args": []}, "args are no lists"),
        ({**RL, "args": {**RL["args"], "instruction_kwargs": []}}, "1 instructions and 0"),
        ({**RENDERED, "input": RENDERED["input"][:-2]}, "does not end where the assistant speaks"),
        ({**RENDERED, "input": "x" + RENDERED["input"]}, "something else stands"),
        ({"conversations": [{"from": "me", "value": "x"}]}, "message 0 has role 'me'"),
        ({"instruction": "x", "history": ["y"]}, "history is no list of pairs"),
        ({**OPENAI, "tools": "[1]"}, "tools is no list of objects"),
    ],
)
def test_what_is_no_conversation_is_refused_with_the_reason(row: Any, reason: str) -> None:
    with pytest.raises(SchemaError) as error:
        read_row(row)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("mode", "output", "reason"),
    [
        ("on", THOUGHT, None),
        ("off", "Four.", None),
        ("on", "Four.", "no thought although reasoning is on"),
        ("on", "<think>Twice two. Four.", "a thought that does not end"),
        ("on", "Twice two.</think>Four.", "not one thought at the beginning"),
        ("on", "Well. <think>x</think>Four.", "not one thought at the beginning"),
        ("on", "<think>x</think>Four.<think>y</think>", "not one thought at the beginning"),
        ("on", "<think>\n</think>Four.", "an empty thought"),
        ("on", "<think>Twice two.</think>\n", "no answer behind the thought"),
        ("off", THOUGHT, "a thought although reasoning is off"),
        ("off", "<think></think>Four.", "a thought although reasoning is off"),
    ],
)
def test_rows_that_contradict_their_switch(mode: str, output: str, reason: str | None) -> None:
    row = {**NEMOTRON, "reasoning": mode, "system_prompt": f"detailed thinking {mode}"}
    found = fault(read_row({**row, "output": output}))
    assert found == reason or (found and reason and found.startswith(reason))


def test_a_switch_that_contradicts_its_row() -> None:
    chat = read_row({**NEMOTRON, "system_prompt": "detailed thinking off"})
    assert fault(chat) == 'reasoning is "on" and the system prompt says "off"'


def test_the_mode_of_rows_that_do_not_say_it() -> None:
    assert read_row(SHAREGPT).mode == read_row(ALPACA).mode == "off"
    assert read_row(OPENAI).mode == "on"
    assert read_row({**ALPACA, "output": THOUGHT}).mode == "on"


def test_a_file_is_read_to_its_end_with_the_numbers_of_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    bad = ["", '{"input": ', '{"messages": []}', "[1]"]
    file.write_text("\n".join([json.dumps(NEMOTRON), *bad, json.dumps(ALPACA)]))
    found = list(read_chats(file))
    assert [number for number, _ in found] == [1, 3, 4, 5, 6]
    reasons = [one.reason for _, one in found if isinstance(one, Bad)]
    assert reasons[1:] == ["no messages", "a list, not an object"]
    assert reasons[0].startswith("not JSON")
    file.write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="rows.jsonl:1 is no row of a known dialect"):
        list(read_chats(file))


def test_lists_and_parquet_hold_the_same_rows(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    rows = [NEMOTRON, {**NEMOTRON, "category": "code"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    parquet.write_table(Table.from_pylist(rows), tmp_path / "a.parquet")
    want = [(1, read_row(rows[0])), (2, read_row(rows[1]))]
    assert list(read_chats(tmp_path / "a.json")) == want
    assert list(read_chats(tmp_path / "a.parquet")) == want


def mutated(rng: random.Random, value: Any) -> Any:
    """The value with one place in it broken."""
    junk = [None, 3, True, "", "x", [], {}, [None], {"role": 1}, "\ud800", "</think>", "<think>"]
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        changed = dict(value)
        if rng.random() < 0.2:
            del changed[key]
            return changed
        return {**changed, key: mutated(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value[:at] + value[at + 1 :] if rng.random() < 0.5 else value + [value[at]]
        return [mutated(rng, one) if i == at else one for i, one in enumerate(value)]
    if isinstance(value, str) and value and rng.random() < 0.5:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice(["<think>", "\x00", "<|eot_id|>", "\ud800", ""]) + value[at:]
    return rng.choice(junk)


def test_ten_thousand_mutated_rows_are_accepted_or_refused_with_a_reason() -> None:
    rng = random.Random(0)
    seeds = [row for _, row in ROWS.values()]
    outcomes: dict[str, int] = {}
    for _ in range(10_000):
        row = rng.choice(seeds)
        for _ in range(rng.randint(1, 3)):
            row = mutated(rng, row)
        try:
            chat = read_row(row)
        except SchemaError as error:
            assert str(error)
            outcomes["refused"] = outcomes.get("refused", 0) + 1
            continue
        assert fault(chat) is None or fault(chat)
        assert read_row(write_row(chat)) == chat
        chat.to_json().encode()
        outcomes["accepted"] = outcomes.get("accepted", 0) + 1
    assert min(outcomes.values()) > 2000, outcomes


def test_real_rows_are_read(shared: Path) -> None:
    counts = {
        "nemotron_schema/example_row.jsonl": 1,
        "nemotron_schema/gsm8k_train_500_on_off.jsonl": 1000,
        "sft_small/llamafactory/alpaca_en_demo.json": 999,
        "sft_small/llamafactory/glaive_toolcall_en_demo.json": 300,
        "sft_small/llamafactory/dpo_en_demo.json": 300,
        "sft_small/llamafactory/kto_en_demo.json": 300,
        "sft_small/llamafactory/reason_tool_use_demo_50.jsonl": 50,
        "sft_small/modelopt/synthetic_conversations_1k.jsonl": 1000,
        "sft_small/nemo_aligner/dummy-sft.jsonl": 30,
    }
    for name, count in counts.items():
        found = [chat for _, chat in read_chats(shared / "data" / name)]
        bad = [chat for chat in found if isinstance(chat, Bad)]
        assert len(found) == count and not bad, (name, bad[:2])
        for chat in found:
            assert isinstance(chat, Chat) and read_row(write_row(chat)) == chat
