"""Calls of tools in the dialects of chat templates, whole and in pieces."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tessera.data.calls import (
    BUILT_IN,
    HERMES,
    LLAMA3,
    MARKED,
    MISTRAL,
    PYTHON_TAG,
    CallReader,
    dialects_of,
    read,
)
from tessera.data.template import LLAMA3 as OWN_TEMPLATE

BARE = (LLAMA3, PYTHON_TAG)
F, G = ("f", {"a": 1}), ("g", {})
HELD = {"code": "if x: '</tool_call>' \n", "list": [1.5, None, {"b": "]"}], "é": "東京"}
TEXTS: list[tuple[Any, str, str, list[Any]]] = [
    (BUILT_IN, '<TOOLCALL>[{"name": "f", "arguments": {"a": 1}}, {"name": "g"}]</TOOLCALL>', "",
     [F, G]),
    (BUILT_IN, 'a <TOOLCALL>[{"name": "f", "arguments": {"a": 1}}]</TOOLCALL> b', "a  b", [F]),
    (BUILT_IN, '<TOOLCALL>[{"name": "f", "arguments": {"a": 1}}]', "", [F]),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [F]),
    (HERMES, 'Yes.\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n<tool_call>\n'
     '{"name": "g", "arguments": {}}\n</tool_call>', "Yes.\n", [F, G]),
    (HERMES, f'<tool_call>{json.dumps({"name": "f", "arguments": HELD})}</tool_call>', "",
     [("f", HELD)]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [F]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"t": "two\nlines"}}</tool_call>', "",
     [("f", {"t": "two\nlines"})]),
    (HERMES, '<tool_call>{"function": {"name": "f", "arguments": {"a": 1}}}</tool_call>', "", [F]),
    (HERMES, '<tool_call>{"name": "g", "arguments": null}</tool_call>', "", [G]),
    (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g"}]', "", [F, G]),
    (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}] x', " x", [F]),
    (MISTRAL, '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g[ARGS]{}', "", [F, G]),
    (BARE, '{"name": "f", "parameters": {"a": 1}}', "", [F]),
    (BARE, '<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
     "", [F, G]),
    (BARE, '{"type": "function", "name": "f", "parameters": {"a": 1}}', "", [F]),
    (BARE, 'See: {"name": "f", "parameters": {"a": 1}}', "See: ", [F]),
    # What is no call stays text.
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": tru</tool_call> x', None, []),
    (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', None, []),
    (HERMES, '<tool_call>{"arguments": {}}</tool_call>', None, []),
    (HERMES, "the tag <tool_call> opens a call", None, []),
    (HERMES, '{"name": "f", "parameters": {}}', None, []),
    (BUILT_IN, "<TOOLCALL>[]</TOOLCALL>", None, []),
    (MISTRAL, "[TOOL_CALLS] means calls, as [TOOL_CALLS] does", None, []),
    (BARE, 'JSON: {"a": 1}, code: {x}, {"name": "Ann", "age": 5, "parameters": 3} {', None, []),
    (MARKED, " \n ", None, []),
]  # fmt: skip


@pytest.mark.parametrize(("dialects", "text", "left", "calls"), TEXTS, ids=lambda v: str(v)[:30])
def test_calls_are_read_and_text_around_them_is_kept(
    dialects: Any, text: str, left: str | None, calls: list[Any]
):
    dialects = dialects if isinstance(dialects[0], tuple) else (dialects,)
    left = text if left is None else left
    assert read(text, dialects) == (left, calls)
    chance = random.Random(0)
    for _ in range(30):
        reader, said, at = CallReader(dialects), "", 0
        while at < len(text):
            size = chance.randint(1, 7)
            said, at = said + reader.push(text[at : at + size]), at + size
        assert (said + reader.flush(), reader.calls) == (left, calls)


@pytest.mark.parametrize(
    ("source", "dialects"),
    [
        (OWN_TEMPLATE, (BUILT_IN,)),
        ('{{- \'<tool_call>\\n{"name": "\' }}{{- tool_call.name }}', (HERMES,)),
        ('{{- "[TOOL_CALLS] [" }}{{- tool_calls|tojson }}', (MISTRAL,)),
        ('{{- \'{"name": function name, "parameters": dictionary of argument\' }}', BARE),
        ('{{- "<|python_tag|>" + tool_call.name + ".call(" }}', BARE),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", MARKED),
    ],
)
def test_the_dialect_is_the_templates(source: str, dialects: Any):
    assert dialects_of(source) == dialects


def test_text_is_given_out_as_soon_as_it_cannot_be_a_call():
    reader = CallReader([HERMES])
    assert [reader.push(piece) for piece in ("a <", "b <tool", "_x")] == ["a ", "<b ", "<tool_x"]
    bare = CallReader(BARE)
    assert bare.push('{"answer": "a long object') == '{"answer": "a long object'
