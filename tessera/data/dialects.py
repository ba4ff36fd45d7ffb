"""Rows of chat data in every dialect, read into one form and written back.

    openai     {"messages": [{role, content, reasoning_content, tool_calls} …], "tools": …}
    sharegpt   {"conversations": [{"from": "human", "value": "…"} …], "system": …, "tools": …}
    alpaca     {"instruction": "…", "input": "…", "output": "…", "system": …, "history": […]}
    nemotron   {"input": [{role, content} …], "output": "…", "reasoning": "on", "system_prompt": …}
    pairs      {"prompt" or "question": …, "completion", "response", "output" or "answer": …}

A dialect is known by a row's keys; `read_row(write_row(chat, dialect)) = chat`. Other keys of a row
are the chat's `extra`; nulls of objects, which Arrow pads rows with, are no keys. The messages of
every dialect may be OpenAI's or ShareGPT's. Pairs are read and never written; both sides may be
messages, as TRL has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from tessera.data.conversation import (
    ANSWERS,
    CALL,
    THOUGHTS,
    Chat,
    Message,
    SchemaError,
    check,
    misnamed,
    parsed,
    present,
    switch_of,
    tidy,
    tool_list,
)
from tessera.data.readers import EXCERPT, Bad, DataError, read_rows
from tessera.data.thought import CLOSE, OPEN
from tessera.runs.files import writing

Dialect = Literal["nemotron", "nemotron-rendered", "openai", "sharegpt", "alpaca"]
Row = dict[str, Any]
_NO_THOUGHT = re.compile(rf"\A\s*{OPEN}\s*{CLOSE}\s*")


def read_row(row: Any) -> Chat:
    """The chat of a row. Raises SchemaError with the reason where it is no conversation."""
    if not isinstance(row, dict):
        raise SchemaError(f"a {type(row).__name__}, not an object")
    row = {str(key): value for key, value in present(row).items()}
    for key, read in _READ.items():
        if key in row:
            return check(_without_empty_thoughts(read(row)))
    keys = ", ".join(row) or "no keys"
    raise SchemaError(
        f"no row of a known dialect: it has {keys}, and none of {', '.join(_READ)}"
        f"{misnamed(row, (*_READ, *ANSWERS))}"
    )


def _without_empty_thoughts(chat: Chat) -> Chat:
    """A chat whose row says no mode, without tags around nothing: Qwen3's answers that do not
    think begin with them."""
    if chat.reasoning is None and switch_of(chat.messages) is None:
        for message in chat.messages:
            if message["role"] == "assistant" and "reasoning_content" not in message:
                message["content"] = _NO_THOUGHT.sub("", message["content"])
    return chat


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
    if said in ("on", "off"):
        own = (*own, "reasoning")
    own = (*own, "tools", "functions")
    extra = {key: value for key, value in row.items() if key not in own}
    return Chat(tidy(messages), said if said in ("on", "off") else None, _tools(row), extra)


def _tools(row: Row) -> list[dict[str, Any]]:
    """The tools of a row, also by OpenAI's older name, which lists bare functions."""
    functions = tool_list(row.get("functions"))
    return tool_list(row.get("tools")) or [{"type": "function", "function": f} for f in functions]


def _with_system(row: Row, messages: list[Any]) -> list[Any]:
    """The messages behind the system prompt that stands beside them, if one does."""
    for key in ("system", "system_prompt"):
        if (system := row.get(key)) not in (None, ""):
            first = messages[0] if messages else None
            if isinstance(first, dict) and system in (first.get("content"), first.get("value")):
                return messages
            return [{"role": "system", "content": system}, *messages]
    return messages


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


def _read_messages(row: Row) -> Chat:
    """Content may be a list of parts; `tools`, calls and arguments may be strings of JSON.

    ShareGPT's `function_call` holds one or several calls as JSON, `observation` what came back.
    """
    key = "messages" if "messages" in row else "conversations"
    messages = parsed(row[key])
    if not isinstance(messages, list):
        raise SchemaError(f"{key} is a {type(messages).__name__}, not a list")
    return _chat(row, _with_system(row, messages), key, "system", "system_prompt")


