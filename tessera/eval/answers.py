"""Asking a model every question of its tasks, each answer kept as it comes.

A record's key is the hash of all that its answer follows from (model, task, messages, mode,
sampling, sample), so a stopped evaluation asks only what is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from tessera.ask.ask import Answerer, Reply, Request, ask_all
from tessera.data.chat import without_old_thoughts
from tessera.data.conversation import Message, Mode
from tessera.data.switch import NONE, set_switch
from tessera.data.thought import CLOSE, OPEN
from tessera.eval.task import Item, Task
from tessera.progress import Progress
from tessera.runs.files import AnyJournal
from tessera.runs.recipe import Config

Thinking = Literal["on", "off", "both"]


class Sampling(Config):
    """How answers are drawn; samples: of each item."""

    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    samples: int = Field(default=1, ge=1)


@dataclass(frozen=True, slots=True)
class Asker:
    """Who answers, and how it is told to think.

    says_switch: the messages carry the switch (an endpoint); else a model of this process is told
    by its own encoder. variables: further ones of its chat template.
    """

    teacher: Answerer
    says_switch: bool
    switch: str = NONE
    variables: Mapping[str, Any] = field(default_factory=dict)

    def request(
        self,
        task: Task,
        messages: Sequence[Message],
        mode: Mode | None,
        sampling: dict[str, Any],
        n: int,
    ) -> Request:
        said, variables = without_old_thoughts(messages), dict(self.variables)
        if self.says_switch:
            said, own = set_switch(said, mode, self.switch)
            variables = own | variables
        if variables:
            sampling = {**sampling, "chat_template_kwargs": variables}
        return Request(task.name, said, sampling, n, mode)


@dataclass(slots=True)
class Conversation:
    """One item, mode and sample, with its answers; failed: why the last one is missing.

    mode: None where the model has no switch and is asked as it is.
    """

    task: Task
    item: Item
    mode: Mode | None
    sample: int
    sampling: dict[str, Any]
    messages: list[Message] = field(default_factory=list)
    turns: int = 0
    key: str = ""  # of its last record
    tokens: int = 0
    finish_reason: str = ""
    completion: str = ""
    failed: str = ""

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    def take(self, key: str, row: dict[str, Any]) -> str | None:
        """Adds an answer; returns what is said next, None where nothing is."""
        self.key, self.turns = key, self.turns + 1
        self.tokens += row["tokens"]
        self.finish_reason = row["finish_reason"]
        self.completion = text = row["text"]
        if row["thought"] is not None:  # a thought that led to no answer stays open
            self.completion = f"{OPEN}{row['thought']}{CLOSE if text else ''}{text}"
        self.messages.append({"role": "assistant", "content": self.completion})
        return self.task.goes_on(self.item, self.messages)


def conversations(
    task: Task,
    items: Sequence[Item],
    modes: Iterable[Mode | None],
    samplings: Mapping[Mode | None, Sampling],
    max_tokens: int | None,
) -> Iterator[Conversation]:
    """Every item in every mode, `samples` times; samples of one item stand together."""
    for mode in modes:
        drawn = samplings[mode]
        sampling = {
            "max_tokens": max_tokens or task.max_tokens,
            "temperature": drawn.temperature,
            "top_p": drawn.top_p,
        }
        for item in items:
            for number in range(drawn.samples):
                yield Conversation(task, item, mode, number, sampling, list(item.messages))


def answer(
    chats: Sequence[Conversation], asker: Asker, records: AnyJournal, *, label: str, quiet: bool
) -> None:
    """Brings every conversation to its end, from the records where they have it.

    Raises what the teacher raises; what was answered until then is in the records.
    """
    waiting = list(chats)
    while waiting:
        waiting = list(_one_turn(waiting, asker, records, label, quiet))


def _one_turn(
    chats: Sequence[Conversation], asker: Asker, records: AnyJournal, label: str, quiet: bool
) -> Iterator[Conversation]:
    """Asks each conversation's next question; yields those that go on."""
    asked = [
        asker.request(one.task, one.messages, one.mode, one.sampling, one.sample) for one in chats
    ]
    keys = [request.key(asker.teacher.model) for request in asked]
    missing = {
        key: (one, request)
        for key, one, request in zip(keys, chats, asked, strict=True)
        if key not in records
    }
    failed: dict[str, str] = {}

    def receive(request: Request, reply: Reply) -> None:
        key = request.key(asker.teacher.model)
        if reply.error is None:
            records.add(key, _record(missing[key][0], request, reply))
        else:
            failed[key] = reply.error

    with Progress(label, len(chats), "tokens", steps="answers", quiet=quiet) as progress:
        progress.advance(len(chats) - len(missing), 0)
        if missing:
            ask_all(asker.teacher, (one for _, one in missing.values()), receive, progress)
    for key, chat in zip(keys, chats, strict=True):
        if key in failed:
            chat.failed = failed[key]
            continue
        said = chat.take(key, records.get(key))
        if said is not None:
            chat.messages.append({"role": "user", "content": said})
            yield chat


def _record(chat: Conversation, request: Request, reply: Reply) -> dict[str, Any]:
    """What is kept of an answer."""
    return {
        "task": chat.task.name,
        "item": chat.item.id,
        "mode": chat.mode or NONE,
        "sample": chat.sample,
        "turn": chat.turns,
        "messages": request.messages,
        "prompt": reply.prompt,
        "thought": reply.thought,
        "text": reply.text,
        "tokens": reply.tokens,
        "finish_reason": reply.finish_reason,
    }
