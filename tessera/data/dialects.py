"""Rows of chat data in every dialect, read into one form and written back.

    openai     {"messages": [{role, content, reasoning_content, tool_calls} …], "tools": …}
    sharegpt   {"conversations": [{"from": "human", "value": "…"} …], "system": …, "tools": …}
    alpaca     {"instruction": "…", "input": "…", "output": "…", "system": …, "history": […]}
    nemotron   {"input": [{role, content} …], "output": "…", "reasoning": "on", "system_prompt": …}

A dialect is known by a row's keys; `read_row(write_row(chat, dialect)) = chat`. Other keys of a row
are the chat's `extra`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from tessera.data.conversation import Chat, Message, SchemaError, check, tidy, tool_calls, tool_list
from tessera.data.readers import EXCERPT, Bad, DataError, read_rows
from tessera.runs.files import writing

Dialect = Literal["nemotron", "nemotron-rendered", "openai", "sharegpt", "alpaca"]
Row = dict[str, Any]


def read_row(row: Any) -> Chat:
    """The chat of a row. Raises SchemaError with the reason where it is no conversation."""
    if not isinstance(row, dict):
        raise SchemaError(f"a {type(row).__name__}, not an object")
    for key, read in _READ.items():
        if key in row:
            return check(read(row))
    keys = ", ".join(map(str, row)) or "no keys"
    raise SchemaError(f"no row of a known dialect: it has {keys}, and none of {', '.join(_READ)}")


def write_row(chat: Chat, dialect: Dialect = "openai") -> Row:
    """The row of a chat. Raises SchemaError for what the dialect has no words for."""
    return _WRITE[dialect](chat)


def write_rows(path: Path, chats: Iterable[Chat], dialect: str = "openai") -> int:
    """Writes chats as JSON lines, whole or not at all; returns their number."""
    if dialect not in _WRITE:
        raise SchemaError(f'no dialect "{dialect}"; known: {", ".join(_WRITE)}')
    part, written = path.with_name(f".{path.name}.tmp"), 0
    with writing(path), part.open("w", encoding="utf-8") as file:
        for chat in chats:
            file.write(json.dumps(_WRITE[dialect](chat), ensure_ascii=False) + "\n")
            written += 1
        part.replace(path)
    return written


def read_chats(path: Path) -> Iterator[tuple[int, Chat | Bad]]:
    """The chats of a file with the numbers of their rows, from 1, and the rows that are none.

    Raises DataError where the first row is of no dialect: then the whole file is of something else.
    """
    return chats_of(str(path), read_rows(path))


def chats_of(label: str, rows: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Chat | Bad]]:
    """As `read_chats`, of numbered rows that come from anywhere."""
    for number, row in rows:
        if isinstance(row, Bad):
            yield number, row
            continue
        try:
            yield number, read_row(row)
        except SchemaError as error:
            if number == 1 and isinstance(row, dict) and not _READ.keys() & row.keys():
                raise DataError(f"{label}:1 is {error}") from None
            excerpt = json.dumps(row, ensure_ascii=True, default=str)[:EXCERPT]
            yield number, Bad(label, number, str(error), excerpt)


def _chat(row: Row, messages: Any, *own: str) -> Chat:
    """A chat; a `reasoning` that is neither on nor off is not about the switch, but an extra."""
    said = row.get("reasoning")
    if said in ("on", "off", None):
        own = (*own, "reasoning")
    extra = {key: value for key, value in row.items() if key not in own}
    tools = tool_list(row.get("tools") if "tools" in own else None)
    return Chat(tidy(messages), said if said in ("on", "off") else None, tools, extra)


def _apart(chat: Chat, system: str, answer: str | None = None) -> tuple[list[Message], Row]:
    """(the messages, the row's other keys): system prompt and last answer go under those names."""
    messages, row = list(chat.messages), dict(chat.extra)
    if messages[0]["role"] == "system":
        row[system] = messages.pop(0)["content"]
    if answer and chat.answered:
        row[answer] = messages.pop()["content"]
    if chat.reasoning is not None:
        row["reasoning"] = chat.reasoning
    return messages, row


def _check_plain(chat: Chat) -> None:
    for index, message in enumerate(chat.messages):
        if more := sorted(set(message) - {"role", "content"}) or chat.tools and ["tools"]:
            raise SchemaError(f"message {index} has {more[0]}, which this dialect cannot say")


def _read_openai(row: Row) -> Chat:
    """Content may be a list of parts; `tools`, calls and arguments may be strings of JSON."""
    if not isinstance(row["messages"], list):
        raise SchemaError(f"messages is a {type(row['messages']).__name__}, not a list")
    return _chat(row, row["messages"], "messages", "tools")


def _write_openai(chat: Chat) -> Row:
    row: Row = {"messages": chat.messages}
    if chat.tools:
        row["tools"] = chat.tools
    if chat.reasoning is not None:
        row["reasoning"] = chat.reasoning
    return {**row, **chat.extra}


_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
    **{"function_call": "call", "observation": "tool", "tool": "tool", "system": "system"},
}
_NAMES = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}


