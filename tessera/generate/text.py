"""From streamed tokens to text: tokens -> Detokenizer -> StopStrings -> Splitter -> Thought.

Each holds back what later tokens may still change: the bytes of an unfinished character, the
beginning of a stop string or of a tag. Pieces are final; they join to the text however it is cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence

from tessera.data.thought import CLOSE, OPEN, Splitter, Thought, begun, opens
from tessera.data.tokenizer import Tokenizer
from tessera.generate.engine import GenerationError, Thinking
from tessera.generate.requests import StoppingCriterion

UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character
CONTEXT = 4  # tokens before a text that decide whether its first space belongs to it
TAIL = 8  # tokens at a prompt's end that tell whether it opens a thought
MAX_HELD = 32  # tokens are held back for a whole character
# What commonly stands around a tag, and may be one token with its first or last characters.
BEFORE = ("", "\n", "\n\n", ".\n", ".", ".\n\n", " ", "!", "?", ")", "**", "`", "$", "\n```\n")
BEHIND = ("", "\n", "\n\n", " ", "The", "\n\n**")


class Detokenizer:
    """Text of tokens as they come. context: what stands before them (the prompt's last tokens).

    marks: special tokens whose names are part of the text.
    """

    def __init__(
        self, tokenizer: Tokenizer, context: Sequence[int] = (), marks: Collection[str] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self._marks = {tokenizer.token_id(mark): mark for mark in specials(tokenizer, marks)}
        self._window = list(context[-CONTEXT:])
        self._read = len(self._window)  # of the window, tokens whose text was given out
        self._shown = len(self.tokenizer.decode(self._window))
        self.unfinished = False  # whether the last token begins a character

    def push(self, token: int) -> str:
        """The text that became final with this token."""
        if token in self._marks:
            rest, self._window = self.flush(), [token]
            self._read, self._shown = 1, len(self.tokenizer.decode([token]))
            return rest + self._marks[token]
        self._window.append(token)
        text = self.tokenizer.decode(self._window)
        final = text.rstrip(UNFINISHED)
        if len(self._window) - self._read > MAX_HELD:
            final = text
        self.unfinished = len(final) < len(text)
        fresh, self._shown = final[self._shown :], max(self._shown, len(final))
        if fresh and len(final) == len(text):  # forget all but what came since the last whole text
            self._window = self._window[self._read :]
            self._read = len(self._window)
            self._shown = len(self.tokenizer.decode(self._window))
        return fresh

    def flush(self) -> str:
        """The rest of the text before what comes next."""
        text = self.tokenizer.decode(self._window)
        rest, self._shown = text[self._shown :], max(self._shown, len(text))
        self.unfinished = False
        return rest


def specials(tokenizer: Tokenizer, marks: Collection[str]) -> list[str]:
    """Those of the marks that are special tokens, which decoding leaves out."""
    known = [mark for mark in marks if tokenizer.token_id(mark) is not None]
    named = tokenizer.special_tokens if known else ()
    return [mark for mark in known if mark in named]


class StopStrings:
    """Cuts a text before the stop string that is complete first; `stopped` says it was there."""

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise GenerationError("a stop string is empty; leave it out, or give its characters")
        self.stops = tuple(stops)
        self.stopped = False
        self._held = ""

    def push(self, text: str) -> str:
        """What is certainly before any stop string."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(text.find(stop) + len(stop), -len(stop)) for stop in self.stops if stop in text]
        if found:
            end, size = min(found)
            self.stopped, self._held = True, ""
            return text[: end + size]
        keep = begun(text, self.stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def opens_thought(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether a prompt ends with `<think>`, so that what follows begins inside the thought."""
    return opens(tokenizer.decode(prompt[-TAIL:], special=True))


def completion_text(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of a whole completion, without its stop token.

    Begins with `<think>` where the prompt ended with it: it can be split without the prompt.
    """
    ended = bool(tokens) and tokens[-1] in tokenizer.eos_ids
    text = tokenizer.decode(tokens[: len(tokens) - ended])
    return OPEN + text if opens_thought(tokenizer, prompt) else text


class TextStream:
    """Tokens of one completion in, pieces of thought and answer out.

    prompt: its tokens, for the first space. stops: strings the text ends before; once `stopped`,
    later tokens add nothing. opened: whether the prompt ended with `<think>`; None: all the text
    is answer, whatever tags stand in it. marks: special tokens that are part of the text, beside
    the tags of thoughts. ends: tokens that have no text.

    pieces: the text of each token, thought and answer alike; given: how many of its characters
    are final, and before any stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        stops: Sequence[str] = (),
        opened: bool | None = False,
        marks: Collection[str] = (),
        ends: Collection[int] = (),
    ) -> None:
        self._ends = ends
        marks = marks if opened is None else (*marks, OPEN, CLOSE)
        self._detokenizer = Detokenizer(tokenizer, prompt, marks)
        self.pieces: list[str] = []
        self.given = 0
        self._stops = StopStrings(stops)
        self._splitter = None if opened is None else Splitter(opened)
        self.thought_tokens = 0  # those that came before the answer, the tags' among them

    @property
    def stopped(self) -> bool:
        return self._stops.stopped

    @property
    def unfinished(self) -> bool:
        """Whether the last token begins a character, and may be given more text."""
        return self._detokenizer.unfinished

    def push(self, tokens: Sequence[int]) -> Thought:
        """What these tokens make final."""
        piece = Thought()
        for token in tokens:
            text = self._flush() if token in self._ends else self._detokenizer.push(token)
            self.pieces.append("" if token in self._ends else text)
            piece += self._split(self._stops.push(text))
        return piece

    def finish(self) -> Thought:
        """The rest, where no more tokens come."""
        piece = self._split(self._stops.push(self._flush()) + self._stops.flush())
        return piece if self._splitter is None else piece + self._splitter.flush()

    def _flush(self) -> str:
        """The rest of the text so far, which belongs to the last token."""
        rest = self._detokenizer.flush()
        if self.pieces:
            self.pieces[-1] += rest
        return rest

    def _split(self, text: str) -> Thought:
        self.given += len(text)
        if self._splitter is None:
            return Thought(answer=text)
        thinking = self._splitter.thinking
        piece = self._splitter.push(text)
        if thinking or self._splitter.thinking:
            self.thought_tokens = len(self.pieces)
        return piece


def stop_criterion(
    tokenizer: Tokenizer, stops: Sequence[str], prompt: Sequence[int] = ()
) -> Callable[[], StoppingCriterion]:
    """For `submit(stopping=…)`: ends a sample with the token that completes a stop string."""

    def make() -> StoppingCriterion:
        stream = TextStream(tokenizer, prompt, stops, opened=None)

        def stops_at(token: int) -> bool:
            stream.push([token])
            return stream.stopped

        return stops_at

    return make


def thinking_budget(tokenizer: Tokenizer, max_tokens: int, opened: bool = False) -> Thinking:
    """A budget for thoughts between `<think>` and `</think>`, as this tokenizer writes them."""
    close = tuple(tokenizer.encode(f"\n{CLOSE}\n\n", special=True))
    starts = () if opened else _spellings(tokenizer, OPEN, ("", "\n"))
    return Thinking(max_tokens, (close, *_spellings(tokenizer, CLOSE, BEFORE)), starts)


def _spellings(
    tokenizer: Tokenizer, tag: str, before: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    """The token sequences that hold the tag, in each of some surroundings."""
    found = {}
    for prefix, suffix in itertools.product(before, BEHIND):
        text = prefix + tag + suffix
        ids = tokenizer.encode(text, special=True)
        lengths = [len(tokenizer.decode(ids[:i], special=True)) for i in range(len(ids) + 1)]
        if lengths[-1] != len(text):  # a decoder that drops a space: not to be located
            continue
        first = max(i for i, length in enumerate(lengths) if length <= len(prefix))
        last = min(i for i, n in enumerate(lengths) if n >= len(prefix) + len(tag))
        found[tuple(ids[first:last])] = None
    return tuple(found)