def _write_openai(chat: Chat) -> Row:
    row: Row = {"messages": [_saying_nulls(one) for one in chat.messages]}
    if chat.tools:
        row["tools"] = chat.tools
    if chat.reasoning is not None:
        row["reasoning"] = chat.reasoning
    return {**row, **chat.extra}


def _saying_nulls(message: Message) -> Message:
    """Arguments with a null of the model's own as a string, so that it is not read as absent."""
    calls = message.get("tool_calls", [])
    if all(present(call) == call for call in calls):
        return message
    functions = [one["function"] for one in calls]
    told = [one | {"arguments": json.dumps(one["arguments"])} for one in functions]
    pairs = zip(calls, told, strict=True)
    return message | {"tool_calls": [call | {"function": one} for call, one in pairs]}


_NAMES = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}


def _write_sharegpt(chat: Chat) -> Row:
    """Raises SchemaError for an answer that both speaks and calls."""
    messages, row = _apart(chat, "system")
    if chat.tools:
        row["tools"] = json.dumps(chat.tools, ensure_ascii=False)
    return {"conversations": [_turn(i, message) for i, message in enumerate(messages)], **row}


def _turn(index: int, message: Message) -> dict[str, Any]:
    calls = message.get("tool_calls")
    weight = {"weight": message["weight"]} if "weight" in message else {}
    more = sorted(set(message) - {"role", "content", "tool_calls", "weight"})
    if more or (calls and message["content"]):
        found = more[0] if more else "content beside tool_calls"
        raise SchemaError(f"message {index} has {found}, which this dialect cannot say")
    if calls:
        functions = [call["function"] for call in calls]
        value = json.dumps(functions if len(functions) > 1 else functions[0], ensure_ascii=False)
        return {"from": CALL, "value": value, **weight}
    return {"from": _NAMES[message["role"]], "value": message["content"], **weight}


def _read_pair(row: Row) -> Chat:
    """A question and its answer, each a text or messages.

    `input` or `context` follows a question of text on a line of its own; `history` holds earlier
    pairs. `answer` stays among the extras, because reinforcement learning judges by it.
    """
    key = next(key for key in QUESTIONS if key in row)
    question, about, used = row[key], row.get("input", row.get("context")), [key]
    if isinstance(question, str) and isinstance(about, str):
        used.append("input" if "input" in row else "context")
        question = f"{question}\n{about}" if about else question
    elif "input" in row or not isinstance(question, str | list):
        wrong = "input" if "input" in row else key
        raise SchemaError(f"{wrong} is a {type(row[wrong]).__name__}, not text")
    messages = messages_of(question, "user")
    answer = next((name for name in ANSWERS if name in row), None)
    if answer and (answer != "answer" or _says(row[answer])):
        messages += _answer_messages(row, answer, used)
        used += [answer] if answer != "answer" else []
    messages = [*_earlier(row.get("history") or []), *messages]
    own = ("system", "system_prompt", "history", *used)
    return _chat(row, _with_system(row, messages), *own)


def _says(value: Any) -> bool:
    """Whether it is a text, a message or messages; else it is the solution of a problem."""
    found = value if isinstance(value, list) and value else [value]
    return isinstance(value, str) or all(isinstance(one, dict) for one in found)


def _answer_messages(row: Row, name: str, used: list[str]) -> list[Any]:
    """The answer's messages; thought and weight may stand beside a text. `used`: grows by those."""
    if not _says(row[name]):
        raise SchemaError(f"{name} is a {type(row[name]).__name__}, not a text or messages")
    messages = messages_of(row[name], "assistant")
    if not isinstance(row[name], str):
        return messages
    for key in THOUGHTS:
        if isinstance(row.get(key), str) and row[key] not in ("on", "off"):
            messages[0][key] = row[key]
            used.append(key)
    if row.get("weight") in (0, 1):
        messages[0]["weight"] = row["weight"]
        used.append("weight")
    return messages


