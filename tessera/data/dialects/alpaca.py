"""Alpaca rows: {"instruction": "…", "input": "…", "output": "…", "system": …, "history": […]}.

`input` is what the instruction is about and follows it on a line of its own; `history` holds
earlier pairs of question and answer.
"""

from __future__ import annotations

from typing import Any

from tessera.data.conversation import Chat, SchemaError, tidy

OWN = ("instruction", "input", "output", "system", "history", "reasoning")


def is_row(row: dict[str, Any]) -> bool:
    """Whether a row is of this dialect, by its keys."""
    return "instruction" in row


def read(row: dict[str, Any]) -> Chat:
    """The chat of a row."""
    for key in ("instruction", "input", "output", "system"):
        if not isinstance(row.get(key) or "", str):
            raise SchemaError(f"{key} is a {type(row[key]).__name__}, not text")
    about = row.get("input")
    question = row["instruction"] or ""
    messages = [{"role": "user", "content": f"{question}\n{about}" if about else question}]
    if row.get("output") is not None:
        messages.append({"role": "assistant", "content": row["output"]})
    messages = _history(row.get("history")) + messages
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": row["system"]})
    said = row.get("reasoning")
    own = OWN if said in ("on", "off", None) else OWN[:5]
    extra = {key: value for key, value in row.items() if key not in own}
    return Chat(tidy(messages), said if said in ("on", "off") else None, [], extra)


def _history(pairs: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    pairs = pairs or []
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise SchemaError("history is no list of pairs of question and answer")
    for question, answer in pairs:
        found += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return found


def write(chat: Chat) -> dict[str, Any]:
    """The row of a chat. Raises SchemaError for tools, and where turns do not alternate."""
    messages, row = list(chat.messages), dict(chat.extra)
    if messages[0]["role"] == "system":
        row["system"] = messages.pop(0)["content"]
    if chat.answered:
        row["output"] = messages.pop()["content"]
    roles = [message["role"] for message in messages]
    plain = all(set(message) == {"role", "content"} for message in chat.messages)
    if (
        chat.tools
        or not plain
        or roles != [("user", "assistant")[i % 2] for i in range(len(roles))]
    ):
        raise SchemaError("only plain questions and answers in turn can be said in this dialect")
    if roles[-1:] != ["user"]:
        raise SchemaError("no question before the answer")
    texts = [message["content"] for message in messages]
    if texts[:-1]:
        row["history"] = [list(pair) for pair in zip(texts[:-1:2], texts[1:-1:2], strict=True)]
    if chat.reasoning is not None:
        row["reasoning"] = chat.reasoning
    return {"instruction": texts[-1], "input": "", **row}
