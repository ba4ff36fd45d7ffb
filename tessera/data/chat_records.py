"""Chats as documents of a source: files of rows in, one line of JSON a chat out.

What decides a chat's side is its first question, so that the two variants of one question,
reasoning on and off, are held out together. What is no chat is `Bad`, and so is a row that
contradicts its switch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tessera.data.conversation import Chat, Mode, fault
from tessera.data.dataset import DatasetPart, read_dataset_rows
from tessera.data.dialects import chats_of, read_chats
from tessera.data.readers import EXCERPT, Bad, Text

CHAT_FORMAT = "chat-1"  # of what stands in the cache


def chat_records(path: Path, mode: Mode | None) -> Iterator[Text | Bad]:
    """The chats of a file that may be trained on, of one mode or of both, and what is none."""
    return trainable(str(path), read_chats(path), mode)


def dataset_records(part: DatasetPart, mode: Mode | None) -> Iterator[Text | Bad]:
    """The same of the rows of a Hugging Face dataset."""
    return trainable(part.label, chats_of(part.label, read_dataset_rows(part)), mode)


def trainable(
    label: str, chats: Iterable[tuple[int, Chat | Bad]], mode: Mode | None
) -> Iterator[Text | Bad]:
    """What may be trained on of numbered chats."""
    for number, chat in chats:
        if isinstance(chat, Bad):
            yield chat
        elif mode is None or chat.mode == mode:
            if reason := fault(chat):
                yield Bad(label, number, reason, chat.to_json()[:EXCERPT])
            else:
                yield as_text(chat, number)


def as_text(chat: Chat, line: int = 0) -> Text:
    """A chat as a document of a source."""
    question = next(one["content"] for one in chat.messages if one["role"] == "user")
    return Text(chat.to_json(), key=question.strip(), line=line)


def spoken(text: str) -> str:
    """What is said in a chat: a tokenizer is trained on that, and not on JSON."""
    return "\n".join(message["content"] for message in Chat.from_json(text).messages)
