"""Tool calls in an answer, in the dialect that the model's chat template teaches.

    built-in  <TOOLCALL>[{"name": …, "arguments": {…}}, …]</TOOLCALL>      (arXiv 2505.00949)
    hermes    <tool_call>{"name": …, "arguments": {…}}</tool_call> …       (Qwen, Hermes)
    llama3    {"name": …, "parameters": {…}}, after <|python_tag|> or not  (Llama 3.1 and later)
    mistral   [TOOL_CALLS] [{"name": …, "arguments": {…}}, …], or [TOOL_CALLS]name{…}

What looks like a call and cannot be read stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tessera.data.template import Template
from tessera.data.thought import begun

Call = tuple[str, dict[str, Any]]  # a function's name and its arguments
NAMES = ("name", "type", "function", "parameters", "arguments", "id")  # the keys of a call
_JSON = json.JSONDecoder(strict=False)  # models write line breaks inside of strings
_FIRST_KEY = re.compile(r'\{\s*"([^"\\]*)"')
_NAMED = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")
_CLOSE_TO_END = 10  # characters: a JSON error this near the end may be an unfinished literal


class Dialect(NamedTuple):
    """How calls are written: begin call (between call)* end.

    mark: the text that announces a call, "" where the JSON stands alone. close: the text behind it.
    arguments: the key of a call's arguments.
    """

    name: str
    mark: str
    close: str
    begin: str
    between: str
    end: str
    arguments: str = "arguments"


BUILT_IN = Dialect("built-in", "<TOOLCALL>", "</TOOLCALL>", "<TOOLCALL>[", ", ", "]</TOOLCALL>")
HERMES = Dialect(
    "hermes",
    "<tool_call>",
    "</tool_call>",
    "<tool_call>\n",
    "\n</tool_call>\n<tool_call>\n",
    "\n</tool_call>",
)
MISTRAL = Dialect("mistral", "[TOOL_CALLS]", "", "[TOOL_CALLS] [", ", ", "]")
LLAMA3 = Dialect("llama3", "", "", "", "; ", "", "parameters")
PYTHON_TAG = LLAMA3._replace(mark="<|python_tag|>")
MARKED = (BUILT_IN, HERMES, MISTRAL, PYTHON_TAG)


def dialects_of(template: str) -> tuple[Dialect, ...]:
    """The dialects of a chat template's source, the one to write first; all with a mark if none."""
    for dialect in (BUILT_IN, HERMES, MISTRAL):
        if dialect.mark in template:
            return (dialect,)
    if PYTHON_TAG.mark in template or re.search(r'\{\\?"name\\?":.*\\?"parameters\\?":', template):
        return (LLAMA3, PYTHON_TAG)
    return MARKED


def template_dialects(template: Template) -> tuple[Dialect, ...]:
    """Those of the template that is taken where there are tools."""
    return dialects_of(template.named.get("tool_use", template.source))


def read(text: str, dialects: Sequence[Dialect] = MARKED) -> tuple[str, list[Call]]:
    """(a whole answer without its calls, the calls)."""
    reader = CallReader(dialects)
    return reader.push(text) + reader.flush(), reader.calls


