"""A model is asked as transformers asks it: the same ids, for templates of every kind."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tessera.data.chat import ChatEncoder
from tessera.data.conversation import tidy
from tessera.data.switch import (
    DETAILED,
    NONE,
    SwitchError,
    record_switch,
    requested,
    set_switch,
    switch_of_model,
)
from tessera.data.template import Template, TemplateError, template_of
from tessera.data.tokenizer import load_tokenizer, train_bpe
from tessera.serve.prepare import Limits, Preparer
from tessera.serve.session import ChatRequest
from tests.cases.prompt_templates import QWEN3, TEMPLATES

transformers = pytest.importorskip("transformers")

MARKS = (
    "<s> </s> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> [INST] "
    "[/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] <start_of_turn> <end_of_turn> "
    "<|User|> <|Assistant|>"
).split()
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'How it is at a "place" <é> & more',
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "enum": ["Köln", "Paris"]}},
            "required": ["place"],
        },
    },
}
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "weather", "arguments": {"place": "Köln", "days": 2}},
}


def said(*turns: str, system: str | None = None) -> list[dict[str, Any]]:
    roles = ("user", "assistant") * len(turns)
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, *({"role": r, "content": t} for r, t in zip(roles, turns, strict=False))]


CALLED = [
    *said("How is Köln?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": '{"sun": true}'},
]
# name: what is passed to apply_chat_template beside add_generation_prompt.
TALKS: dict[str, dict[str, Any]] = {
    "question": {"conversation": said("What is 2+2?")},
    "system": {"conversation": said("What is 2+2?", system="Be brief.")},
    "system-empty": {"conversation": said("What is 2+2?", system="")},
    "turns": {"conversation": said("One?", "1", "Two?", " 2 \n", "Three?", system="Count.")},
    "turns-bare": {"conversation": said("One?", "1", "Two?")},
    "tools": {"conversation": said("How is Köln?"), "tools": [WEATHER]},
    "tools-system": {"conversation": said("Hi", system="Be brief."), "tools": [WEATHER, WEATHER]},
    "no-tools": {"conversation": said("How is Köln?"), "tools": None},
    "call": {"conversation": CALLED, "tools": [WEATHER]},
    "call-answered": {"conversation": [*CALLED, *said("", "Sunny.", "And Paris?")[1:]]},
    "thoughts": {"conversation": said("1?", "<think>\nhm\n</think>\n\n1", "2?")},
    "thoughts-apart": {
        "conversation": [
            *said("1?"),
            {"role": "assistant", "content": "1", "reasoning_content": "hm"},
            *said("2?"),
        ]
    },
    "thoughts-vllm": {
        "conversation": [
            *said("1?"),
            {"role": "assistant", "content": "1", "reasoning": "hm"},
            *said("2?"),
        ]
    },
    "mentions-think": {"conversation": said("1?", "The tag </think> ends a thought.", "Why?")},
    "mentions-open": {"conversation": said("1?", "It opens with <think> here.", "Why </think>?")},
    "on": {"conversation": said("1?"), "enable_thinking": True, "thinking": True},
    "off": {"conversation": said("1?"), "enable_thinking": False, "thinking": False},
    "date": {"conversation": said("1?"), "date_string": "1 Jan 1970"},
    "any-key": {"conversation": said("1?"), "tools_in_user_message": False, "tools": [WEATHER]},
    "documents": {"conversation": said("1?"), "documents": [{"title": "t", "text": "x"}]},
    "asks-of-no-think": {"conversation": said("What does the flag /no_think do in Qwen3?")},
    "no-think-system": {"conversation": said("1?", system="/no_think")},
    "no-think-inside": {"conversation": said("1?", system="Never say /no_think to others.")},
    "switch-words": {"conversation": said("1?", system="detailed thinking off\nBe brief.")},
    "odd": {"conversation": said(" {{ x }} {% raw %}\r\n\té\U0001f600 <b>&amp;</b> \u200b\ue000 ")},
    "spaces": {"conversation": said("  two  spaces\n\n", " a ", "\n")},
    "mark": {"conversation": said("<|im_end|> or <|eot_id|>", "no", "[INST]<s>!", system="a</s>b")},
    "mark-alone": {"conversation": said("<|im_end|>")},
    "mark-in-tool": {
        "conversation": said("Hi"),
        "tools": [{**WEATHER, "function": {**WEATHER["function"], "description": "<|im_end|>b"}}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer directory with the marks of all templates, and no template."""
    home = tmp_path_factory.mktemp("vocabulary")
    made = train_bpe(["the cat sat on the mat and thought of fish"], 280)
    made.tokenizer.add_special_tokens(MARKS)  # type: ignore[attr-defined]
    made.save(home)
    config = json.loads((home / "tokenizer_config.json").read_text())
    config |= {"bos_token": "<s>", "eos_token": "</s>"}
    (home / "tokenizer_config.json").write_text(json.dumps(config))
    return home


