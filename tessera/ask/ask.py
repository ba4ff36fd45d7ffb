"""Who is asked: requests and replies, and the three that answer them.

`Endpoint` speaks the OpenAI API to any server (vLLM, SGLang, NIM, a commercial one),
`LocalAnswerer` wraps an engine of tessera in this process, and `Embedder` an encoder, for vectors.
All hand every reply on as it comes, so that the journal has it before the next one is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from tessera.data.conversation import Message, Mode
from tessera.data.thought import CLOSE, OPEN, split
from tessera.runs.files import fingerprint


class AskError(ValueError):
    """A teacher that cannot be asked as the recipe says; the text says what to change."""


@dataclass(frozen=True, slots=True)
class Request:
    """One sample of one conversation.

    teacher: the name of its table. sample: tells several samples of the same conversation apart.
    mode: how an engine's chat template is to be asked. embed: a vector is wanted, not an answer.
    """

    teacher: str
    messages: list[Message]
    sampling: dict[str, Any] = field(default_factory=dict)
    sample: int = 0
    mode: Mode = "off"
    embed: bool = False

    def key(self, model: str) -> str:
        """What the reply is known by: all that it follows from."""
        return fingerprint([model, asdict(self)])[:32]


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. error: why nothing did; then the other fields say nothing."""

    text: str = ""
    thought: str | None = None
    finish_reason: str = "stop"
    tokens: int = 0
    vector: list[float] | None = None
    error: str | None = None

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


Receive = Callable[[Request, Reply], None]


class Answerer(Protocol):
    """The contract of whoever answers."""

    model: str

    def ask(self, requests: Iterable[Request], receive: Receive) -> None:
        """Calls `receive` once for each request, in any order, as replies come.

        Raises AskError for what no retry would mend, FailureError when too much fails.
        """
        ...
