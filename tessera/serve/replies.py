"""The API's JSON: whole replies, the events of a stream, and tool calls in the text.

A tool call is `<TOOLCALL>[{"name": …, "arguments": {…}}]</TOOLCALL>` (arXiv 2505.00949).
"""

from __future__ import annotations

import itertools
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from tessera.data.thought import Thought, begun
from tessera.serve.session import Session, Token, Update

OPEN, CLOSE = "<TOOLCALL>", "</TOOLCALL>"
REASONS = {"stop": "stop", "length": "length", "timeout": "length", "cancelled": "stop"}
DONE = "data: [DONE]\n\n"


class ToolCalls:
    """Text in, text without tool calls out; `calls` holds the complete ones."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self._held = ""

    def push(self, text: str) -> str:
        """The text that cannot be part of a call; the rest is held back."""
        self._held += text
        plain = ""
        while OPEN in self._held:
            before, _, rest = self._held.partition(OPEN)
            inside, closed, after = rest.partition(CLOSE)
            if not closed:
                self._held = OPEN + rest
                return plain + before
            plain, self._held = plain + before + self._parse(inside), after
        keep = begun(self._held, [OPEN])
        plain += self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return plain

    def flush(self) -> str:
        """The held text, at the end of the completion. A call without its closing tag counts."""
        held, self._held = self._held, ""
        return self._parse(held.removeprefix(OPEN)) if held.startswith(OPEN) else held

    def _parse(self, inside: str) -> str:
        """Add the calls; text that is no call is returned."""
        try:
            rows = json.loads(inside)
            rows = rows if isinstance(rows, list) else [rows]
            self.calls += [_call(row["name"], row.get("arguments") or {}) for row in rows]
        except (ValueError, TypeError, KeyError, AttributeError):
            return f"{OPEN}{inside}{CLOSE}"
        return ""


def _call(name: str, arguments: Any) -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    function = {"name": str(name), "arguments": text}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


@dataclass(slots=True)
class ChatChoice:
    """One sample of a chat so far."""

    thought: str = ""
    answer: str = ""
    tokens: list[Token] = field(default_factory=list)
    tools: ToolCalls = field(default_factory=ToolCalls)
    finish_reason: str | None = None

    def add(self, update: Update) -> Thought:
        """Returns the part that is certainly text."""
        answer = self.tools.push(update.piece.answer)
        if update.finish_reason is not None:
            answer += self.tools.flush()
            self.finish_reason = "tool_calls" if self.tools.calls else REASONS[update.finish_reason]
        self.thought += update.piece.thought or ""
        self.answer += answer
        self.tokens += update.tokens
        return Thought(update.piece.thought, answer)

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.answer, **_thought(self)}
        if self.tools.calls:
            message |= {"content": self.answer or None, "tool_calls": self.tools.calls}
        return message


def _thought(source: ChatChoice | Thought) -> dict[str, str]:
    """The thought under both names that servers use."""
    text = source.thought
    return {"reasoning_content": text, "reasoning": text} if text else {}


def _head(kind: str, model: str) -> dict[str, Any]:
    """The fields that all parts of a reply begin with."""
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    name = f"{prefix}-{secrets.token_hex(12)}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}


async def whole_chat(session: Session, model: str) -> dict[str, Any]:
    """The reply to a chat that is not streamed."""
    found = [ChatChoice() for _ in session.streams]
    async for update in session.updates():
        found[update.sample].add(update)
    choices = [
        {
            "index": index,
            "message": choice.message(),
            "logprobs": chat_logprobs(choice.tokens) if session.logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(found)
    ]
    return {**_head("chat.completion", model), "choices": choices, "usage": session.usage}


async def chat_events(session: Session, model: str, usage: bool) -> AsyncIterator[str]:
    """The events of a streamed chat. usage: whether the last one holds the token counts."""
    head = _head("chat.completion.chunk", model)
    choices = [ChatChoice() for _ in session.streams]

    def event(index: int, delta: dict[str, Any], **more: Any) -> str:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return _event({**head, "choices": [choice]})

    for index in range(len(choices)):
        yield event(index, {"role": "assistant", "content": ""})
    async for update in session.updates():
        choice = choices[update.sample]
        piece = choice.add(update)
        more = {"logprobs": chat_logprobs(update.tokens)} if update.tokens else {}
        if piece.thought:
            yield event(update.sample, _thought(piece), **more)
            more = {}
        if piece.answer or more:
            yield event(update.sample, {"content": piece.answer}, **more)
        if choice.finish_reason is not None:
            calls = [{"index": i, **call} for i, call in enumerate(choice.tools.calls)]
            delta = {"tool_calls": calls} if calls else {}
            yield event(update.sample, delta, finish_reason=choice.finish_reason)
    if usage:
        yield _event({**head, "choices": [], "usage": session.usage})
    yield DONE


async def whole_completion(session: Session, model: str, echo: str = "") -> dict[str, Any]:
    """The reply to a completion that is not streamed."""
    choices: list[dict[str, Any]] = [
        {"index": index, "text": echo, "logprobs": None, "finish_reason": ""}
        for index in range(len(session.streams))
    ]
    tokens: list[list[Token]] = [[] for _ in choices]
    async for update in session.updates():
        choice = choices[update.sample]
        choice["text"] += update.piece.answer
        tokens[update.sample] += update.tokens
        if update.finish_reason is not None:
            choice["finish_reason"] = REASONS[update.finish_reason]
    if session.logprobs:
        for choice, known in zip(choices, tokens, strict=True):
            choice["logprobs"] = text_logprobs(known)
    return {**_head("text_completion", model), "choices": choices, "usage": session.usage}


async def completion_events(
    session: Session, model: str, usage: bool, echo: str = ""
) -> AsyncIterator[str]:
    """The events of a streamed completion."""
    head = _head("text_completion", model)

    def event(index: int, text: str, logprobs: Any, reason: str | None) -> str:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return _event({**head, "choices": [choice]})

    for index in range(len(session.streams) if echo else 0):
        yield event(index, echo, None, None)
    async for update in session.updates():
        logprobs = text_logprobs(update.tokens) if update.tokens else None
        reason = None if update.finish_reason is None else REASONS[update.finish_reason]
        if update.piece.answer or logprobs or reason:
            yield event(update.sample, update.piece.answer, logprobs, reason)
    if usage:
        yield _event({**head, "choices": [], "usage": session.usage})
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
    texts = [token.text for token in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [dict(token.top) for token in tokens],
        "text_offset": [0, *itertools.accumulate(map(len, texts))][:-1],
    }


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
