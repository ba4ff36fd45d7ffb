"""What of an assistant's text is thought and what is answer: one rule for training, rewards,
evaluation and serving.

A text has a thought if it begins with `<think>` (after white space), or if its prompt ended with
the tag (`opened`). The thought ends at the first `</think>`; without one all of it is thought and
the answer is "". Tags elsewhere are the answer's text: an answer may speak of `</think>`. White
space around the thought, and before the answer behind it, is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Thought:
    """A text in two parts, or a piece of it in a stream.

    thought: None where the text has none. closed: whether `</think>` ended it.
    """

    thought: str | None = None
    answer: str = ""
    closed: bool = False

    def __add__(self, more: Thought) -> Thought:
        none = self.thought is None and more.thought is None
        thought = None if none else (self.thought or "") + (more.thought or "")
        return Thought(thought, self.answer + more.answer, self.closed or more.closed)


def split(text: str, opened: bool = False) -> Thought:
    """Thought and answer of a whole text. opened: its prompt ended with `<think>`."""
    splitter = Splitter(opened)
    return splitter.push(text) + splitter.flush()


def split_message(message: Mapping[str, Any]) -> Thought:
    """Of an assistant's message; beside `reasoning_content`, all of its content is the answer."""
    apart = message.get("reasoning_content")
    if isinstance(apart, str):
        return Thought(apart.strip(), message["content"], closed=True)
    return split(message["content"])


def opens(prompt: str) -> bool:
    """Whether a prompt ends with `<think>`, so that what follows begins inside the thought."""
    return prompt.rstrip().endswith(OPEN)


class Splitter:
    """Splits a text that comes in pieces; the results add up to `split` of the whole text."""

    def __init__(self, opened: bool = False) -> None:
        self.thinking, self.answering = opened, False  # neither: nothing but white space came yet
        self._held = ""
        self._fresh = opened  # only white space came since the tag; it is dropped

    def push(self, text: str) -> Thought:
        """What is certain with this piece; the rest is held back."""
        self._held += text
        if not (self.thinking or self.answering):
            start = self._held.lstrip()
            if start.startswith(OPEN):
                self.thinking, self._fresh = True, True
                self._held = start[len(OPEN) :]
            else:
                self.answering = not OPEN.startswith(start)
        piece = Thought()
        if self.thinking:
            piece = self._thought()
        if self.answering:
            held, self._held = self._held, ""
            piece += Thought(answer=self._trimmed(held))
        return piece

    def flush(self) -> Thought:
        """What was held back, where the text ends here."""
        rest, self._held = self._trimmed(self._held), ""
        return Thought(rest.rstrip()) if self.thinking else Thought(answer=rest)

    def _thought(self) -> Thought:
        thought, close, rest = self._held.partition(CLOSE)
        if close:
            piece = Thought(self._trimmed(thought).rstrip(), closed=True)
            self.thinking, self.answering, self._held, self._fresh = False, True, rest, True
            return piece
        # White space waits with the tag: only what follows says whether it is inside the thought.
        kept = thought[: len(thought) - begun(thought, [CLOSE])].rstrip()
        self._held = self._held[len(kept) :]
        return Thought(self._trimmed(kept))

    def _trimmed(self, text: str) -> str:
        if self._fresh:
            text = text.lstrip()
            self._fresh = not text
        return text


def begun(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a mark."""
    longest = min(len(text), max(map(len, marks), default=1) - 1)
    for size in range(longest, 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks):
            return size
    return 0