def named(*names: str) -> list[dict[str, str]]:
    return [{"name": name, "template": f"{name}!"} for name in names]


def write(vocabulary: Path, home: Path, template: str, others: Mapping[str, str] = {}) -> Path:
    home.mkdir(exist_ok=True)
    for file in vocabulary.iterdir():
        (home / file.name).write_bytes(file.read_bytes())
    (home / "chat_template.jinja").write_text(template)
    for name, source in others.items():
        (home / "additional_chat_templates").mkdir(exist_ok=True)
        (home / "additional_chat_templates" / f"{name}.jinja").write_text(source)
    return home


@pytest.fixture(scope="module")
def models(
    vocabulary: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Any, Any]]:
    """(our encoder, transformers' tokenizer) of each template."""
    root = tmp_path_factory.mktemp("templates")
    found = {}
    for name, (template, others, _) in TEMPLATES.items():
        home = write(vocabulary, root / name, template, others)
        peer = transformers.PreTrainedTokenizerFast.from_pretrained(str(home))
        found[name] = ChatEncoder.of(load_tokenizer(home), today=True), peer
    return found


def theirs(peer: Any, talk: Mapping[str, Any], **more: Any) -> Any:
    """What transformers makes of a conversation: ids, or the error. Typed marks are text."""
    given = copy.deepcopy(dict(talk)) | {"add_generation_prompt": True} | more
    messages = [one for one in given["conversation"] if one["role"] != "assistant"]
    written = json.dumps([messages, given.get("tools")], ensure_ascii=False)
    if more.get("tokenize", True):
        added = [one.content for one in peer.added_tokens_decoder.values() if one.special]
        given["sanitize_control_tokens"] = any(mark in written for mark in added)
    try:
        return peer.apply_chat_template(**given, return_dict=False)
    except Exception as error:
        return type(error).__name__


def ours(encoder: ChatEncoder, talk: Mapping[str, Any], mode: Any = None) -> Any:
    variables = {k: v for k, v in talk.items() if k not in ("conversation", "tools")}
    messages = tidy(copy.deepcopy(talk["conversation"]))
    try:
        return encoder.prompt(messages, mode, talk.get("tools") or (), variables)
    except TemplateError:
        return "TemplateError"


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers(name: str, talk: str, models: Any) -> None:
    if (name, talk) == ("smollm3", "mark-in-tool"):
        pytest.skip("transformers' own markers are escaped by the template's `string` filter")
    encoder, peer = models[name]
    wanted = theirs(peer, TALKS[talk])
    found = ours(encoder, TALKS[talk])
    if isinstance(wanted, str):
        assert isinstance(found, str), f"transformers refuses with {wanted}"
    else:
        assert found == wanted


@pytest.mark.parametrize("talk", [t for t in TALKS if not t.startswith("mark")])
@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_are_those_of_transformers(name: str, talk: str, models: Any) -> None:
    encoder, peer = models[name]
    given = {k: v for k, v in TALKS[talk].items() if k != "conversation"}
    wanted = theirs(peer, TALKS[talk], tokenize=False)
    try:
        found = encoder.template.render(
            copy.deepcopy(TALKS[talk]["conversation"]), add_generation_prompt=True, **given
        )
    except TemplateError:
        found = "TemplateError"
    assert found == wanted or (found == "TemplateError" and wanted.endswith("Error"))


@pytest.mark.parametrize("which", ["minimind_6400", "tiny_llama3_style", "TEST_MODEL"])
def test_ids_of_real_tokenizers(which: str, request: Any) -> None:
    if which.isupper():
        if which not in os.environ:
            pytest.skip("TEST_MODEL names no directory of an instruct model")
        home = Path(os.environ[which])
    else:
        home = request.getfixturevalue("shared") / "data" / "tokenizers" / which
    encoder = ChatEncoder.of(load_tokenizer(home), today=True)
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(str(home))
    for name, talk in TALKS.items():
        wanted, found = theirs(peer, talk), ours(encoder, talk)
        assert isinstance(found, str) if isinstance(wanted, str) else found == wanted, name


