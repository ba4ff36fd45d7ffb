"""What a step is, and what it reads of a row.

A step is the config of its table (`[[curate.steps]]`) and the object that runs:

    RowStep   apply(chat)                what becomes of a row: rows, or why it is left out
    SetStep   digest(chats)              (rows, …) what has to be known of each row
              decide(digests)            (rows,) verdicts, from the whole set in order
              judge(chat, verdict)       what becomes of a row
    AskStep   requests(chat)             what a model is asked for a row; none: it stays
              receive(chat, replies)     what becomes of it, by the replies in order

A row is a `Chat`. What steps find stands in its `extra` under the keys of the Llama-Nemotron data
and NeMo-Skills; `lineage` lists the row's file and line, then each step that wrote into it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from tessera.ask.ask import Reply, Request
from tessera.data.conversation import Chat, Message
from tessera.data.thought import split_message
from tessera.runs.recipe import Config

Field = Literal["question", "answer", "all"]
EXCERPT = 200


@dataclass(frozen=True, slots=True)
class Drop:
    """A row that is left out; the reason is what it is counted under."""

    reason: str


Result = Chat | Drop | Sequence[Chat | Drop]


class RowStep(Config):
    step: str

    def apply(self, chat: Chat) -> Result:
        raise NotImplementedError


class SetStep(Config):
    """reorders: the verdicts are the numbers of the rows in their new order."""

    step: str
    reorders: ClassVar[bool] = False

    def digest(self, chats: Sequence[Chat]) -> NDArray[Any]:
        raise NotImplementedError

    def decide(self, digests: NDArray[Any], seed: int) -> NDArray[Any]:
        raise NotImplementedError

    def judge(self, chat: Chat, verdict: Any) -> Result:
        return chat


class AskStep(Config):
    """teacher: a table of `curate.teachers`."""

    step: str
    teacher: str = "teacher"

    def requests(self, chat: Chat) -> list[Request]:
        raise NotImplementedError

    def receive(self, chat: Chat, replies: Sequence[Reply]) -> Result:
        raise NotImplementedError

    def failed(self, error: str) -> Drop:
        return Drop(f"{self.teacher}: {error[:120]}")


def prompt_of(chat: Chat) -> list[Message]:
    """All messages before the last answer."""
    return chat.messages[:-1] if chat.answered else chat.messages


def question(chat: Chat) -> str:
    """The text before the last answer, without system prompts."""
    return "\n".join(one["content"] for one in prompt_of(chat) if one["role"] != "system")


def thought(chat: Chat) -> str | None:
    """The thought of the last answer; None for no answer, or one without a thought."""
    return split_message(chat.messages[-1]).thought if chat.answered else None


def answer(chat: Chat) -> str:
    """The last answer without its thought; "" for a prompt."""
    return split_message(chat.messages[-1]).answer if chat.answered else ""


def text_of(chat: Chat, field: str) -> str:
    """The text that a step looks at; "completion" is thought and answer, "all" every message."""
    if field == "question":
        return question(chat)
    if field == "answer":
        return answer(chat)
    if field == "thought":
        return thought(chat) or ""
    if field == "completion":
        return "\n".join(filter(None, (thought(chat), answer(chat))))
    return "\n".join(one.get("reasoning_content", "") + one["content"] for one in chat.messages)


def text_hash(text: str) -> int:
    """64 bits of a text without the white space around it."""
    return int.from_bytes(blake2b(text.strip().encode("utf-8", "replace"), digest_size=8).digest())


def keyed(chats: Sequence[Chat], marks: Iterable[int]) -> NDArray[Any]:
    """(rows, 2): the hash of each row's question, and its mark."""
    hashes = [text_hash(question(chat)) for chat in chats]
    return np.array([hashes, list(marks)], np.uint64).T.reshape(len(chats), 2)


def tagged(chat: Chat, step: str, **found: Any) -> Chat:
    """The chat with what a step found, and the step in its lineage."""
    return replace(chat, extra={**chat.extra, **found, "lineage": [*_lineage(chat), step]})


def answered(chat: Chat, message: Message) -> Chat:
    """The chat with this message as its answer, in place of the one it had."""
    return replace(chat, messages=[*prompt_of(chat), message])


def removed_line(chat: Chat, step: str, reason: str) -> str:
    """A line of `removed/`."""
    place = str(next(iter(_lineage(chat)), "unknown"))
    row = {"row": place, "step": step, "reason": reason, "excerpt": question(chat)[:EXCERPT]}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _lineage(chat: Chat) -> list[str]:
    found = chat.extra.get("lineage", [])
    return found if isinstance(found, list) else [str(found)]
