"""The budget of a thought: after so many tokens its end is forced, and the answer goes on.

An automaton over the tokens of one completion, waiting -> thinking -> closing -> answering. It
sees ids only; which ids open and close a thought is the caller's to say (`Thinking`).
"""

from __future__ import annotations

from enum import Enum

from tessera.generate.engine import Thinking


class Stage(Enum):
    """Where a completion is: before the thought, in it, or behind it."""

    WAITING = 0
    THINKING = 1
    ANSWERING = 2


class Thought:
    """Follows one completion: `push` each token; `forced` is what the next must be, if anything."""

    def __init__(self, thinking: Thinking) -> None:
        self.thinking = thinking
        self.stage = Stage.WAITING if thinking.starts else Stage.THINKING
        self.tokens = 0  # of the thought so far
        self._tail: list[int] = []
        self._pending: list[int] = []
        self._memory = max(map(len, (*thinking.starts, *thinking.ends)))
        self._watch_budget()

    @property
    def forced(self) -> int | None:
        """The token that must come next; None where the model chooses."""
        return self._pending[-1] if self._pending else None

    def push(self, token: int) -> None:
        """The token that came."""
        if self.stage is Stage.ANSWERING:
            return
        self._tail = [*self._tail, token][-self._memory :]
        if self.stage is Stage.WAITING:
            if _ends_with(self._tail, self.thinking.starts):
                self.stage, self._tail = Stage.THINKING, []
                self._watch_budget()
            return
        self.tokens += 1
        if self._pending:
            self._pending.pop()
            if not self._pending:
                self.stage = Stage.ANSWERING
        elif _ends_with(self._tail, self.thinking.ends):
            self.stage = Stage.ANSWERING
        else:
            self._watch_budget()

    def _watch_budget(self) -> None:
        if self.stage is Stage.THINKING and self.tokens >= self.thinking.max_tokens:
            self._pending = self._remainder()[::-1]

    def _remainder(self) -> list[int]:
        """What closes the thought: of the end the model has begun, the rest; else a whole one."""
        begun = (
            (have, end)
            for end in self.thinking.ends
            for have in range(len(end) - 1, 0, -1)
            if self._tail[-have:] == list(end[:have])
        )
        have, end = max(begun, key=lambda pair: pair[0], default=(0, self.thinking.ends[0]))
        return list(end[have:])


def _ends_with(tail: list[int], sequences: tuple[tuple[int, ...], ...]) -> bool:
    return any(tuple(tail[-len(sequence) :]) == sequence for sequence in sequences)