def _read_sharegpt(row: Row) -> Chat:
    """`function_call` holds one or several calls as JSON, `observation` what a tool gave back."""
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise SchemaError("no conversations")
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise SchemaError(f"turn {index} is no object with a text as `value`")
        said, value = turn.get("from"), turn["value"]
        role = _SPEAKERS.get(str(said).lower())
        if role is None:
            raise SchemaError(f"turn {index} is from {said!r}; known: {', '.join(_SPEAKERS)}")
        if role == "call":
            calls = tool_calls(index, value)
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        else:
            messages.append({"role": role, "content": value})
    if (system := row.get("system")) not in (None, ""):
        messages.insert(0, {"role": "system", "content": system})
    return _chat(row, messages, "conversations", "system", "tools")


def _write_sharegpt(chat: Chat) -> Row:
    """Raises SchemaError for an answer that both speaks and calls."""
    messages, row = _apart(chat, "system")
    if chat.tools:
        row["tools"] = json.dumps(chat.tools, ensure_ascii=False)
    return {"conversations": [_turn(i, message) for i, message in enumerate(messages)], **row}


def _turn(index: int, message: Message) -> dict[str, str]:
    calls = message.get("tool_calls")
    more = sorted(set(message) - {"role", "content", "tool_calls"})
    if more or (calls and message["content"]):
        found = more[0] if more else "content beside tool_calls"
        raise SchemaError(f"message {index} has {found}, which this dialect cannot say")
    if calls:
        functions = [call["function"] for call in calls]
        value = json.dumps(functions if len(functions) > 1 else functions[0], ensure_ascii=False)
        return {"from": "function_call", "value": value}
    return {"from": _NAMES[message["role"]], "value": message["content"]}


def _read_alpaca(row: Row) -> Chat:
    """`input` follows the instruction on a line of its own; `history` holds earlier pairs."""
    for key in ("instruction", "input", "output", "system"):
        if not isinstance(row.get(key) or "", str):
            raise SchemaError(f"{key} is a {type(row[key]).__name__}, not text")
    question, about = row["instruction"] or "", row.get("input")
    pairs = row.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise SchemaError("history is no list of pairs of question and answer")
    texts = [text for pair in pairs for text in pair]
    texts.append(f"{question}\n{about}" if about else question)
    if row.get("output") is not None:
        texts.append(row["output"])
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": row["system"]})
    return _chat(row, messages, "instruction", "input", "output", "system", "history")


def _write_alpaca(chat: Chat) -> Row:
    """Raises SchemaError for tools, and where turns do not alternate."""
    _check_plain(chat)
    messages, row = _apart(chat, "system", "output")
    roles = [message["role"] for message in messages]
    if not len(roles) % 2 or roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
        raise SchemaError("only questions and answers in turn can be said in this dialect")
    texts = [message["content"] for message in messages]
    if texts[:-1]:
        row["history"] = [list(pair) for pair in zip(texts[:-1:2], texts[1:-1:2], strict=True)]
    return {"instruction": texts[-1], "input": "", **row}


