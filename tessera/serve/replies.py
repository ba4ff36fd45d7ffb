"""Tool calls in the report's form: `<TOOLCALL>[{"name": …, "arguments": {…}}]</TOOLCALL>`.

What may still become a call is held back; what is none goes on as text.

The API's JSON: whole replies, and the events of a stream.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from tessera.data.thought import Thought, begun
from tessera.serve.session import News, Talk, Token

OPEN, CLOSE = "<TOOLCALL>", "</TOOLCALL>"


class ToolCalls:
    """Text in, text without calls out; `calls` holds those that were complete."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self._held = ""

    def push(self, text: str) -> str:
        """What is certainly no part of a call."""
        self._held += text
        plain = ""
        while OPEN in self._held:
            before, _, rest = self._held.partition(OPEN)
            inside, closed, after = rest.partition(CLOSE)
            if not closed:
                self._held = OPEN + rest
                return plain + before
            plain, self._held = plain + before + self._take(inside), after
        keep = begun(self._held, [OPEN])
        plain += self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return plain

    def flush(self) -> str:
        """What was held back, where the text ends here. A call lacking only its end counts."""
        held, self._held = self._held, ""
        return self._take(held.removeprefix(OPEN)) if held.startswith(OPEN) else held

    def _take(self, inside: str) -> str:
        """Notes the calls; what cannot be read as such is given back as text."""
        try:
            rows = json.loads(inside)
            rows = rows if isinstance(rows, list) else [rows]
            found = [_call(row["name"], row.get("arguments") or {}) for row in rows]
        except (ValueError, TypeError, KeyError, AttributeError):
            return f"{OPEN}{inside}{CLOSE}"
        self.calls += found
        return ""


def _call(name: str, arguments: Any) -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    function = {"name": str(name), "arguments": text}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


REASONS = {"stop": "stop", "length": "length", "timeout": "length", "cancelled": "stop"}
DONE = "data: [DONE]\n\n"


@dataclass(slots=True)
class Choice:
    """One sample of a chat as far as it is known."""

    thought: str = ""
    answer: str = ""
    tokens: list[Token] = field(default_factory=list)
    calls: ToolCalls = field(default_factory=ToolCalls)
    finish_reason: str | None = None

    def take(self, news: News) -> Thought:
        """Adds what is new; returns the part that is certainly text."""
        answer = self.calls.push(news.piece.answer)
        if news.finish_reason is not None:
            answer += self.calls.flush()
            called = bool(self.calls.calls)
            self.finish_reason = "tool_calls" if called else REASONS[news.finish_reason]
        self.thought += news.piece.thought or ""
        self.answer += answer
        self.tokens += news.tokens
        return Thought(news.piece.thought, answer)

    def message(self) -> dict[str, Any]:
        """An assistant's message; both names that servers use for the thought."""
        told: dict[str, Any] = {"role": "assistant", "content": self.answer or None}
        if self.thought:
            told |= {"reasoning_content": self.thought, "reasoning": self.thought}
        if self.calls.calls:
            told["tool_calls"] = self.calls.calls
        elif told["content"] is None:
            told["content"] = ""
        return told


def head(kind: str, model: str) -> dict[str, Any]:
    """What all replies to one request begin with."""
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    name = f"{prefix}-{secrets.token_hex(12)}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}


async def whole_chat(talk: Talk, model: str, logprobs: bool) -> dict[str, Any]:
    """The reply to a chat that is not streamed."""
    choices = [Choice() for _ in talk.streams]
    async for news in talk.news():
        choices[news.sample].take(news)
    told = [
        {
            "index": index,
            "message": choice.message(),
            "logprobs": chat_logprobs(choice.tokens) if logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(choices)
    ]
    return {**head("chat.completion", model), "choices": told, "usage": talk.usage}


async def chat_events(
    talk: Talk, model: str, logprobs: bool, tells_usage: bool
) -> AsyncIterator[str]:
    """The events of a streamed chat."""
    begin = head("chat.completion.chunk", model)
    choices = [Choice() for _ in talk.streams]

    def event(index: int, delta: dict[str, Any], **more: Any) -> str:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return _event({**begin, "choices": [choice]})

    for index in range(len(choices)):
        yield event(index, {"role": "assistant", "content": ""})
    async for news in talk.news():
        choice = choices[news.sample]
        piece = choice.take(news)
        more = {"logprobs": chat_logprobs(news.tokens)} if logprobs and news.tokens else {}
        if piece.thought:
            told = {"reasoning_content": piece.thought, "reasoning": piece.thought}
            yield event(news.sample, told, **more)
            more = {}
        if piece.answer or more:
            yield event(news.sample, {"content": piece.answer}, **more)
        if choice.finish_reason is not None:
            calls = [{"index": i, **call} for i, call in enumerate(choice.calls.calls)]
            delta = {"tool_calls": calls} if calls else {}
            yield event(news.sample, delta, finish_reason=choice.finish_reason)
    if tells_usage:
        yield _event({**begin, "choices": [], "usage": talk.usage})
    yield DONE


async def whole_completion(
    talk: Talk, model: str, logprobs: bool, echo: str = ""
) -> dict[str, Any]:
    """The reply to a completion that is not streamed."""
    texts = [echo for _ in talk.streams]
    tokens: list[list[Token]] = [[] for _ in talk.streams]
    reasons = [""] * len(texts)
    async for news in talk.news():
        texts[news.sample] += news.piece.answer
        tokens[news.sample] += news.tokens
        if news.finish_reason is not None:
            reasons[news.sample] = REASONS[news.finish_reason]
    told = [
        {
            "index": index,
            "text": text,
            "logprobs": text_logprobs(tokens[index]) if logprobs else None,
            "finish_reason": reasons[index],
        }
        for index, text in enumerate(texts)
    ]
    return {**head("text_completion", model), "choices": told, "usage": talk.usage}


async def completion_events(
    talk: Talk, model: str, logprobs: bool, tells_usage: bool, echo: str = ""
) -> AsyncIterator[str]:
    """The events of a streamed completion."""
    begin = head("text_completion", model)

    def event(index: int, text: str, told: Any, reason: str | None) -> str:
        choice = {"index": index, "text": text, "logprobs": told, "finish_reason": reason}
        return _event({**begin, "choices": [choice]})

    for index in range(len(talk.streams) if echo else 0):
        yield event(index, echo, None, None)
    async for news in talk.news():
        told = text_logprobs(news.tokens) if logprobs and news.tokens else None
        reason = None if news.finish_reason is None else REASONS[news.finish_reason]
        if news.piece.answer or told or reason:
            yield event(news.sample, news.piece.answer, told, reason)
    if tells_usage:
        yield _event({**begin, "choices": [], "usage": talk.usage})
    yield DONE


def chat_logprobs(tokens: list[Token]) -> dict[str, Any]:
    """Log-probs as chats have them."""

    def one(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = [
        {**one(t.text, t.logprob), "top_logprobs": [one(*pair) for pair in t.top]} for t in tokens
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: list[Token]) -> dict[str, Any]:
    """Log-probs as completions have them."""
    offsets, at = [], 0
    for token in tokens:
        offsets.append(at)
        at += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [dict(token.top) for token in tokens],
        "text_offset": offsets,
    }


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
