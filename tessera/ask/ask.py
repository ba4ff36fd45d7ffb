"""The contract for asking a model: requests, replies, and `Answerer`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from pydantic import TypeAdapter

from tessera.data.conversation import Message, Mode
from tessera.data.thought import CLOSE, OPEN, split
from tessera.progress import Progress
from tessera.runs.files import fingerprint


class AskError(ValueError):
    """A configuration with which nothing can be asked; the text says what to change."""


@dataclass(frozen=True, slots=True)
class Request:
    """One sample of one conversation.

    teacher: the name of its table. sampling: with `chat_template_kwargs`, if any. sample: numbers
    the samples of one conversation. mode: what a model of this process is told by its own switch,
    None: nothing. embed: a vector is wanted instead of an answer.
    """

    teacher: str
    messages: list[Message]
    sampling: dict[str, Any] = field(default_factory=dict)
    sample: int = 0
    mode: Mode | None = None
    embed: bool = False

    def key(self, model: str) -> str:
        """The journal's key of the reply: a hash of everything it depends on."""
        return fingerprint([model, asdict(self)])[:32]


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. Where `error` is set, the other fields mean nothing.

    prompt: the text that the model was given, its template rendered; None where a server did that.
    """

    text: str = ""
    thought: str | None = None
    finish_reason: str = "stop"
    tokens: int = 0
    vector: list[float] | None = None
    error: str | None = None
    prompt: str | None = None

    @classmethod
    def read(cls, row: Any) -> Reply | None:
        """The reply that `asdict` made a row of; None where the row holds other types."""
        try:
            return _replies().validate_python(row)
        except ValueError:
            return None

    @property
    def answer(self) -> str:
        """The text behind the thought, also where a server left the thought in the text."""
        return self.text if self.thought is not None else split(self.text).answer

    @property
    def message(self) -> Message:
        """The reply as a turn of a chat, its thought between tags before the answer."""
        if self.thought is None:
            return {"role": "assistant", "content": self.text}
        text = f"{OPEN}\n{self.thought.strip()}\n{CLOSE}\n\n{self.text.lstrip()}"
        return {"role": "assistant", "content": text}


@functools.cache
def _replies() -> TypeAdapter[Reply]:
    return TypeAdapter(Reply)


Receive = Callable[[Request, Reply], None]
# Called now and then with the tokens of the replies under way, and how many these are.
Working = Callable[[int, int], None]


class Answerer(Protocol):
    """An `Endpoint`, a `LocalAnswerer` or an `Embedder`."""

    model: str

    def ask(
        self, requests: Iterable[Request], receive: Receive, working: Working | None = None
    ) -> None:
        """Call `receive` once for each request, in any order, as replies come, to journal them.

        Raises AskError for what a retry cannot fix, FailureError when too many requests fail.
        """


def ask_all(
    teacher: Answerer, requests: Iterable[Request], receive: Receive, progress: Progress
) -> None:
    """`Answerer.ask` with its progress shown, by replies and tokens."""

    def received(request: Request, reply: Reply) -> None:
        receive(request, reply)
        progress.advance(1, reply.tokens or 1)

    teacher.ask(requests, received, progress.working)
