"""Chat templates: Jinja as Hugging Face's tokenizers carry it, rendered in a sandbox.

A template sees what transformers gives it, but its clock stands still: rendering is a function.
The built-in one is Llama 3's with Llama-Nemotron's additions: an answer of the history loses its
thought, by the rule of thought.py, and tools are listed and called as JSON between tags.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tessera.data.conversation import Message
from tessera.data.tokenizer import Tokenizer

FILE = "chat_template.jinja"
STILL = datetime(2024, 7, 26)  # what Llama 3.1's own template falls back to
# Private characters around what stands in {% generation %}; they are taken out of the text again.
_BEGIN, _END = "\U0010fff0", "\U0010fff1"
LLAMA3 = """\
{%- macro turn(role, text) %}
    {{- "<|start_header_id|>" + role + "<|end_header_id|>\\n\\n" + text + "<|eot_id|>" }}
{%- endmacro %}
{{- bos_token }}
{%- set system = messages[0].content | trim if messages[0].role == "system" else "" %}
{%- if tools %}
    {%- set listed %}<AVAILABLE_TOOLS>{{ tools | tojson }}</AVAILABLE_TOOLS>{% endset %}
    {%- set system = system + "\\n\\n" + listed if system else listed %}
{%- endif %}
{%- if system %}{{ turn("system", system) }}{% endif %}
{%- for message in messages if message.role != "system" %}
    {%- set text = (message.content or "") | trim %}
    {%- if message.role == "assistant" %}
        {%- set head = text.split("</think>")[0] %}
        {%- set opened = "<think>" not in head and head != text or head.startswith("<think>") %}
        {%- if opened and message.reasoning_content is not string %}
            {%- set text = text.split("</think>")[1:] | join("</think>") | trim %}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- set calls %}
                {%- for call in message.tool_calls %}
                    {%- set call = call.function or call %}
                    {{- {"name": call.name, "arguments": call.arguments} | tojson }}
                    {{- "" if loop.last else ", " }}
                {%- endfor %}
            {%- endset %}
            {%- set text = text + "<TOOLCALL>[" + calls + "]</TOOLCALL>" %}
        {%- endif %}
    {%- endif %}
    {{- turn("ipython" if message.role == "tool" else message.role, text) }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""


class TemplateError(ValueError):
    """A template that is none, or that refuses a conversation; the text says why."""


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_BEGIN}{caller()}{_END}"


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Unlike Jinja's own filter, it does not write HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    return environment


@dataclass(frozen=True)
class Template:
    """One template with the special tokens it may name."""

    source: str
    specials: dict[str, str]

    @cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            return _environment().from_string(self.source)
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template is no Jinja: {error}") from error

    @property
    def marks_generation(self) -> bool:
        """Whether the template says itself what the model has written."""
        return bool(re.search(r"{%-?\s*generation\s*-?%}", self.source))

    @cached_property
    def variables(self) -> list[str]:
        """What the template reads beside what every template is given: `enable_thinking`, say."""
        try:
            tree = _environment().parse(self.source)
        except jinja2.TemplateError:
            return []
        read = meta.find_undeclared_variables(tree)
        read -= {node.name for node in tree.find_all(nodes.Name) if node.ctx == "store"}
        given = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now"}
        return sorted(read - given - set(self.specials) - {"raise_exception", "namespace"})

    def fingerprint(self) -> str:
        told = json.dumps([self.source, self.specials], sort_keys=True)
        return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """The text of a conversation. Raises TemplateError where the template refuses it."""
        return self.spans(messages, **{"add_generation_prompt": False, **variables})[0]

    def spans(
        self, messages: Sequence[Message], **variables: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """(the text, [start, stop) of each `{% generation %}` in it); variables: what it reads."""
        given = {"messages": list(messages), "strftime_now": STILL.strftime, **variables}
        given["tools"] = list(given.get("tools") or ()) or None
        try:
            marked = self._compiled.render(**self.specials, **given)
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
            raise TemplateError(f"the chat template refuses the conversation: {error}") from error
        text, spans, start = "", [], 0
        for piece in re.split(f"({_BEGIN}|{_END})", marked):
            if piece == _BEGIN:
                start = len(text)
            elif piece == _END:
                spans.append((start, len(text)))
            else:
                text += piece
        return text, spans


def template_of(tokenizer: Tokenizer) -> Template:
    """The tokenizer's own template, else the built-in one.

    Raises TemplateError where it has none and lacks the tokens of the built-in one.
    """
    specials = tokenizer.special_names()
    if (source := _own_source(tokenizer.home)) is not None:
        return Template(source, specials)
    lacking = [mark for mark in re.findall(r"<\|\w+\|>", LLAMA3) if not tokenizer.token_id(mark)]
    if lacking or "bos_token" not in specials:
        raise TemplateError(
            "the tokenizer has no chat template, and the built-in one needs the token "
            f"{(lacking or ['<bos>'])[0]}, which it lacks; name a tokenizer with a {FILE}, or "
            "train one with tokenizer = { bpe = N, chat = true }"
        )
    return Template(LLAMA3, specials)


def _own_source(home: Path | None) -> str | None:
    """The template in a tokenizer's directory: a file of its own, or a key of its config."""
    if home is None:
        return None
    if (home / FILE).is_file():
        return (home / FILE).read_text(encoding="utf-8")
    config = home / "tokenizer_config.json"
    found = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    source = found.get("chat_template")
    if isinstance(source, list):  # several by name
        named = {one["name"]: one["template"] for one in source}
        source = named.get("default", next(iter(named.values()), None))
    return source
