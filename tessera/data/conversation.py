"""One conversation: what every dialect of chat rows is read into and written from.

Messages are OpenAI's, arguments of `tool_calls` as objects. A thought stands in `reasoning_content`
or between `<think>` and `</think>` at the beginning of `content`; both are left as they were.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tessera.data.thought import CLOSE, OPEN, split_message

Mode = Literal["on", "off"]
Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
ALIASES = {"developer": "system", "ipython": "tool", "function": "tool"}
SWITCH: dict[str, Mode] = {"detailed thinking on": "on", "detailed thinking off": "off"}


class SchemaError(ValueError):
    """A row that is no conversation; the text is the reason it is quarantined for."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, or the prompt of one.

    reasoning: whether the last answer is to think, None where the row does not say. tools: JSON
    schemas of what may be called. extra: all else that the row holds, as it stood there.
    """

    messages: list[Message]
    reasoning: Mode | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def answered(self) -> bool:
        """False for a prompt: reinforcement learning's rows end with a question."""
        return self.messages[-1]["role"] == "assistant"

    @property
    def mode(self) -> Mode:
        """`reasoning`, else what the system prompt says, else what the last answer does."""
        said = self.reasoning or switch_of(self.messages)
        if said or not self.answered:
            return said or "off"
        return "on" if split_message(self.messages[-1]).thought is not None else "off"

    def to_json(self) -> str:
        row = {"messages": self.messages, "reasoning": self.reasoning, "tools": self.tools}
        return json.dumps({**row, "extra": self.extra}, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Chat:
        return cls(**json.loads(line))


def switch_of(messages: Sequence[Mapping[str, Any]]) -> Mode | None:
    """The mode that the first line of the system prompt says, if it is the switch."""
    if not messages or messages[0]["role"] != "system":
        return None
    return SWITCH.get(messages[0]["content"].strip().split("\n")[0].strip())


def tidy(messages: Any) -> list[Message]:
    """The messages in the form of this file, each a dict of its own; nulls are left out.

    Raises SchemaError for what cannot be brought into it.
    """
    if not isinstance(messages, list) or not messages:
        raise SchemaError("no messages")
    found = [_tidy(index, message) for index, message in enumerate(messages)]
    if any("reasoning_content" in one for one in found):
        for one in found:  # thoughts have a field of their own: a lone `</think>` is text
            if one["role"] == "assistant" and not one["content"].lstrip().startswith(OPEN):
                if CLOSE in one["content"]:
                    one.setdefault("reasoning_content", "")
    return found


def _tidy(index: int, message: Any) -> Message:
    if not isinstance(message, dict):
        raise SchemaError(f"message {index} is a {type(message).__name__}, not an object")
    found = {str(key): value for key, value in message.items() if value is not None}
    role = found.get("role")
    role = ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise SchemaError(f"message {index} has role {role!r}; known: {', '.join(ROLES)}")
    content = found.get("content", "")
    if isinstance(content, list):
        found |= _parts(index, content)
    found = {**found, "role": role, "content": found.get("content", "")}
    for key in ("content", "reasoning_content"):
        if not isinstance(found.get(key, ""), str):
            raise SchemaError(f"message {index} has a {type(found[key]).__name__} as {key}")
    if "tool_calls" in found:
        found["tool_calls"] = tool_calls(index, found["tool_calls"])
        if not found["tool_calls"]:
            del found["tool_calls"]
    return found


def _parts(index: int, parts: list[Any]) -> Message:
    """Content given as a list of parts: text, reasoning and tool calls."""
    texts, thoughts, calls = [], [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        value = part.get(kind, part.get("text", part.get("value"))) if kind else None
        if kind == "text" and isinstance(value, str):
            texts.append(value)
        elif kind in ("reasoning", "thinking") and isinstance(value, str):
            thoughts.append(value)
        elif kind == "tool_call":
            calls += value if isinstance(value, list) else [value]
        else:
            raise SchemaError(f"message {index} has a part of type {kind!r}, which is no text")
    thought = {"reasoning_content": "\n".join(thoughts)} if thoughts else {}
    return {"content": "\n".join(texts), **thought, **({"tool_calls": calls} if calls else {})}


def tool_calls(index: int, calls: Any) -> list[dict[str, Any]]:
    """Calls as `{type: function, function: {name, arguments: {...}}}`; strings of JSON are read."""
    found = []
    calls = [calls] if isinstance(calls, dict | str) else calls or []
    if not isinstance(calls, list):
        raise SchemaError(f"message {index} has a {type(calls).__name__} as tool_calls")
    for call in calls:
        call = _parsed(call)
        function = _parsed(call.get("function", call)) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise SchemaError(f"message {index} calls a tool without a name")
        name = function["name"]
        arguments = _parsed(function.get("arguments", function.get("parameters", {})))
        if not isinstance(arguments, dict):
            raise SchemaError(f"message {index} calls {name} with arguments that are no object")
        own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        made = {"name": name, "arguments": arguments}
        found.append({**own, "type": "function", "function": made})
    return found


def tool_list(tools: Any) -> list[dict[str, Any]]:
    """The schemas of the tools of a row, which may be a string of JSON or absent."""
    tools = _parsed(tools) or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise SchemaError("tools is no list of objects")
    return tools


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def check(chat: Chat) -> Chat:
    """The chat, if it is a conversation. Raises SchemaError with the reason if it is none."""
    called = False
    for index, message in enumerate(chat.messages):
        role = message["role"]
        if role == "system" and index:
            raise SchemaError(f"message {index} is a system message behind the first place")
        if role == "tool" and not called:
            raise SchemaError(f"message {index} answers a tool call that nobody made")
        said = message["content"].strip() or message.get("reasoning_content", "").strip()
        if role == "assistant" and not (said or message.get("tool_calls")):
            raise SchemaError(f"message {index} is an empty answer")
        called = "tool_calls" in message or (called and role == "tool")
    if not any(message["role"] == "user" for message in chat.messages):
        raise SchemaError("no message of a user")
    if chat.reasoning not in ("on", "off", None):
        raise SchemaError(f'reasoning is {chat.reasoning!r}, neither "on" nor "off"')
    try:
        chat.to_json().encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise SchemaError(f"a text that is not UTF-8 ({type(error).__name__})") from None
    return chat


def fault(chat: Chat) -> str | None:
    """Why a chat must not be trained on, None if nothing speaks against it.

    The filters of the Llama-Nemotron data (Curator's MissingThinkOpenTag, MissingThinkCloseTag,
    ContainsThinkOpenTag, EmptyThinkTags): a row that contradicts its switch unteaches it.
    """
    if not chat.answered:
        return "no answer to train on"
    said = switch_of(chat.messages)
    if said and chat.reasoning and said != chat.reasoning:
        return f'reasoning is "{chat.reasoning}" and the system prompt says "{said}"'
    return answer_fault(chat.messages[-1], chat.mode)


def answer_fault(message: Message, mode: Mode) -> str | None:
    """Why an answer does not do what the switch says, None if it does."""
    content = message["content"]
    opened, closed = content.count(OPEN), content.count(CLOSE)
    found = split_message(message)
    if mode == "off":
        return "a thought although reasoning is off" if opened or closed or found.thought else None
    if opened and not closed:
        return "a thought that does not end"
    if not opened and not closed and found.thought is None:
        return "no thought although reasoning is on"
    if isinstance(message.get("reasoning_content"), str):
        if opened or closed:
            return "a thought in content beside reasoning_content"
    elif (opened, closed) != (1, 1) or not content.lstrip().startswith(OPEN):
        return "not one thought at the beginning of the answer"
    if not found.thought:
        return "an empty thought"
    said = found.answer.strip() or message.get("tool_calls")
    return None if said else "no answer behind the thought"