@pytest.mark.parametrize(
    "change",
    [
        {"bos_token": None},
        {"bos_token": {"content": "</s>", "lstrip": False, "__type": "AddedToken"}},
        {"chat_template": named("default", "rag")},
        {"chat_template": named("tool_use", "default")},
        {"chat_template": named("tool_use")},
        {"chat_template": "{{ bos_token }}{{ unk_token }}{{ messages[0].content }}"},
    ],
)  # fmt: skip
def test_tokenizer_config_is_read_as_transformers_does(
    change: dict[str, Any], vocabulary: Path, tmp_path: Path
) -> None:
    home = write(vocabulary, tmp_path / "model", "{{ bos_token }}|{{ messages[0].content }}")
    if "chat_template" in change:
        (home / "chat_template.jinja").unlink()
    config = json.loads((home / "tokenizer_config.json").read_text()) | change
    (home / "tokenizer_config.json").write_text(json.dumps(config))
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(str(home))
    for talk in ("question", "tools"):
        wanted = theirs(peer, TALKS[talk])
        try:
            found = ours(ChatEncoder.of(load_tokenizer(home)), TALKS[talk])
        except TemplateError:
            found = "TemplateError"
        assert isinstance(found, str) if isinstance(wanted, str) else found == wanted


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_switch_is_guessed_from_the_template(name: str, models: Any) -> None:
    encoder, _ = models[name]
    assert encoder.switch == TEMPLATES[name][2] and encoder.default is None


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_model_is_given_no_switch_that_it_has_not(name: str, models: Any) -> None:
    encoder, _ = models[name]
    asked = {mode: ours(encoder, TALKS["question"], mode) for mode in ("on", "off", None)}
    if encoder.switch == NONE:
        assert asked["on"] == asked["off"] == asked[None]
    else:
        assert asked["on"] != asked["off"]
        assert asked[None] in (asked["on"], asked["off"])  # the template's own default


def test_the_recorded_switch_goes_before_the_template(vocabulary: Path, tmp_path: Path) -> None:
    home = write(vocabulary, tmp_path / "model", QWEN3)
    record_switch(home, DETAILED)
    encoder = ChatEncoder.of(load_tokenizer(home))
    assert (encoder.switch, encoder.default) == (DETAILED, "off")
    load_tokenizer(home).save(tmp_path / "copy")
    assert ChatEncoder.of(load_tokenizer(tmp_path / "copy")).switch == DETAILED
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "copy"))
    messages = said("Hi", system="detailed thinking off")
    assert encoder.prompt(said("Hi"), "off") == peer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert ChatEncoder.of(load_tokenizer(home), switch=NONE).prompt(said("Hi"), "on") == (
        ChatEncoder.of(load_tokenizer(home), switch=NONE).prompt(said("Hi"), None)
    )
    with pytest.raises(TemplateError, match="no variable reasoning; it reads enable_thinking"):
        ChatEncoder.of(load_tokenizer(home), switch="reasoning")


@pytest.mark.parametrize(
    ("source", "switch"),
    [
        ("{{ enable_thinking }}", "enable_thinking"),
        ("{% set thinking = thinking | default(true) %}{{ thinking }}", "thinking"),
        ("{% if x %}{% set thinking = 1 %}{% endif %}{{ thinking }}", "none"),
        ("{% for m in messages %}{% set thinking = m.content %}{{ thinking }}{% endfor %}", "none"),
        ("{% if '/no_think' in messages[0].content %}{% endif %}", "/no_think"),
        ("{{ reasoning_effort }}", "none"),
        ("plain", "none"),
    ],
)  # fmt: skip
def test_which_variable_is_a_switch(source: str, switch: str) -> None:
    assert switch_of_model(None, Template(source, {})) == switch


@pytest.mark.parametrize(
    ("messages", "given", "mode"),
    [
        (said("What does the flag /no_think do in Qwen3?"), {}, None),
        (said("Explain this. /no_think"), {}, "off"),
        (said("Explain /think"), {}, "on"),
        (said("Explain /no_thinking"), {}, None),
        (said("/usr/think"), {}, None),
        (said("a /no_think", "b", "c"), {}, None),
        (said("c", system="/no_think"), {}, "off"),
        (said("c /think", system="/no_think"), {}, "on"),
        (said("c /think"), {"enable_thinking": False}, "off"),
        (said("c"), {"reasoning_effort": "minimal"}, "off"),
        (said("c"), {"reasoning_effort": "high"}, "on"),
        (said("c"), {"reasoning_effort": "none", "enable_thinking": True}, "on"),
        (said("c", system="detailed thinking off"), {}, "off"),
        ([{"role": "user", "content": [{"type": "text", "text": "c /no_think"}]}], {}, "off"),
    ],
)
def test_who_asks_for_a_mode(messages: Any, given: dict[str, Any], mode: str | None) -> None:
    messages = tidy(messages)
    kept = copy.deepcopy(messages)
    assert requested(messages, DETAILED, **given) == mode
    assert requested(messages, NONE, **given) is None
    assert messages == kept


@pytest.mark.parametrize("given", [{"reasoning_effort": "huge"}, {"enable_thinking": "false"}])
def test_a_mode_that_is_none_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(SwitchError, match="huge|'false'"):
        requested(said("c"), DETAILED, **given)


