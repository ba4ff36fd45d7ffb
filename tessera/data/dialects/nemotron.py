"""Rows of the Llama-Nemotron Post-Training Dataset.

    SFT  {"input": [{role, content} …], "output": "<think>…</think>…", "reasoning": "on",
          "system_prompt": "detailed thinking on", "category", "license", "generator", …}
    RL   {"input": […], "args": {"instruction_id_list": […], "instruction_kwargs": […]}, …}

In an early revision `input` is one string, Llama 3's template already applied, and `output` ends
with <|eot_id|>: `write_rendered` writes that. The system prompt stands apart in later ones.
"""

from __future__ import annotations

import re
from typing import Any

from tessera.data.conversation import Chat, Message, SchemaError, tidy

BEGIN, END = "<|begin_of_text|>", "<|eot_id|>"
OWN = ("input", "output", "reasoning", "system_prompt")
_TURN = re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n(.*?)<\|eot_id\|>", re.DOTALL)
_ASK = "<|start_header_id|>assistant<|end_header_id|>\n\n"


def is_row(row: dict[str, Any]) -> bool:
    """Whether a row is of this dialect, by its keys."""
    return "input" in row and "instruction" not in row


def read(row: dict[str, Any]) -> Chat:
    """The chat of a row of either revision and either part."""
    given = row["input"]
    rendered = isinstance(given, str)
    messages = tidy(_turns(given) if rendered else given)
    prompt = row.get("system_prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise SchemaError(f"system_prompt is a {type(prompt).__name__}, not text")
    if prompt is not None:
        if messages[0]["role"] == "system":
            raise SchemaError("a system message in `input` beside system_prompt")
        messages.insert(0, {"role": "system", "content": prompt})
    if (output := row.get("output")) is not None:
        if not isinstance(output, str):
            raise SchemaError(f"output is a {type(output).__name__}, not text")
        messages.append({"role": "assistant", "content": output.removesuffix(END)})
    elif "args" in row:
        _check_args(row["args"])
    extra = {key: value for key, value in row.items() if key not in OWN}
    return Chat(messages, row.get("reasoning"), [], extra)


def _turns(text: str) -> list[Message]:
    """The messages of a rendered prompt."""
    if not text.endswith(_ASK):
        raise SchemaError("`input` is a text that does not end where the assistant speaks")
    body = text.removeprefix(BEGIN).removesuffix(_ASK)
    turns = [{"role": m[1], "content": m[2]} for m in _TURN.finditer(body)]
    if "".join(_rendered(turn) for turn in turns) != body:
        raise SchemaError("`input` is a text between whose turns something else stands")
    return turns


def _check_args(args: Any) -> None:
    match args:
        case {"instruction_id_list": list(ids), "instruction_kwargs": list(kwargs)}:
            if len(ids) != len(kwargs):
                raise SchemaError(f"args name {len(ids)} instructions and {len(kwargs)} settings")
        case dict() if "instruction_id_list" not in args:
            return
        case _:
            raise SchemaError("args are no lists of instructions and their settings")


def write(chat: Chat) -> dict[str, Any]:
    """The row of a chat, its last answer as `output`. Raises SchemaError for tools."""
    messages, row = list(chat.messages), dict(chat.extra)
    for index, message in enumerate(messages):
        if chat.tools or set(message) - {"role", "content"}:
            more = sorted(set(message) - {"role", "content"}) or ["tools"]
            raise SchemaError(f"message {index} has {more[0]}, which this dialect cannot say")
    if messages[0]["role"] == "system":
        row["system_prompt"] = messages.pop(0)["content"]
    if chat.answered:
        row["output"] = messages.pop()["content"]
    if chat.reasoning is not None:
        row["reasoning"] = chat.reasoning
    return {"input": messages, **row}


def write_rendered(chat: Chat) -> dict[str, Any]:
    """The row of a chat in the early revision."""
    row = write(chat)
    prompt = row.pop("system_prompt", None)
    turns = [] if prompt is None else [{"role": "system", "content": prompt}]
    text = "".join(_rendered(turn) for turn in turns + row["input"])
    if "output" in row:
        row["output"] += END
    found = {**row, "input": BEGIN + text + _ASK}
    if read(found).messages != chat.messages:
        raise SchemaError("a message holds a mark of the template that this dialect writes")
    return found


def _rendered(turn: Message) -> str:
    return f"<|start_header_id|>{turn['role']}<|end_header_id|>\n\n{turn['content']}{END}"
