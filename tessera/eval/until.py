"""Completions as a benchmark's task reads them: the answer, up to the task's stop string.

A stop string counts in the answer alone: `"\\n\\n"` ends a sentence of a thought, and must not end
the thought. The text is that of the completion's tokens by themselves, as evaluations read it, so
a tokenizer that writes a space before each word drops the first. It renders no prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tessera.data.thought import Splitter, split
from tessera.data.tokenizer import Tokenizer
from tessera.generate.engine import SamplingParams
from tessera.generate.requests import Handle
from tessera.generate.text import Detokenizer, StopStrings, opens_thought
from tessera.generate.torch_engine import TorchEngine


@dataclass(frozen=True, slots=True)
class Wanted:
    """One completion that is wanted.

    key: what its randomness follows from, beside the seed. keep_thought: the thought is part of
    the text, and its stop strings count there too.
    """

    prompt: list[int]
    params: SamplingParams
    stops: tuple[str, ...] = ()
    key: int = 0
    keep_thought: bool = False


class Answer:
    """Tokens of a completion in, its text out. Where a thought led to no answer it is ""."""

    def __init__(self, tokenizer: Tokenizer, wanted: Wanted) -> None:
        opened = opens_thought(tokenizer, wanted.prompt)
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(wanted.stops)
        self._splitter = None if wanted.keep_thought else Splitter(opened)
        self._thinks = False
        self._text = ""

    def push(self, token: int) -> bool:
        """Whether the text has come to a stop string: a stopping criterion of the engine."""
        self._add(self._detokenizer.push(token))
        return self._stops.stopped

    def finish(self) -> str:
        """All of it, where no more tokens come."""
        self._add(self._detokenizer.flush())
        if self._splitter is not None:
            self._text += self._stops.push(self._splitter.flush().answer)
        self._text += self._stops.flush()
        whole = self._splitter is None or self._thinks
        return self._text if whole else split(self._text).answer

    def _add(self, text: str) -> None:
        if self._splitter is not None:
            piece = self._splitter.push(text)
            self._thinks |= piece.thought is not None
            text = piece.answer
        self._text += self._stops.push(text)


def complete(
    engine: TorchEngine,
    tokenizer: Tokenizer,
    wanted: Sequence[Wanted],
    *,
    batch: int,
    room: int,
) -> Iterator[tuple[int, str]]:
    """(its index, its text) of each completion, as they end.

    room: tokens of a prompt and its completion, which ends there at the latest. The longest
    prompts go first, and beside `batch` that decode as many wait, so that rows are never empty.
    Raises GenerationError; what is unfinished when the caller leaves is cancelled.
    """
    left = iter(sorted(range(len(wanted)), key=lambda i: -len(wanted[i].prompt)))
    flying: dict[int, Handle] = {}
    try:
        while True:
            while len(flying) < 2 * batch and (i := next(left, None)) is not None:
                flying[i] = _submit(engine, tokenizer, wanted[i], room)
            if not flying:
                return
            engine.step()
            for i in [i for i, handle in flying.items() if handle.done]:
                (completion,) = flying.pop(i).result()
                yield i, _text(tokenizer, wanted[i], completion.token_ids)
    finally:
        for handle in flying.values():
            handle.cancel()


def _submit(engine: TorchEngine, tokenizer: Tokenizer, one: Wanted, room: int) -> Handle:
    most = min(one.params.max_tokens, room - len(one.prompt))
    params = dataclasses.replace(one.params, max_tokens=most)
    stopping = (lambda: Answer(tokenizer, one).push) if one.stops else None
    return engine.submit(one.prompt, params, key=one.key, stopping=stopping)


def _text(tokenizer: Tokenizer, one: Wanted, tokens: Sequence[int]) -> str:
    answer = Answer(tokenizer, one)
    ended = bool(tokens) and tokens[-1] in one.params.stop_token_ids
    for token in tokens[: len(tokens) - ended]:
        answer.push(token)
    return answer.finish()
