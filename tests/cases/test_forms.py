"""Answers of a given form: a random model's JSON parses and obeys its schema."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from tessera.data.calls import BUILT_IN, HERMES, LLAMA3, MISTRAL, read
from tessera.data.thought import split
from tessera.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from tessera.generate.engine import GenerationError, SamplingParams
from tessera.generate.grammar import Grammars, calls_rule, choice_rule, json_rule, regex_rule
from tessera.generate.text import TextStream, thinking_budget
from tessera.generate.token_bytes import TokenBytes
from tessera.generate.torch_engine import TorchEngine
from tests import tiny
from tests.cases.answering import TEXTS

llguidance = pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")
BPE = train_bpe(TEXTS * 8, 380, chat=True)


class Writer:
    """A random model that answers in a form."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        shape = tiny.config(
            tiny.PARENT,
            vocab_size=tokenizer.vocab_size + 5,  # padded, as checkpoints are
            eos_token_id=tokenizer.eos_ids,
            max_position_embeddings=4096,
        )
        self.tokenizer, self.engine = tokenizer, TorchEngine(tiny.model(shape))
        self.grammars = Grammars(tokenizer, shape.vocab_size)

    def write(self, *rules: str, seed: int = 0, thought: Any = "none", **more: Any) -> str:
        grammar = self.grammars.compile(rules, thought)
        ends = self.tokenizer.eos_ids
        params = SamplingParams(max_tokens=4000, seed=seed, stop_token_ids=ends, **more)
        handle = self.engine.submit([1], params, grammar=grammar)
        while self.engine.step():
            pass
        (one,) = handle.result()
        assert one.finish_reason == "stop"
        stream = TextStream(self.tokenizer, [1], opened=None, ends=ends)
        return (stream.push(one.token_ids) + stream.finish()).answer


@pytest.fixture(scope="module")
def writer() -> Writer:
    return Writer(BPE)


SCHEMAS: list[Any] = [
    {"type": "integer"},
    {"type": "number", "minimum": -1, "maximum": 1},
    {"type": "boolean"},
    {"type": "null"},
    {"enum": ["a", 1, None, "東京", 'say "x"']},
    {"const": {"a": [1]}},
    {"type": "string", "maxLength": 6},
    {"type": "string", "pattern": "^[a-c]{2}-[0-9]+$"},
    {"type": "string", "format": "date"},
    {"type": ["string", "null"], "maxLength": 4},
    {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 4},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "null"}], "items": False,
     "minItems": 2},
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}},
     "required": ["b"], "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 3,
     "properties": {"x": {"type": "boolean"}}, "required": ["x"]},
    {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "null"}, "maxItems": 2}]},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}},
               {"required": ["a"], "additionalProperties": False, "properties": {"a": True}}]},
    {"$defs": {"leaf": {"type": "object", "properties": {"v": {"enum": [1, 2]}},
                        "required": ["v"], "additionalProperties": False}},
     "type": "object", "properties": {"l": {"$ref": "#/$defs/leaf"}}, "required": ["l"],
     "additionalProperties": False},
    {"$ref": "#/$defs/list", "$defs": {"list": {"anyOf": [{"type": "null"}, {"type": "object",
     "properties": {"next": {"$ref": "#/$defs/list"}}, "required": ["next"],
     "additionalProperties": False}]}}},
    {"type": "object", "title": "T", "description": "d", "properties": {"k": {"const": "a",
     "default": "a", "examples": ["a"]}}, "required": ["k"], "additionalProperties": False},
    {"oneOf": [{"type": "object", "properties": {"k": {"const": kind}}, "required": ["k"],
                "additionalProperties": False} for kind in "ab"],
     "discriminator": {"propertyName": "k"}},
]  # fmt: skip


def some_schema(chance: random.Random, depth: int = 0) -> Any:
    """A random schema whose answers end soon."""
    kinds = ["integer", "boolean", "enum", "string"] + ["object", "array", "any"] * (depth < 3)
    kind = chance.choice(kinds)
    if kind == "enum":
        return {"enum": chance.sample(["x", "é", 1, 2.5, None, True, "a b"], 3)}
    if kind == "string":
        return {"type": "string", "maxLength": chance.randint(0, 8)}
    if kind == "array":
        return {"type": "array", "items": some_schema(chance, depth + 1), "maxItems": 3}
    if kind == "any":
        return {"anyOf": [some_schema(chance, depth + 1) for _ in range(2)]}
    if kind == "object":
        names = chance.sample(["a", "b c", "é", 'd"q', "name"], chance.randint(1, 4))
        parts = {name: some_schema(chance, depth + 1) for name in names}
        needed = chance.sample(names, chance.randint(0, len(names)))
        rest = {"required": needed, "additionalProperties": False}
        return {"type": "object", "properties": parts, **rest}
    return {"type": kind}


