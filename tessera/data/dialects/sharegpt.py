"""ShareGPT rows: {"conversations": [{"from": "human", "value": "…"} …], "system": …, "tools": …}.

`function_call` holds one or several calls as JSON, `observation` what a tool gave back.
"""

from __future__ import annotations

import json
from typing import Any

from tessera.data.conversation import Chat, Message, SchemaError, tidy, tool_calls, tool_list

OWN = ("conversations", "system", "tools", "reasoning")
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "call",
    "observation": "tool",
    "tool": "tool",
    "system": "system",
}
NAMES = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}


def is_row(row: dict[str, Any]) -> bool:
    """Whether a row is of this dialect, by its keys."""
    return "conversations" in row


def read(row: dict[str, Any]) -> Chat:
    """The chat of a row."""
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise SchemaError("no conversations")
    messages = [_message(index, turn) for index, turn in enumerate(turns)]
    system = row.get("system")
    if system not in (None, ""):
        messages.insert(0, {"role": "system", "content": system})
    said = row.get("reasoning")
    own = OWN if said in ("on", "off", None) else OWN[:3]
    extra = {key: value for key, value in row.items() if key not in own}
    return Chat(
        tidy(messages), said if said in ("on", "off") else None, tool_list(row.get("tools")), extra
    )


def _message(index: int, turn: Any) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise SchemaError(f"turn {index} is no object with a text as `value`")
    speaker = SPEAKERS.get(str(turn.get("from")).lower())
    if speaker is None:
        raise SchemaError(
            f"turn {index} is from {turn.get('from')!r}; known: {', '.join(SPEAKERS)}"
        )
    if speaker == "call":
        calls = tool_calls(index, turn["value"])
        return {"role": "assistant", "content": "", "tool_calls": calls}
    return {"role": speaker, "content": turn["value"]}


def write(chat: Chat) -> dict[str, Any]:
    """The row of a chat. Raises SchemaError for an answer that both speaks and calls."""
    messages, row = list(chat.messages), dict(chat.extra)
    if messages[0]["role"] == "system":
        row["system"] = messages.pop(0)["content"]
    if chat.tools:
        row["tools"] = json.dumps(chat.tools, ensure_ascii=False)
    if chat.reasoning is not None:
        row["reasoning"] = chat.reasoning
    return {"conversations": [_turn(i, message) for i, message in enumerate(messages)], **row}


def _turn(index: int, message: Message) -> dict[str, str]:
    calls = message.get("tool_calls")
    more = sorted(set(message) - {"role", "content", "tool_calls"})
    if more or (calls and message["content"]):
        raise SchemaError(
            f"message {index} has {(more or ['content beside tool_calls'])[0]}, which this dialect "
            "cannot say"
        )
    if calls:
        functions = [call["function"] for call in calls]
        value = json.dumps(functions if len(functions) > 1 else functions[0], ensure_ascii=False)
        return {"from": "function_call", "value": value}
    return {"from": NAMES[message["role"]], "value": message["content"]}
