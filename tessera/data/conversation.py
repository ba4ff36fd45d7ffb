"""One conversation: what every dialect of chat rows is read into and written from.

Messages are OpenAI's, arguments of `tool_calls` as objects; ShareGPT's `from` and `value`, the
other names of a thought and the older `function_call` are read, too. A thought stands in
`reasoning_content` or between `<think>` and `</think>` at the beginning of `content`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tessera.data.thought import CLOSE, OPEN, split_message

Mode = Literal["on", "off"]
Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
CALL = "function_call"  # ShareGPT's speaker of a call, and OpenAI's older name of one
ALIASES = {
    **dict.fromkeys(("ipython", "function", "observation"), "tool"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", CALL), "assistant"),
    **{"developer": "system", "human": "user"},
}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
FIELDS = ("role", "from", "content", "value", *THOUGHTS, "weight", "tool_calls", CALL)
ANSWERS = ("completion", "response", "output", "answer")  # of rows that are no list of messages
OTHERS = ("name", "tool_call_id", "id", "label", "refusal", "audio")  # no misspelling of those
USUAL = frozenset(FIELDS)
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
        """`reasoning`, else what the system prompt says, else what the last trained answer does."""
        said = self.reasoning or switch_of(self.messages)
        if said or not self.answered:
            return said or "off"
        last = (trained_answers(self.messages) or [-1])[-1]
        return "on" if split_message(self.messages[last]).thought is not None else "off"

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


def trained_answers(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Which messages are answers to a question that OpenAI's `weight` does not leave out."""
    first = next((i for i, one in enumerate(messages) if one["role"] == "user"), len(messages))
    answers = (i for i, one in enumerate(messages) if one["role"] == "assistant" and i > first)
    return [i for i in answers if messages[i].get("weight", 1)]


def misnamed(given: Iterable[str], known: Iterable[str], *others: str) -> str:
    """`; "mesages" is near "messages"` for each name close to a known one that is absent, or ""."""
    given, known = list(given), list(known)
    absent, told = [name for name in known if name not in given], ""
    for name in given:
        if name not in known and name not in others:
            for near in difflib.get_close_matches(name.lower(), absent, 1, 0.82):
                told += f'; "{name}" is near "{near}"'
    return told


def present(value: Any) -> Any:
    """Without the nulls of objects: Arrow has no absent keys, and a null says no more."""
    if isinstance(value, dict):
        return {key: present(one) for key, one in value.items() if one is not None}
    return [present(one) for one in value] if isinstance(value, list) else value


def tidy(messages: Any) -> list[Message]:
    """The messages in the form of this file, each a dict of its own; nulls are left out.

    Raises SchemaError for what cannot be brought into it.
    """
    if not isinstance(messages, list) or not messages:
        raise SchemaError("no messages")
    found = [one for i, message in enumerate(messages) if (one := _tidy(i, message)) is not None]
    if any("reasoning_content" in one for one in found):
        for one in found:  # thoughts have a field of their own: a lone `</think>` is text
            if one["role"] == "assistant" and not one["content"].lstrip().startswith(OPEN):
                if CLOSE in one["content"]:
                    one.setdefault("reasoning_content", "")
    return found


def _tidy(index: int, message: Any) -> Message | None:
    """The message in its own form; None for a system prompt that is null."""
    if not isinstance(message, dict):
        raise SchemaError(f"message {index} is a {type(message).__name__}, not an object")
    given = {str(key): value for key, value in message.items() if value is not None}
    if not given.keys() <= USUAL and (wrong := misnamed(given, FIELDS, *OTHERS)):
        raise SchemaError(f"message {index} has a field of an unknown name{wrong}")
    content = _one(index, given, "content", "value")
    known = _role(index, given)
    if CALL in (given.get("from"), given.get("role")):
        given, content = {"tool_calls": content} | given, ""
    parts = _parts(index, content) if isinstance(content, list) else {"content": content}
    found = {k: v for k, v in given.items() if k not in ("from", "value")} | {"role": known}
    if known == "assistant":
        _tidy_answer(index, found, parts)
    elif any(parsed(one.pop(key, None)) for one in (found, parts) for key in ("tool_calls", CALL)):
        raise SchemaError(f"message {index} calls a tool and is of role {known}")
    elif parts["content"] is None and known == "system":
        return None
    elif parts["content"] is None and known == "user":
        raise SchemaError(f"message {index} has no content; it has {', '.join(given)}")
    found |= parts | {"content": parts["content"] or ""}
    if not isinstance(found["content"], str):
        raise SchemaError(f"message {index} has a {type(found['content']).__name__} as content")
    return found


