"""Samples as the API's JSON: whole replies, and the events of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from tessera.data.calls import Call, CallReader
from tessera.data.tokenizer import Tokenizer
from tessera.generate.requests import Delta, Handle, read_all
from tessera.generate.text import Detokenizer, TextStream
from tessera.generate.token_bytes import TokenBytes

REASONS = {"stop": "stop", "length": "length", "timeout": "length", "cancelled": "stop"}
LEAST = -9999.0  # a log-prob of minus infinity, which JSON cannot say, in OpenAI's API


@dataclass(slots=True)
class Entry:
    """A token of a text. logprob, top: None for the first token of a prompt."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]] | None
    text: str = ""
    offset: int = 0
    cut: int | None = 0  # bytes off its end, by a stop string; None: all of them


@dataclass(frozen=True)
class Echo:
    """What a reply repeats of its prompt."""

    text: str = ""
    entries: Sequence[Entry] = ()


@dataclass
class Piece:
    """What became final of one choice."""

    thought: str = ""
    answer: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)


def entries_of(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    logprobs: Sequence[float],
    tops: Sequence[list[tuple[int, float]]],
    hidden: int = 0,
) -> list[Entry]:
    """The tokens of a prompt, special ones by their names but for the first `hidden`.

    Nothing is said of the first one's log-prob.
    """
    stream, found, offset = Detokenizer(tokenizer, (), tokenizer.special_tokens), [], 0
    texts = ["" if i < hidden else stream.push(token) for i, token in enumerate(prompt)]
    texts[-1] += stream.flush()
    for token, logprob, top, text in zip(
        prompt, [None, *logprobs], [None, *tops], texts, strict=True
    ):
        found.append(Entry(token, logprob, top, text, offset))
        offset += len(text)
    return found


class Choice:
    """One sample of a reply so far.

    names: how tokens are written, None where no log-probs are asked for. reader: of calls, None
    where none may be made. single: only the first call counts.
    """

    def __init__(
        self,
        stream: TextStream,
        names: TokenBytes | None = None,
        echo: Echo | None = None,
        *,
        reader: CallReader | None = None,
        single: bool = False,
    ) -> None:
        self.stream, self.names, self.echo = stream, names, echo or Echo()
        self.reader, self.single = reader, single
        self.thought = self.answer = ""
        self.calls: list[dict[str, Any]] = []
        self.entries: list[Entry] = []
        self.finish_reason: str | None = None
        self._held: list[Entry] = []  # those whose text is not final
        self._offset = len(self.echo.text)

    def add(self, delta: Delta) -> Piece:
        """The parts that are final with these tokens."""
        read, reason = self.stream.push(delta.token_ids), delta.finish_reason
        if reason is not None:
            read += self.stream.finish()
            self.finish_reason = "stop" if self.stream.stopped else REASONS[reason]
        piece = Piece(read.thought or "", read.answer)
        if self.reader is not None:
            piece.answer = self.reader.push(read.answer)
            if reason is not None:
                piece.answer += self.reader.flush()
            made = self.reader.calls[: 1 if self.single else None]
            piece.calls = [
                {"index": i, **_call(made[i])} for i in range(len(self.calls), len(made))
            ]
            if self.finish_reason == "stop" and made:
                self.finish_reason = "tool_calls"
        if self.names is not None:
            piece.entries = self._final_entries(delta)
        self.thought, self.answer = self.thought + piece.thought, self.answer + piece.answer
        self.calls, self.entries = self.calls + piece.calls, self.entries + piece.entries
        return piece

    def _final_entries(self, delta: Delta) -> list[Entry]:
        tops = delta.top_logprobs or [[] for _ in delta.token_ids]
        for token, logprob, top in zip(delta.token_ids, delta.logprobs, tops, strict=True):
            self._held.append(Entry(token, logprob, top))
        final, pieces = delta.finish_reason is not None, self.stream.pieces
        texts = pieces[len(pieces) - len(self._held) :]
        end = len(self.echo.text) + self.stream.given  # of the text that is final
        sure, offset, last = 0, self._offset, len(texts) if self.stream.unfinished else -1
        for place, (entry, text) in enumerate(zip(self._held, texts, strict=True), 1):
            kept = max(0, end - offset) if final else len(text)
            entry.text, entry.offset = text[:kept], min(offset, end)
            behind = final and self.stream.stopped and offset >= end
            entry.cut = None if behind else len(text[kept:].encode())
            offset += len(text)
            if final or (text and offset <= end and place != last):
                sure, self._offset = place, offset
        found, self._held = self._held[:sure], self._held[sure:]
        return found

    def message(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.answer, **_reasoning(self.thought)}
        if self.calls:
            calls = [{k: v for k, v in call.items() if k != "index"} for call in self.calls]
            message |= {"content": self.answer or None, "tool_calls": calls}
        return message


