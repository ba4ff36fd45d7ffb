"""Chat rows as people have them: what of each is trained, and behind which prompt."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tessera.cli.main import app
from tessera.data.audit import audit
from tessera.data.chat import ChatError
from tessera.data.conversation import FIELDS, SchemaError, misnamed
from tessera.data.dialects import KEYS, read_row, write_row
from tessera.data.readers import DataError
from tessera.data.template import Template
from tests.cases.chat_tokenizers import CHATML, made
from tests.data.test_schema import mutated

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
    last, answer = documents[-1], tokenizer.ids(wanted[-1] + tokenizer.end)
    mask = [False] + [True] * len(answer)
    assert last.ids == asked + answer and last.trained[-len(mask) :] == mask


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


CALL = {"type": "function", "function": {"name": "get", "arguments": {"city": "Paris"}}}
TALK = {
    "messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "Wait.", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "done"},
    ]
}
# SmolLM2's, with something said behind the content of a turn.
SAYING = CHATML.replace("message['content'] +", "message['content'] }}MORE{{")
CALLS = "{% for call in message.tool_calls %}{{ call.function | tojson }}{% endfor %}"
NO_TOOLS = "{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
DROPPING = "{% for message in messages if message.role != 'tool' %}"


@pytest.mark.parametrize(
    ("source", "refusal"),
    [
        (CHATML, "leaves out the names of called tools"),
        (SAYING.replace("MORE", CALLS), None),
        (SAYING.replace("MORE", CALLS.replace(" | tojson", ".name")), "leaves out the arguments"),
        (SAYING.replace("MORE", CALLS.replace(" | tojson", ".arguments")), "leaves out the names"),
        (SAYING.replace("MORE", CALLS + NO_TOOLS), "refuses the conversation: no tools"),
        (
            SAYING.replace("MORE", CALLS).replace("{% for message in messages %}", DROPPING),
            "leaves out what tools gave back",
        ),
    ],
)
def test_calls_and_results_that_a_template_cannot_say(source: str, refusal: str | None) -> None:
    """Each would train an answer that says nothing, or one to a question nobody asked."""
    encoder = made("chatml").encoder()
    encoder = replace(encoder, template=Template(source, encoder.template.specials))
    if refusal:
        with pytest.raises(ChatError, match=refusal):
            encoder.encode(read_row(TALK))
    else:
        (document,) = encoder.encode(read_row(TALK))
        first, last = made("chatml").trained([document])
        assert '"Paris"' in first and last == "done"


def test_weights_where_the_template_marks_what_the_model_wrote() -> None:
    marked = """{%- for message in messages %}{%- if message.role == "assistant" %}{{- "A:" }}\
{% generation %}{{- message.content + "<|im_end|>" }}{%- endgeneration %}\
{%- else %}{{- message.role + ": " + message.content + "\n" }}{%- endif %}{%- endfor %}"""
    encoder = made("chatml").encoder()
    encoder = replace(encoder, template=Template(marked, encoder.template.specials))
    turns = [("q1", "a1", 1), ("q2", "bad", 0), ("q3", "a3", 1), ("q4", "worse", 0)]
    messages: list[dict[str, Any]] = []
    for question, answer, weight in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer, "weight": weight})
    documents = encoder.encode(read_row({"messages": messages}))
    assert made("chatml").trained(documents) == ["a1", "a3"]


def test_the_last_turn_alone_is_none_where_it_has_weight_0() -> None:
    row = next(case["row"] for case in CASES if case["why"] == "the last answer has weight 0")
    with pytest.raises(ChatError, match='turns = "last" trains no other'):
        made("chatml").encoder(turns="last").encode(read_row(row))


def test_a_file_of_misspelled_rows_is_told_at_its_first_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"mesages": []}\n' * 3)
    with pytest.raises(DataError, match='rows.jsonl:1 .*"mesages" is near "messages"'):
        audit(file, made("chatml").encoder())


def test_rows_with_something_broken_are_read_or_told_why() -> None:
    rng, encoder, read = random.Random(0), made("builtin").encoder(), []
    for _ in range(4000):
        row = mutated(rng, rng.choice(CASES)["row"])
        try:
            read.append(read_row(row))
        except SchemaError as error:
            assert str(error)
    assert all(read_row(write_row(chat)) == chat for chat in read if "NaN" not in chat.to_json())
    found = encoder.encode_batch(read)
    assert len(read) > 800 and sum(isinstance(one, list) for one in found) > 200


def test_names_that_are_no_misspelling_are_not_told() -> None:
    usual = "prompt_id source category license id score turn lang model used_in_training version"
    assert misnamed(usual.split(), KEYS) == ""
    usual = "id name label tool_call_id refusal annotations prefix function lang score type"
    assert misnamed(usual.split(), FIELDS) == ""


RECIPE = """
[data]
tokenizer = { bpe = 300, chat = true }
paths = "FILE"
format = "FORMAT"
"""


@pytest.mark.parametrize(
    ("format", "rows", "says"),
    [
        ("chat", [{"mesages": []}], '"mesages" is near "messages"'),
        ("chat", [{"conversation": []}], '"conversation" is near "conversations"'),
        ("chat", [{"prompt": "q", "respone": "a"}], '"respone" is near "response"'),
        (
            "chat",
            [{"prompt": "q", "response": "a", "resoning": "on"}],
            '"resoning" is near',
        ),
        ("chat", [{"prompt": "q", "answer": "a"}] * 3 + [{"prompt": "q"}], "[1: rows 4]"),
        ("completion", [{"prompt": "q", "complete": "a"}], "no texts `prompt` and `completion`"),
        ("completion", [{"promt": "q", "completion": "a"}], '"promt" is near "prompt"'),
        ("jsonl", [{"story": "a"}], 'no field "text"; it has: story'),
    ],
)
def test_check_finds_fields_of_a_wrong_name(
    format: str, rows: list[dict[str, Any]], says: str, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = RECIPE.replace("FILE", str(tmp_path / "rows.jsonl")).replace("FORMAT", format)
    (tmp_path / "recipe.toml").write_text(text)
    run = CliRunner().invoke(app, ["check", str(tmp_path / "recipe.toml"), "--json"])
    assert run.exit_code == 0, run.output
    (step,) = json.loads(run.stdout)
    assert any(says in warning for warning in step["warnings"]), step["warnings"]