def messages_of(value: Any, role: str) -> list[Any]:
    """Messages of a text, of one message or of several; one without a speaker is of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    found = value if isinstance(value, list) else [value]
    return [{"role": role} | one if _no_role(one) else one for one in found]


def _no_role(message: Any) -> bool:
    return isinstance(message, dict) and not {"role", "from"} & message.keys()


def _earlier(pairs: Any) -> list[Message]:
    if isinstance(pairs, list) and all(isinstance(one, dict) for one in pairs):
        return pairs
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise SchemaError("history is no list of pairs of question and answer, nor of messages")
    roles = ("user", "assistant")
    return [{"role": r, "content": t} for p in pairs for r, t in zip(roles, p, strict=True)]


def read_texts(row: Any) -> tuple[str, str]:
    """(prompt, completion) of a row of texts, for what is trained without a chat template.

    Raises SchemaError with the reason where the row has none.
    """
    if not isinstance(row, dict) or not any(key in row for key in QUESTIONS):
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else f"a {type(row).__name__}"
        wrong = misnamed(row, (*QUESTIONS, *ANSWERS)) if isinstance(row, dict) else ""
        raise SchemaError(f"no texts `prompt` and `completion`: it has {keys}{wrong}")
    prompt = row[next(key for key in QUESTIONS if key in row)]
    answer = next((row[name] for name in ANSWERS if name in row), None)
    if not isinstance(prompt, str) or not isinstance(answer, str) or not answer:
        more = ' (messages are trained with format = "chat")' if isinstance(prompt, list) else ""
        raise SchemaError(
            f"no texts `prompt` and `completion`{more}{misnamed(row, (*QUESTIONS, *ANSWERS))}"
        )
    about = row.get("input", row.get("context"))
    return (f"{prompt}\n{about}" if about and isinstance(about, str) else prompt), answer


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


QUESTIONS = ("instruction", "prompt", "question", "query")
_BEGIN, _END = "<|begin_of_text|>", "<|eot_id|>"
_TURN = re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n(.*?)<\|eot_id\|>", re.DOTALL)
_ASK = "<|start_header_id|>assistant<|end_header_id|>\n\n"


def _read_nemotron(row: Row) -> Chat:
    """Rows of the Llama-Nemotron Post-Training Dataset: SFT with `output`, RL with `args`.

    In an early revision `input` is one string, Llama 3's template already applied, and `output`
    ends with <|eot_id|>; the system prompt stands apart in later ones.
    """
    given = row["input"]
    name = next((one for one in ANSWERS if one in row and one != "answer"), "output")
    if isinstance(given, str):
        given = _turns(given) if _ASK[:21] in given else messages_of(given, "user")
    if not isinstance(row.get(name), str | None):
        raise SchemaError(f"{name} is a {type(row[name]).__name__}, not text")
    if not isinstance(given, list) or not given:
        raise SchemaError("no messages")
    messages = _with_system(row, given)
    own = ["input", name, "reasoning", "system", "system_prompt", "tools", "functions"]
    if name in row:
        told = row | {name: row[name].removesuffix(_END), "reasoning": None}
        messages = [*messages, *_answer_messages(told, name, own)]
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
    extra = {key: value for key, value in row.items() if key not in own}
    return Chat(tidy(messages), row.get("reasoning"), _tools(row), extra)


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


# By the key that tells a dialect; "input" stands in rows of pairs, too.
_READ: dict[str, Callable[[Row], Chat]] = {
    **dict.fromkeys(("messages", "conversations"), _read_messages),
    **dict.fromkeys(QUESTIONS, _read_pair),
    "input": _read_nemotron,
}
# The keys of rows that mean something here.
KEYS = (*_READ, *ANSWERS, *THOUGHTS, "tools", "functions", "system", "system_prompt", "history")
_WRITE: dict[str, Callable[[Chat], Row]] = {
    "openai": _write_openai,
    "sharegpt": _write_sharegpt,
    "alpaca": _write_alpaca,
    "nemotron": _write_nemotron,
    "nemotron-rendered": _write_rendered,
}
