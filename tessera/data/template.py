"""Chat templates: Jinja as Hugging Face's tokenizers carry it, rendered in a sandbox.

A template of others is rendered in a process of its own, which may take SECONDS and MIB of memory
for a conversation and write MAX_CHARACTERS.

A template sees what transformers gives it. Of several by name, `tool_use` is taken where tools are
given. The date is today's where somebody is answered, and fixed in runs, which are repeatable.
The built-in template is Llama 3's with Llama-Nemotron's additions: an answer of the history loses
its thought, by the rule of thought.py, and tools are listed and called as JSON between tags.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tessera.data.bounded import INSIDE, Bounded, LimitError
from tessera.data.conversation import Message
from tessera.data.tokenizer import TEMPLATES, Tokenizer
from tessera.runs.files import atomic_write

FILE = "chat_template.jinja"
SECONDS, MIB, MAX_CHARACTERS = 20.0, 1024, 2**26  # that one conversation may take
RUN_DATE = datetime(2024, 7, 26)  # what Llama 3.1's own template falls back to
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names of a message's thought
RESERVED = ("messages", "add_generation_prompt", "tools")  # no variables of a request
# Private characters around what stands in {% generation %}; they are taken out of the text again.
_BEGIN, _END = "\U0010fff0", "\U0010fff1"
_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
_WRONG = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_DEFINED = ("defined", "undefined", "default", "d")
_NAMED_TOKENS = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
LLAMA3 = """\
{%- macro turn(role, text) %}
    {{- "<|start_header_id|>" + role + "<|end_header_id|>\\n\\n" + text + "<|eot_id|>" }}
{%- endmacro %}
{{- bos_token }}
{%- set system = messages[0].content | trim if messages[0].role == "system" else "" %}
{%- if tools %}
    {%- set listed %}
        {{- "<AVAILABLE_TOOLS>[" }}
        {%- for tool in tools %}
            {{- (tool.function or tool) | tojson }}{{ "" if loop.last else ", " }}
        {%- endfor %}
        {{- "]</AVAILABLE_TOOLS>" }}
    {%- endset %}
    {%- set system = system + "\\n\\n" + listed if system else listed %}
{%- endif %}
{%- if system %}{{ turn("system", system) }}{% endif %}
{%- for message in messages if message.role != "system" %}
    {%- set text = (message.content or "") | trim %}
    {%- if message.role == "assistant" %}
        {%- if text.startswith("<think>") and message.reasoning_content is not string %}
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


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter: unlike Jinja's own, it does not write HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    return environment


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise TemplateError(f"the chat template is no Jinja: {error}") from error


def _render(source: str, given: dict[str, Any]) -> str:
    try:
        pieces, size = [], 0
        for piece in _compiled(source).generate(**given):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_CHARACTERS:
                raise LimitError(f"it writes over {MAX_CHARACTERS:,} characters")
        return "".join(pieces)
    except LimitError:
        raise
    except (jinja2.TemplateError, *_WRONG) as error:
        raise TemplateError(f"the chat template refuses the conversation: {error}") from error


def renderer() -> Callable[[str, dict[str, Any]], str]:
    return _render


_elsewhere = Bounded(f"{__name__}:renderer", (), SECONDS, MIB)


