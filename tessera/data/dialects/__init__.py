"""Rows of chat data in every dialect, read into one form and written back.

    read_row(row)                    a Chat; the dialect is told by the row's keys
    write_row(chat, "sharegpt")      read_row(write_row(chat, any dialect)) = chat

`read_chats` reads a whole file: JSON lines, a JSON list or Parquet. A row that is no conversation
is `Bad` with its number and the reason, as a broken line of any other source is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from tessera.data.conversation import Chat, SchemaError, check
from tessera.data.dialects import alpaca, nemotron, openai, sharegpt
from tessera.data.readers import EXCERPT, Bad, DataError, read_rows
from tessera.runs.files import writing

Dialect = Literal["nemotron", "nemotron-rendered", "openai", "sharegpt", "alpaca"]
_READ: dict[str, tuple[Callable[[dict[str, Any]], bool], Callable[[dict[str, Any]], Chat]]] = {
    "openai": (openai.is_row, openai.read),
    "sharegpt": (sharegpt.is_row, sharegpt.read),
    "alpaca": (alpaca.is_row, alpaca.read),
    "nemotron": (nemotron.is_row, nemotron.read),
}
_WRITE: dict[str, Callable[[Chat], dict[str, Any]]] = {
    "openai": openai.write,
    "sharegpt": sharegpt.write,
    "alpaca": alpaca.write,
    "nemotron": nemotron.write,
    "nemotron-rendered": nemotron.write_rendered,
}


class DialectError(SchemaError):
    """A row whose keys are those of no dialect."""


def dialect_of(row: dict[str, Any]) -> str:
    """The dialect of a row by its keys. Raises DialectError for none."""
    for name, (is_row, _) in _READ.items():
        if is_row(row):
            return name
    raise DialectError(
        f"no row of a known dialect: it has {', '.join(map(str, row)) or 'no keys'}, and none of "
        "messages, conversations, instruction, input"
    )


def read_row(row: Any) -> Chat:
    """The chat of a row. Raises SchemaError with the reason where it is no conversation."""
    if not isinstance(row, dict):
        raise SchemaError(f"a {type(row).__name__}, not an object")
    return check(_READ[dialect_of(row)][1](row))


def write_row(chat: Chat, dialect: Dialect = "openai") -> dict[str, Any]:
    """The row of a chat. Raises SchemaError for what the dialect has no words for."""
    return _WRITE[dialect](chat)


def write_rows(path: Path, chats: Iterable[Chat], dialect: str = "openai") -> int:
    """Writes chats as JSON lines, whole or not at all; returns their number.

    Raises SchemaError for an unknown dialect, and for what the dialect has no words for.
    """
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
            if number == 1 and isinstance(error, DialectError):
                raise DataError(f"{label}:1 is {error}") from None
            excerpt = json.dumps(row, ensure_ascii=True, default=str)[:EXCERPT]
            yield number, Bad(label, number, str(error), excerpt)