class CallReader:
    """Text in, text without calls out; `calls` grows with each that is complete.

    White space beside a call is dropped.
    """

    def __init__(self, dialects: Iterable[Dialect]) -> None:
        self.calls: list[Call] = []
        self._marks = {dialect.mark or "{": dialect for dialect in dialects}
        self._held = ""
        self._beside_call, self._space = True, ""  # white space waits for what follows it
        self._too_deep = False  # then no later brace is tried: each would cost as much

    def push(self, text: str) -> str:
        """The text that cannot be part of a call; the rest is held back."""
        self._held += text
        return self._read(final=False)

    def flush(self) -> str:
        """The held text, at the end of the answer. A call without its closing mark counts."""
        text = self._read(final=True)
        space, self._space = self._space, ""
        return text if self.calls else text + space

    def _read(self, final: bool) -> str:
        plain = ""
        while present := [mark for mark in self._marks if mark in self._held]:
            mark = min(present, key=self._held.find)
            at = self._held.find(mark)
            plain += self._say(self._held[:at])
            self._held = self._held[at:]
            end = self._call(mark, final)
            if end is None:
                return plain
            if not end:
                end = len(self._held) if self._too_deep else len(mark)
                plain += self._say(self._held[:end])
            self._held = self._held[end:]
        sure = len(self._held) if final else len(self._held) - begun(self._held, [*self._marks])
        plain += self._say(self._held[:sure])
        self._held = self._held[sure:]
        return plain

    def _say(self, text: str) -> str:
        if not self._beside_call:
            return text
        text = self._space + text
        self._beside_call = not text.strip(" \t\r\n;")
        self._space = text if self._beside_call else ""
        return "" if self._beside_call else text

    def _call(self, mark: str, final: bool) -> int | None:
        """Where the calls end that begin with the mark: 0 for none, None where more must come."""
        dialect = self._marks[mark]
        start = len(dialect.mark)
        named = _NAMED.match(self._held, start) if dialect is MISTRAL else None
        try:
            found = _decode(self._held, named.end() if named else start)
        except RecursionError:
            self._too_deep = True
            return 0
        if found is None:
            return 0 if final or not dialect.mark and _is_other(self._held) else None
        value, end = found
        calls = _calls({"name": named[1], "arguments": value} if named else value)
        if not end or calls is None:
            return 0 if end or final or not self._may_be_named(dialect, start) else None
        behind = len(self._held) - len(self._held[end:].lstrip())
        if dialect.close and dialect.close.startswith(self._held[behind:][: len(dialect.close)]):
            if not final and len(self._held) - behind < len(dialect.close):
                return None  # the closing mark, or nothing yet
            end = min(len(self._held), behind + len(dialect.close))
        self.calls += calls
        self._beside_call, self._space = True, ""
        return end

    def _may_be_named(self, dialect: Dialect, start: int) -> bool:
        """Whether Mistral's later form may be under way: a name whose arguments are to come."""
        return dialect is MISTRAL and bool(re.fullmatch(r"\s*[\w.\[\]-]*", self._held[start:]))


def _decode(text: str, start: int) -> tuple[Any, int] | None:
    """(the JSON at `start`, its end), (None, 0) where there is none, None where more must come.

    Raises RecursionError for one that is nested too deeply.
    """
    start += len(text[start:]) - len(text[start:].lstrip())
    if start == len(text):
        return None
    try:
        return _JSON.raw_decode(text, start)
    except json.JSONDecodeError as error:
        unfinished = "Unterminated" in error.msg or error.pos + _CLOSE_TO_END > len(text)
        return None if text[start] in "{[" and unfinished else (None, 0)
    except ValueError:
        return None, 0


def _is_other(text: str) -> bool:
    """Whether an unfinished JSON object begins as no call does."""
    first = _FIRST_KEY.match(text)
    return first is not None and first[1] not in NAMES


def _calls(value: Any) -> list[Call] | None:
    """The calls that a JSON value stands for, None where it is another thing."""
    rows = value if isinstance(value, list) else [value]
    found = [_one(row) for row in rows]
    calls = [call for call in found if call is not None]
    return calls if calls and len(calls) == len(found) else None


def _one(row: Any) -> Call | None:
    if isinstance(row, dict) and isinstance(row.get("function"), dict):
        row = row["function"]
    if not isinstance(row, dict) or not isinstance(row.get("name"), str) or not row["name"]:
        return None
    keys = [key for key in ("arguments", "parameters") if key in row]
    arguments = row[keys[0]] if keys else {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return None
    arguments = {} if arguments is None else arguments
    return (row["name"], arguments) if isinstance(arguments, dict) else None