@dataclass(frozen=True)
class Template:
    """One template with the special tokens it may name.

    named: the others of its tokenizer, by name. date: what `strftime_now` writes, None for today.
    """

    source: str
    specials: dict[str, str]
    named: Mapping[str, str] = field(default_factory=dict)
    date: datetime | None = RUN_DATE

    @property
    def marks_generation(self) -> bool:
        """Whether the template says itself what the model has written."""
        return bool(_GENERATION.search(self.source))

    @property
    def reads_date(self) -> bool:
        return any("strftime_now" in source for source in (self.source, *self.named.values()))

    @cached_property
    def variables(self) -> list[str]:
        """What the template reads beside what every template is given: `enable_thinking`, say.

        A name that it also sets is one of them where it asks whether the name is defined.
        """
        try:
            tree = _environment().parse(self.source)
        except (jinja2.TemplateError, RecursionError):
            return []
        asking = (*tree.find_all(nodes.Test), *tree.find_all(nodes.Filter))
        tests = [one.node for one in asking if one.name in _DEFINED]
        asked = {node.name for node in tests if isinstance(node, nodes.Name)}
        read = meta.find_undeclared_variables(tree)
        read -= {node.name for node in tree.find_all(nodes.Name) if node.ctx == "store"} - asked
        given = {*RESERVED, "documents", "strftime_now", "raise_exception", "namespace"}
        return sorted(read - given - set(self.specials) - set(_NAMED_TOKENS))

    def fingerprint(self) -> str:
        told = json.dumps([self.source, self.specials, *sorted(self.named.items())], sort_keys=True)
        return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """The text of a conversation. Raises TemplateError where the template refuses it."""
        return self.spans(messages, **{"add_generation_prompt": False, **variables})[0]

    def spans(
        self, messages: Sequence[Message], **variables: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """(the text, [start, stop) of each `{% generation %}` in it); variables: what it reads."""
        tools = [_wrapped(tool) for tool in variables.get("tools") or ()] or None
        source = self.named.get("tool_use", self.source) if tools else self.source
        given = {"documents": None, "strftime_now": self._strftime, **variables, "tools": tools}
        given["messages"] = [_with_thought(message) for message in messages]
        given = {**self.specials, **given}
        try:
            ours = source == LLAMA3 or INSIDE in os.environ
            marked = _render(source, given) if ours else _elsewhere(source, given)
        except LimitError as error:
            raise TemplateError(f"the chat template was stopped: {error}") from None
        if not _GENERATION.search(source):
            return marked, []
        text, spans, start = "", [], 0
        for piece in re.split(f"({_BEGIN}|{_END})", marked):
            if piece == _BEGIN:
                start = len(text)
            elif piece == _END:
                spans.append((start, len(text)))
            else:
                text += piece
        return text, spans

    def _strftime(self, format: str) -> str:
        return (self.date or datetime.now()).strftime(format)

    def save(self, directory: Path) -> None:
        """Writes the template files of a tokenizer's directory."""
        atomic_write(directory / FILE, self.source)
        if self.named:
            (directory / TEMPLATES).mkdir(exist_ok=True)
        for name, source in self.named.items():
            atomic_write(directory / TEMPLATES / f"{name}.jinja", source)


def _wrapped(tool: Any) -> Any:
    """A tool as OpenAI's object, which templates expect; rows of data hold a function bare."""
    bare = isinstance(tool, dict) and "function" not in tool and isinstance(tool.get("name"), str)
    return {"type": "function", "function": tool} if bare else tool


def _with_thought(message: Message) -> Message:
    """A message whose thought stands under the names that templates read, as in transformers."""
    thought = next((message[name] for name in THOUGHTS if message.get(name) is not None), None)
    if thought is None:
        return dict(message)
    return {"thinking": thought, **message, "reasoning_content": thought}


def template_of(tokenizer: Tokenizer, *, today: bool = False) -> Template:
    """The tokenizer's own template, else the built-in one. today: the date is not a run's.

    Raises TemplateError where it has none and lacks the tokens of the built-in one.
    """
    specials, date = tokenizer.special_names(), None if today else RUN_DATE
    if sources := _own_sources(tokenizer.home):
        names = " and ".join(sorted(sources))
        lacking = f"the tokenizer names {names} and no default; copy the one to take to {FILE}"
        default = sources.pop("default", f"{{{{ raise_exception('{lacking}') }}}}")
        return Template(default, specials, sources, date)
    lacking = [mark for mark in re.findall(r"<\|\w+\|>", LLAMA3) if not tokenizer.token_id(mark)]
    if lacking or "bos_token" not in specials:
        raise TemplateError(
            "the tokenizer has no chat template, and the built-in one needs the token "
            f"{(lacking or ['<bos>'])[0]}, which it lacks; name a tokenizer with a {FILE}, or "
            "train one with tokenizer = { bpe = N, chat = true }"
        )
    return Template(LLAMA3, specials, {}, date)


def _own_sources(home: Path | None) -> dict[str, str]:
    """The templates in a tokenizer's directory by name: its files, else a key of its config."""
    if home is None:
        return {}
    files = {path.name.removesuffix(".jinja"): path for path in home.glob(f"{TEMPLATES}/*.jinja")}
    if (home / FILE).is_file():
        files["default"] = home / FILE
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in sorted(files.items())}
    config = home / "tokenizer_config.json"
    found = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    source = found.get("chat_template")
    if isinstance(source, list):  # several by name
        return {one["name"]: one["template"] for one in source}
    return {"default": source} if isinstance(source, str) else {}