def _call(call: Call) -> dict[str, Any]:
    name, arguments = call
    text = json.dumps(arguments, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which the model wrote as \ud800
        text = json.dumps(arguments)
    function = {"name": name.encode("utf-8", "replace").decode(), "arguments": text}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _reasoning(thought: str) -> dict[str, Any]:
    """The thought under both names that servers use."""
    return {"reasoning_content": thought, "reasoning": thought} if thought else {}


@dataclass(slots=True)
class Session:
    """A submitted request: `choices` of the prompts in turn, as many of each.

    handles: one a prompt; none where no token is asked for.
    """

    handles: list[Handle]
    choices: list[Choice]
    prompts: list[list[int]]
    chat: bool

    @property
    def usage(self) -> dict[str, Any]:
        """The tokens used so far, in the API's form."""
        prompt = sum(map(len, self.prompts))
        completion = sum(len(one.token_ids) for h in self.handles for one in h.completions)
        thought = sum(choice.stream.thought_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "completion_tokens_details": {"reasoning_tokens": thought},
        }

    def cancel(self) -> None:
        for handle in self.handles:
            handle.cancel()

    async def whole(self, model: str) -> dict[str, Any]:
        """The reply that is not streamed. A reader that leaves cancels the request."""
        async for _ in self._pieces():
            pass
        rows = []
        for index, one in enumerate(self.choices):
            said = {"message": one.message()} if self.chat else {"text": one.echo.text + one.answer}
            entries = [*one.echo.entries, *one.entries]
            logprobs, reason = self._logprobs(one, entries), one.finish_reason or "length"
            rows.append({"index": index, **said, "logprobs": logprobs, "finish_reason": reason})
        head = self._head("chat.completion", model)
        return {**head, "choices": rows, "usage": self.usage}

    async def events(self, model: str, usage: bool) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream. usage: whether the last one holds the token counts."""
        head = self._head("chat.completion.chunk", model) | ({"usage": None} if usage else {})

        def event(index: int, content: Any, **more: Any) -> dict[str, Any]:
            content = {"delta" if self.chat else "text": content}
            row = {"index": index, **content, "logprobs": None, "finish_reason": None, **more}
            return {**head, "choices": [row]}

        for index, choice in enumerate(self.choices):
            logprobs = self._logprobs(choice, choice.echo.entries) if choice.echo.entries else None
            if self.chat:
                yield event(index, {"role": "assistant", "content": ""})
            elif choice.echo.text or logprobs:
                yield event(index, choice.echo.text, logprobs=logprobs)
            if not self.handles:
                yield event(index, "", finish_reason="length")
        async for index, piece in self._pieces():
            choice = self.choices[index]
            reason = choice.finish_reason
            more = {"logprobs": self._logprobs(choice, piece.entries)} if piece.entries else {}
            if not self.chat:
                if piece.answer or more or reason:
                    yield event(index, piece.answer, **more, finish_reason=reason)
                continue
            if piece.thought:
                yield event(index, _reasoning(piece.thought), **more)
                more = {}
            if piece.answer or more:
                yield event(index, {"content": piece.answer}, **more)
            if piece.calls:
                yield event(index, {"tool_calls": piece.calls})
            if reason:
                yield event(index, {}, finish_reason=reason)
        if usage:
            yield {**head, "choices": [], "usage": self.usage}

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """What becomes final, with the index of its choice."""
        each = len(self.choices) // len(self.prompts)
        with ExitStack() as stack:
            for handle in self.handles:
                stack.enter_context(handle)
            async for place, delta in read_all(self.handles):
                index = place * each + delta.sample
                yield index, self.choices[index].add(delta)

    def _head(self, kind: str, model: str) -> dict[str, Any]:
        prefix, kind = ("chatcmpl", kind) if self.chat else ("cmpl", "text_completion")
        name = f"{prefix}-{secrets.token_hex(12)}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": model}

    def _logprobs(self, choice: Choice, entries: Sequence[Entry]) -> dict[str, Any] | None:
        if choice.names is None:
            return None
        if self.chat:
            rows = [_chat_entry(choice.names, entry) for entry in entries]
            return {"content": rows, "refusal": None}
        return {
            "tokens": [entry.text for entry in entries],
            "token_logprobs": [_finite(entry.logprob) for entry in entries],
            "top_logprobs": [_by_text(choice.names, entry) for entry in entries],
            "text_offset": [entry.offset for entry in entries],
        }


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)


def _chat_entry(names: TokenBytes, entry: Entry) -> dict[str, Any]:
    own, text = names.of(entry.token), entry.text
    own = own[: 0 if entry.cut is None else max(0, len(own) - entry.cut)]
    # A character that several tokens share belongs to the last one; their bytes tell them apart.
    shared = "\ufffd" in text or names.name(entry.token).startswith("bytes:")
    first = {
        "token": text or names.name(entry.token),
        "logprob": _finite(entry.logprob),
        "bytes": list(own if shared else text.encode()),
    }
    top = [
        {"token": names.name(i), "logprob": _finite(value), "bytes": list(names.of(i))}
        for i, value in entry.top or ()
    ]
    return {**first, "top_logprobs": top}


def _by_text(names: TokenBytes, entry: Entry) -> dict[str, float | None] | None:
    """The chosen token and the likeliest ones; of two with one text, the likelier."""
    if entry.top is None:
        return None
    found = {entry.text: _finite(entry.logprob)}
    for token, logprob in entry.top:
        if token != entry.token:
            found.setdefault(names.name(token), _finite(logprob))
    return found