@pytest.mark.parametrize("number", range(len(SCHEMAS) + 20))
def test_a_random_models_json_obeys_the_schema(writer: Writer, number: int):
    chance = random.Random(number)
    schema = SCHEMAS[number] if number < len(SCHEMAS) else some_schema(chance)
    for seed in range(3):
        text = writer.write(json_rule(schema), seed=seed)
        jsonschema.validate(json.loads(text), schema)


def tokenizers(shared: Path) -> list[Tokenizer]:
    names = ("llama3", "minimind_6400")
    found = [load_tokenizer(shared / "data" / "tokenizers" / name) for name in names[1:]]
    return [byte_tokenizer(), *found, load_tokenizer(shared / "models" / "stories260k")]


def test_every_kind_of_vocabulary_writes_json(shared: Path):
    schema = SCHEMAS[16]
    for tokenizer in tokenizers(shared):
        writer = Writer(tokenizer)
        for seed in range(3):
            jsonschema.validate(json.loads(writer.write(json_rule(schema), seed=seed)), schema)


def test_bytes_of_tokens_join_to_the_text(shared: Path):
    text = "plain 東京タワー 👩🏽‍🚀 naïve\n\nx\ty {0123}"
    for tokenizer in [*tokenizers(shared), BPE]:
        known = TokenBytes(tokenizer)
        joined = b"".join(known.of(token) for token in tokenizer.encode(text))
        assert joined.decode().removeprefix(" ") == text


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "uniqueItems": True},
        {"not": {"type": "string"}},
        {"type": "nothing"},
        {"$ref": "#/nowhere"},
        {"type": "integer", "minimum": 3, "maximum": 1},
        {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        False,
    ],
    ids=str,
)
def test_what_cannot_be_promised_is_refused(writer: Writer, schema: Any):
    with pytest.raises(GenerationError, match="cannot be followed"):
        writer.write(json_rule(schema))


def test_regular_expressions_and_choices(writer: Writer):
    for seed in range(5):  # digits are ASCII, as in JSON Schema
        assert re.fullmatch(r"[a-c]{2}/\d+;", writer.write(regex_rule(r"[a-c]{2}/\d+;"), seed=seed))
        choices = ["yes", "no", 'a "b"\n', "東京"]
        assert writer.write(choice_rule(choices), seed=seed) in choices


TOOLS = [
    {"name": "weather", "parameters": {"type": "object", "properties": {"day": {"enum": [1, 2]}},
     "required": ["day"], "additionalProperties": False}},
    {"name": "stop", "description": "no parameters"},
]  # fmt: skip


@pytest.mark.parametrize("dialect", [BUILT_IN, HERMES, LLAMA3, MISTRAL], ids=lambda d: d.name)
def test_forced_calls_are_read_again(writer: Writer, dialect: Any):
    counts = set()
    for seed in range(4):
        text = writer.write(calls_rule(TOOLS, dialect), seed=seed)
        rest, calls = read(text, [dialect])
        assert not rest and calls
        for name, arguments in calls:
            assert name in ("weather", "stop")
            jsonschema.validate(arguments, TOOLS[0]["parameters"] if name == "weather" else {})
        counts.add(len(calls))
        one = read(writer.write(calls_rule(TOOLS, dialect, parallel=False), seed=seed), [dialect])
        assert len(one[1]) == 1
    assert len(counts) > 1


def test_a_thought_comes_first_and_the_form_behind_it(writer: Writer):
    rule = json_rule(SCHEMAS[12])
    for seed in range(4):
        budget = thinking_budget(BPE, 20, opened=True)
        text = writer.write(rule, seed=seed, thought="opened", thinking=budget)
        found = split(text, opened=True)
        assert found.thought and found.closed
        jsonschema.validate(json.loads(found.answer), SCHEMAS[12])
    known, budget = TokenBytes(BPE), thinking_budget(BPE, 5)
    tags = [i for i in range(BPE.vocab_size) if known.of(i).startswith(b"<")]
    for bias, ids in ((100.0, BPE.encode("<think>")), (-100.0, tags)):
        biased = tuple((token, bias) for token in ids)
        text = writer.write(rule, thought="may", thinking=budget, logit_bias=biased)
        assert (split(text).thought is not None) == (bias > 0)
        jsonschema.validate(json.loads(split(text).answer), SCHEMAS[12])
