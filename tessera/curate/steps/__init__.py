"""What a step is, in four kinds.

    row   apply(chat) -> chats or Drop             nothing but the row itself
    batch apply_all(chats)                         the same, many rows at once in numpy
    set   digest(chats), decide(digests), apply    what all rows together decide
    ask   requests(chat), receive(chat, replies)   what a model is asked for

A step is the config of its table, frozen, with these methods: a recipe's `[[curate.steps]]` is
validated into the very objects that run. `digest` gives some bytes a row, `decide` sees those of
the whole set and no text, and its verdicts come back to the rows one by one: so a set step spreads
over processes and needs the memory of its digests, however long the rows are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from tessera.ask.ask import Reply, Request
from tessera.curate.steps.rows import Drop
from tessera.data.conversation import Chat

Result = Chat | Drop | Sequence[Chat | Drop]


@runtime_checkable
class RowStep(Protocol):
    """A step that looks at one row."""

    step: str

    def apply(self, chat: Chat) -> Result:
        """The row, several made of it, or why it is left out."""
        ...


@runtime_checkable
class BatchStep(Protocol):
    """A row step that is faster over many rows."""

    step: str

    def apply_all(self, chats: Sequence[Chat]) -> Sequence[Result]:
        """What becomes of each row."""
        ...


@runtime_checkable
class SetStep(Protocol):
    """A step that decides over all rows together."""

    step: str

    def digest(self, chats: Sequence[Chat]) -> NDArray[Any]:
        """(rows, …) what has to be known of each row."""
        ...

    def decide(self, digests: NDArray[Any], seed: int) -> NDArray[Any]:
        """(rows,) verdicts, from the digests of the whole set in order."""
        ...

    def judge(self, chat: Chat, verdict: Any) -> Result:
        """What becomes of a row."""
        ...


@runtime_checkable
class AskStep(Protocol):
    """A step that asks a model."""

    step: str

    def requests(self, chat: Chat) -> list[Request]:
        """What is asked for a row; none leaves it as it is."""
        ...

    def receive(self, chat: Chat, replies: Sequence[Reply]) -> Result:
        """What becomes of a row, given the replies to its requests in order."""
        ...


Step = RowStep | BatchStep | SetStep | AskStep
