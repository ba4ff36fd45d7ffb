"""The audit finds each of the mistakes that masks are known for, and none where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tessera.cli.main import app
from tessera.data.audit import CHECKS, audit, coloured, violations
from tessera.data.chat import ChatEncoder, Document
from tessera.data.conversation import Chat
from tessera.data.dialects import read_row
from tessera.data.tokenizer import train_bpe

BPE = train_bpe(["the cat sat on the mat and thought of fish"], 300, chat=True)
ENCODER = ChatEncoder.of(BPE)
ON = {
    "input": [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>\nonce\n</think>\n\n1"},
        {"role": "user", "content": "Two?"},
    ],
    "output": "<think>\ntwice\n</think>\n\n2 it is",
    "reasoning": "on",
}
OFF = {"input": [{"role": "user", "content": "Two?"}], "output": "2 it is", "reasoning": "off"}


def encoded(row: dict[str, Any]) -> tuple[Chat, list[Document]]:
    chat = read_row(row)
    return chat, ENCODER.encode(chat)


def first_thought_masked(documents: list[Document]) -> None:
    start = documents[-1].trained.index(True)
    documents[-1].trained[start] = False


def answer_cut(documents: list[Document]) -> None:
    documents[-1].trained[-3] = False


def stop_masked(documents: list[Document]) -> None:
    documents[-1].trained[-1] = False


def prompt_trained(documents: list[Document]) -> None:
    documents[-1].trained[documents[-1].trained.index(True) - 1] = True


def thought_added(documents: list[Document]) -> None:
    last, thought = documents[-1], BPE.encode("<think>so</think>")
    start = last.trained.index(True)
    last.ids[start:start] = thought
    last.trained[start:start] = [True] * len(thought)


def history_kept(documents: list[Document]) -> None:
    thought = BPE.encode("<think>\nonce\n</think>")
    documents[-1].ids[5:5] = thought
    documents[-1].trained[5:5] = [False] * len(thought)


def turn_doubled(documents: list[Document]) -> None:
    documents.insert(0, documents[0])


@pytest.mark.parametrize(
    ("spoil", "row", "check"),
    [
        (first_thought_masked, ON, "first thought"),
        (answer_cut, ON, "answer"),
        (answer_cut, OFF, "answer"),
        (stop_masked, ON, "stop token"),
        (stop_masked, OFF, "stop token"),
        (prompt_trained, OFF, "prompt"),
        (thought_added, OFF, "off-row"),
        (history_kept, ON, "history"),
        (turn_doubled, ON, "once"),
        (turn_doubled, OFF, "once"),
    ],
)
def test_each_mistake_is_found(
    spoil: Callable[[list[Document]], None], row: dict[str, Any], check: str
) -> None:
    chat, documents = encoded(row)
    assert violations(chat, documents, ENCODER) == []
    spoil(documents)
    assert check in violations(chat, documents, ENCODER)


def test_every_check_is_tested() -> None:
    (mark,) = test_each_mistake_is_found.pytestmark  # type: ignore[attr-defined]
    assert {check for _, _, check in mark.args[1]} == set(CHECKS)


def test_an_unmasked_set_fails(tmp_path: Path) -> None:
    chat, (_, document) = encoded(ON)
    everything = Document(document.ids, [True] * len(document.ids), "on")
    assert {"first thought", "answer", "prompt"} <= set(violations(chat, [everything], ENCODER))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """(a set of two good rows and two bad ones, a tokenizer)."""
    rows = tmp_path / "rows.jsonl"
    bad = [{**OFF, "output": "<think>x</think>2"}, {"input": []}]
    rows.write_text("\n".join(map(json.dumps, [ON, OFF, *bad])))
    BPE.save(tmp_path / "tokenizer")
    return rows, tmp_path / "tokenizer"


def test_a_report_counts_and_names_rows(files: tuple[Path, Path]) -> None:
    report = audit(files[0], ENCODER)
    assert report.rows == {"on": 1, "off": 1} and report.documents == 3 and not report.clean
    assert report.refused == {
        "a thought although reasoning is off": [3],
        "no messages": [4],
    }
    assert audit(files[0], ENCODER, limit=2).clean


def test_trained_tokens_are_coloured() -> None:
    _, documents = encoded(OFF)
    text = coloured(documents[0], ENCODER, 7)
    green = [text.plain[s.start : s.end] for s in text.spans if "green" in str(s.style)]
    assert green == ["⟦2 it is<|eot_id|>⟧"]


def test_the_command(files: tuple[Path, Path]) -> None:
    run = CliRunner()
    words = ["data", "audit", str(files[0]), "--tokenizer", str(files[1])]
    told = run.invoke(app, [*words, "--row", "2", "--row", "3"])
    assert told.exit_code == 1
    assert "⟦2 it is<|eot_id|>⟧" in told.stdout and "row 3 is refused: a thought" in told.stdout
    assert "refused  no messages  [1: rows 4]" in told.stdout
    found = run.invoke(app, [*words, "--json", "--limit", "2"])
    assert found.exit_code == 0 and json.loads(found.stdout)["clean"] is True
    for wrong in (["--turns", "some"], ["--row", "99"], ["--tokenizer", str(files[1] / "no")]):
        assert run.invoke(app, [*words, *wrong]).exit_code == 2
    absent = run.invoke(app, ["data", "audit", "no.jsonl", "--tokenizer", str(files[1])])
    assert absent.exit_code == 2


@pytest.mark.parametrize(
    ("name", "tokenizer", "switch"),
    [
        ("nemotron_schema/gsm8k_train_500_on_off.jsonl", "llama3", "detailed thinking"),
        ("nemotron_schema/gsm8k_train_500_on_off.jsonl", "minimind_6400", "open_thinking"),
        ("sft_small/modelopt/synthetic_conversations_1k.jsonl", "llama3", "/no_think"),
        ("sft_small/llamafactory/glaive_toolcall_en_demo.json", "llama3", "detailed thinking"),
    ],
)
def test_real_sets_are_clean(shared: Path, name: str, tokenizer: str, switch: str) -> None:
    from tessera.data.tokenizer import load_tokenizer

    made = load_tokenizer(shared / "data" / "tokenizers" / tokenizer)
    report = audit(shared / "data" / name, ChatEncoder.of(made, switch=switch), limit=400)
    assert report.clean, report.lines()