def test_what_the_system_prompt_says_of_the_mode_already_stays_as_it_is() -> None:
    messages = said("c", system="detailed thinking on\nBe brief. ")
    assert set_switch(messages, "on", DETAILED) == (messages, {})
    assert (
        set_switch(messages, None, DETAILED) == set_switch(messages, "off", NONE) == (messages, {})
    )
    assert set_switch(messages, "off", DETAILED)[0] == said(
        "c", system="detailed thinking off\n\nBe brief."
    )
    quiet = said("c", system="Be brief. /no_think")
    assert set_switch(quiet, "off", "/no_think") == (quiet, {})


# name of the template, the request, what transformers' apply_chat_template is given
SERVED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("chatml", {"messages": said("Hi")}, {"conversation": said("Hi")}),
    ("qwen2.5", {"messages": said("Hi /no_think")}, {"conversation": said("Hi /no_think")}),
    ("mistral0.1", {"messages": said("Hi")}, {"conversation": said("Hi")}),
    (
        "qwen3",
        {"messages": said("Hi"), "chat_template_kwargs": {"enable_thinking": False}},
        {"conversation": said("Hi"), "enable_thinking": False},
    ),
    (
        "qwen3",
        {"messages": said("Hi"), "reasoning_effort": "none"},
        {"conversation": said("Hi"), "enable_thinking": False},
    ),
    ("qwen3", {"messages": said("Hi")}, {"conversation": said("Hi")}),
    (
        "qwen3",
        {"messages": said("Hi", system="/no_think")},
        {"conversation": said("Hi", system="/no_think"), "enable_thinking": False},
    ),
    (
        "qwen3",
        {"messages": said("Hi", system="detailed thinking on"), "reasoning_effort": "low"},
        {"conversation": said("Hi", system="detailed thinking on"), "enable_thinking": True},
    ),
    (
        "qwen3",
        {"messages": said("Hi", system="detailed thinking off")},
        {"conversation": said("Hi", system="detailed thinking off")},
    ),
    (
        "deepseek",
        {"messages": said("Hi"), "chat_template_kwargs": {"thinking": True}},
        {"conversation": said("Hi"), "thinking": True},
    ),
    (
        "llama3.1",
        {"messages": said("Hi"), "chat_template_kwargs": {"date_string": "1 May 2025"}},
        {"conversation": said("Hi"), "date_string": "1 May 2025"},
    ),
    ("llama3.2", {"messages": said("Hi")}, {"conversation": said("Hi")}),
    (
        "mistral0.3",
        {"messages": CALLED, "tools": [WEATHER]},
        {"conversation": CALLED, "tools": [WEATHER]},
    ),
    (
        "hermes",
        {"messages": said("Hi"), "tools": [WEATHER], "tool_choice": "auto"},
        {"conversation": said("Hi"), "tools": [WEATHER]},
    ),
    (
        "hermes",
        {"messages": said("Hi"), "tools": [WEATHER], "tool_choice": "none"},
        {"conversation": said("Hi")},
    ),
    (
        "qwen2.5",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}]},
        {"conversation": said("a\nb")},
    ),
    (
        "nemotron",
        {"messages": said("Hi", system="detailed thinking on\nBe brief.")},
        {"conversation": said("Hi", system="detailed thinking on\nBe brief.")},
    ),
    ("nemotron", {"messages": said("Hi")}, {"conversation": said("Hi")}),
    (
        "nemotron",
        {"messages": said("Hi"), "chat_template_kwargs": {"enable_thinking": False}},
        {"conversation": said("Hi", system="detailed thinking off"), "enable_thinking": False},
    ),
    (
        "nemotron1.5",
        {"messages": said("What does the flag /no_think do?"), "reasoning_effort": "none"},
        {"conversation": said("What does the flag /no_think do?", system="/no_think")},
    ),
]


@pytest.mark.parametrize(("name", "request_", "given"), SERVED)
def test_a_server_asks_as_transformers_does(
    name: str, request_: dict[str, Any], given: dict[str, Any], models: Any
) -> None:
    encoder, peer = models[name]
    served = object.__new__(Preparer)  # its own reads the tokenizer of a directory
    served.tokenizer, served.switch = encoder.tokenizer, None
    served.limits = Limits(room=1 << 20, vocab_size=1 << 20, queue=1)
    asked = ChatRequest.model_validate(copy.deepcopy(request_))
    assert served._chat(asked).prompts == [theirs(peer, given)]


def test_variables_of_a_request_cannot_be_messages(models: Any) -> None:
    encoder, _ = models["qwen3"]
    with pytest.raises(TemplateError, match="cannot set messages"):
        encoder.prompt(said("c"), None, (), {"messages": []})


def test_a_date_of_a_run_is_fixed(models: Any) -> None:
    encoder, _ = models["llama3.2"]
    fixed = template_of(encoder.tokenizer).render(said("c"))
    assert "26 Jul 2024" in fixed and fixed != encoder.template.render(said("c"))
