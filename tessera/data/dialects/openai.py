"""OpenAI-style rows: {"messages": [{role, content, reasoning_content, tool_calls} …], "tools": …}.

Content may be a list of parts; `tools`, calls and their arguments may be strings of JSON.
"""

from __future__ import annotations

from typing import Any

from tessera.data.conversation import Chat, SchemaError, tidy, tool_list

OWN = ("messages", "tools", "reasoning")


def is_row(row: dict[str, Any]) -> bool:
    """Whether a row is of this dialect, by its keys."""
    return "messages" in row


def read(row: dict[str, Any]) -> Chat:
    """The chat of a row; a `reasoning` that is neither on nor off is not about the switch."""
    said = row.get("reasoning")
    own = OWN if said in ("on", "off", None) else OWN[:2]
    if not isinstance(row["messages"], list):
        raise SchemaError(f"messages is a {type(row['messages']).__name__}, not a list")
    extra = {key: value for key, value in row.items() if key not in own}
    reasoning = said if said in ("on", "off") else None
    return Chat(tidy(row["messages"]), reasoning, tool_list(row.get("tools")), extra)


def write(chat: Chat) -> dict[str, Any]:
    """The row of a chat."""
    row: dict[str, Any] = {"messages": chat.messages}
    if chat.tools:
        row["tools"] = chat.tools
    if chat.reasoning is not None:
        row["reasoning"] = chat.reasoning
    return {**row, **chat.extra}