def _role(index: int, given: Message) -> str:
    """Who speaks, by OpenAI's name or by ShareGPT's."""
    said = [given[name] for name in ("role", "from") if name in given] or [None]
    roles = {ALIASES.get(str(one).lower(), str(one).lower()) for one in said}
    if len(roles) > 1 or not roles <= set(ROLES):
        told, allowed = " and ".join(map(repr, said)), ", ".join((*ROLES, *ALIASES))
        raise SchemaError(f"message {index} has role {told}; known: {allowed}")
    return roles.pop()


def _one(index: int, given: Message, *names: str) -> Any:
    """The value that stands under one of some names; several must be equal."""
    values = [given[name] for name in names if name in given]
    if any(value != values[0] for value in values):
        raise SchemaError(f"message {index} has different values as {' and '.join(names)}")
    return values[0] if values else None


def _tidy_answer(index: int, found: Message, parts: Message) -> None:
    """The thought, the calls and the weight of an answer, each under its one name."""
    thoughts = [found.pop(name) for name in THOUGHTS if name in found]
    thoughts.append(parts.pop("reasoning_content", ""))
    for one in thoughts:
        if not isinstance(one, str):
            raise SchemaError(f"message {index} has a {type(one).__name__} as its thought")
    said = [one for one in thoughts if one.strip()]
    if len({one.strip() for one in said}) > 1:
        raise SchemaError(f"message {index} has several thoughts, which differ")
    if said:
        found["reasoning_content"] = said[0]
    calls = [found.pop(name) for name in ("tool_calls", CALL) if name in found]
    calls = [tool_calls(index, one) for one in (*calls, parts.pop("tool_calls", [])) if one]
    if any(one != calls[0] for one in calls):
        raise SchemaError(f"message {index} has several lists of tool calls, which differ")
    if calls and calls[0]:
        found["tool_calls"] = calls[0]
    if (weight := found.get("weight")) is not None:
        if not isinstance(weight, int | float) or weight not in (0, 1):
            raise SchemaError(
                f"message {index} has weight {weight!r}; known: 0 (not trained) and 1"
            )
        found["weight"] = int(weight)


def _parts(index: int, parts: list[Any]) -> Message:
    """Content given as a list of parts: text, reasoning and tool calls."""
    texts, thoughts, calls = [], [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        value = (
            part.get(kind, part.get("text", part.get("value"))) if isinstance(kind, str) else None
        )
        if kind == "text" and isinstance(value, str | None):
            texts += [] if value is None else [value]
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
    calls = parsed(calls)
    calls = [calls] if isinstance(calls, dict | str) else calls or []
    if not isinstance(calls, list):
        raise SchemaError(f"message {index} has a {type(calls).__name__} as tool_calls")
    for call in calls:
        call = parsed(call)
        function = parsed(call.get("function", call)) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise SchemaError(f"message {index} calls a tool without a name")
        name = function["name"]
        arguments = parsed(function.get("arguments", function.get("parameters")))
        if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
            arguments = {}
        if not isinstance(arguments, dict):
            raise SchemaError(f"message {index} calls {name} with arguments that are no object")
        own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        made = {"name": name, "arguments": arguments}
        found.append({**own, "type": "function", "function": made})
    return found


def tool_list(tools: Any) -> list[dict[str, Any]]:
    """The schemas of the tools of a row, which may be a string of JSON or absent."""
    tools = present(parsed(tools)) or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise SchemaError("tools is no list of objects")
    return tools


def parsed(value: Any) -> Any:
    """The value of a string of JSON; what is none as it is."""
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
        if "chosen" in chat.extra:
            return "no answer to train on, but a pair of them: [rpo] takes preference rows"
        told = chat.extra.get("answer", "")
        odd = "" if isinstance(told, str) else f": answer is a {type(told).__name__}, not text"
        return f"no answer to train on{odd or misnamed(chat.extra, ANSWERS)}"
    said = switch_of(chat.messages)
    if said and chat.reasoning and said != chat.reasoning:
        return f'reasoning is "{chat.reasoning}" and the system prompt says "{said}"'
    answers = trained_answers(chat.messages)
    if not answers:
        return "every answer has weight 0: nothing is left to train on"
    return answer_fault(chat.messages[answers[-1]], chat.mode)


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
