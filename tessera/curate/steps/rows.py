"""What flows through `curate`: chats, and why one was left out.

A row is a `Chat` (data/conversation.py). What steps find out stands in its `extra`, under the keys
that the Llama-Nemotron data and NeMo-Skills use where they have one: `license`, `generator`,
`category`, `problem_type`, `expected_answer`, `predicted_answer`, `correct`, `pass_rate`. `lineage`
is a list: the file and line that the row came from, then every step that wrote into it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Literal

from tessera.data.conversation import Chat, Message
from tessera.data.thought import split_message

Field = Literal["question", "answer", "all"]
EXCERPT = 200


@dataclass(frozen=True, slots=True)
class Drop:
    """A row that goes no further; the reason is what it is counted under."""

    reason: str


def question(chat: Chat) -> str:
    """What is asked: all messages before the last answer, system prompts left out."""
    asked = chat.messages[:-1] if chat.answered else chat.messages
    return "\n".join(one["content"] for one in asked if one["role"] != "system")


def thought(chat: Chat) -> str | None:
    """The thought of the last answer; None for no answer, or one without a thought."""
    return split_message(chat.messages[-1]).thought if chat.answered else None


def answer(chat: Chat) -> str:
    """The last answer without its thought; "" for a prompt."""
    return split_message(chat.messages[-1]).answer if chat.answered else ""


def text_of(chat: Chat, field: Field) -> str:
    """The text that a step looks at; "all" holds thoughts, too."""
    if field == "question":
        return question(chat)
    if field == "answer":
        return answer(chat)
    texts = [one.get("reasoning_content", "") + one["content"] for one in chat.messages]
    return "\n".join(texts)


def tagged(chat: Chat, step: str, **found: Any) -> Chat:
    """The chat with what a step found out, and that step in its lineage."""
    lineage = [*_lineage(chat), step]
    return replace(chat, extra={**chat.extra, **found, "lineage": lineage})


def asked_anew(chat: Chat, text: str) -> Chat:
    """The prompt that asks `text` instead, the system prompt kept."""
    system = [one for one in chat.messages[:1] if one["role"] == "system"]
    return replace(chat, messages=[*system, {"role": "user", "content": text}])


def answered(chat: Chat, message: Message) -> Chat:
    """The chat with this message as its answer, in place of the one it had."""
    asked = chat.messages[:-1] if chat.answered else chat.messages
    return replace(chat, messages=[*asked, message])


def where(chat: Chat) -> str:
    """Where the row came from: the first word of its lineage."""
    return str(next(iter(_lineage(chat)), "unknown"))


def removed_line(chat: Chat, step: str, reason: str) -> str:
    """The line that tells of a row that was left out."""
    told = {"row": where(chat), "step": step, "reason": reason, "excerpt": question(chat)[:EXCERPT]}
    return json.dumps(told, ensure_ascii=False) + "\n"


def _lineage(chat: Chat) -> list[str]:
    found = chat.extra.get("lineage", [])
    return found if isinstance(found, list) else [str(found)]