_BEGIN, _END = "<|begin_of_text|>", "<|eot_id|>"
_TURN = re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n(.*?)<\|eot_id\|>", re.DOTALL)
_ASK = "<|start_header_id|>assistant<|end_header_id|>\n\n"


def _read_nemotron(row: Row) -> Chat:
    """Rows of the Llama-Nemotron Post-Training Dataset: SFT with `output`, RL with `args`.

    In an early revision `input` is one string, Llama 3's template already applied, and `output`
    ends with <|eot_id|>; the system prompt stands apart in later ones.
    """
    given, prompt, output = row["input"], row.get("system_prompt"), row.get("output")
    messages = tidy(_turns(given) if isinstance(given, str) else given)
    for key in ("system_prompt", "output"):
        if not isinstance(row.get(key), str | None):
            raise SchemaError(f"{key} is a {type(row[key]).__name__}, not text")
    if prompt is not None:
        if messages[0]["role"] == "system":
            raise SchemaError("a system message in `input` beside system_prompt")
        messages.insert(0, {"role": "system", "content": prompt})
    if output is not None:
        messages.append({"role": "assistant", "content": output.removesuffix(_END)})
    elif "args" in row:
        match row["args"]:
            case {"instruction_id_list": list(ids), "instruction_kwargs": list(kwargs)}:
                if len(ids) != len(kwargs):
                    raise SchemaError(
                        f"args name {len(ids)} instructions and {len(kwargs)} settings"
                    )
            case dict(args) if "instruction_id_list" not in args:
                pass
            case _:
                raise SchemaError("args are no lists of instructions and their settings")
    own = ("input", "output", "reasoning", "system_prompt")
    extra = {key: value for key, value in row.items() if key not in own}
    return Chat(messages, row.get("reasoning"), [], extra)


def _turns(text: str) -> list[Message]:
    """The messages of a rendered prompt."""
    if not text.endswith(_ASK):
        raise SchemaError("`input` is a text that does not end where the assistant speaks")
    body = text.removeprefix(_BEGIN).removesuffix(_ASK)
    turns = [{"role": m[1], "content": m[2]} for m in _TURN.finditer(body)]
    if "".join(_rendered(turn) for turn in turns) != body:
        raise SchemaError("`input` is a text between whose turns something else stands")
    return turns


def _write_nemotron(chat: Chat) -> Row:
    """The last answer as `output`. Raises SchemaError for tools."""
    _check_plain(chat)
    messages, row = _apart(chat, "system_prompt", "output")
    return {"input": messages, **row}


def _write_rendered(chat: Chat) -> Row:
    """The row of a chat in the early revision."""
    row = _write_nemotron(chat)
    prompt = row.pop("system_prompt", None)
    turns = [] if prompt is None else [{"role": "system", "content": prompt}]
    text = "".join(_rendered(turn) for turn in turns + row["input"])
    if "output" in row:
        row["output"] += _END
    found = {**row, "input": _BEGIN + text + _ASK}
    if _read_nemotron(found).messages != chat.messages:
        raise SchemaError("a message holds a mark of the template that this dialect writes")
    return found


def _rendered(turn: Message) -> str:
    return f"<|start_header_id|>{turn['role']}<|end_header_id|>\n\n{turn['content']}{_END}"


# By the key that tells a dialect; "input" is alpaca's, too, beside "instruction".
_READ: dict[str, Callable[[Row], Chat]] = {
    "messages": _read_openai,
    "conversations": _read_sharegpt,
    "instruction": _read_alpaca,
    "input": _read_nemotron,
}
_WRITE: dict[str, Callable[[Chat], Row]] = {
    "openai": _write_openai,
    "sharegpt": _write_sharegpt,
    "alpaca": _write_alpaca,
    "nemotron": _write_nemotron,
    "nemotron-rendered": _write_rendered,
}
