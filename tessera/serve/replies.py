"""The API's JSON: whole replies, the events of a stream, and tool calls in the text.

A tool call is `<TOOLCALL>[{"name": …, "arguments": {…}}]</TOOLCALL>` (arXiv 2505.00949).
"""

from __future__ import annotations

import itertools
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from tessera.data.thought import begun
from tessera.serve.session import Session, Update

OPEN, CLOSE = "<TOOLCALL>", "</TOOLCALL>"
REASONS = {"stop": "stop", "length": "length", "timeout": "length", "cancelled": "stop"}


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
        sure = len(self._held) - begun(self._held, [OPEN])
        plain, self._held = plain + self._held[:sure], self._held[sure:]
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


class Choice:
    """One sample of a reply so far. Tool calls are looked for in chats."""

    def __init__(self, chat: bool) -> None:
        self.thought = self.answer = ""
        self.tokens: list[dict[str, Any]] = []
        self.tools = ToolCalls() if chat else None
        self.finish_reason: str | None = None

    def add(self, update: Update) -> tuple[str, str]:
        """The parts of thought and answer that are final with this update."""
        thought, answer = update.piece.thought or "", update.piece.answer
        if self.tools is not None:
            answer = self.tools.push(answer)
        if update.finish_reason is not None:
            self.finish_reason = REASONS[update.finish_reason]
            if self.tools is not None:
                answer += self.tools.flush()
                self.finish_reason = "tool_calls" if self.tools.calls else self.finish_reason
        self.thought, self.answer = self.thought + thought, self.answer + answer
        self.tokens += update.tokens
        return thought, answer

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [] if self.tools is None else self.tools.calls

    def message(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.answer, **_reasoning(self.thought)}
        if self.calls:
            message |= {"content": self.answer or None, "tool_calls": self.calls}
        return message


def _reasoning(thought: str) -> dict[str, Any]:
    """The thought under both names that servers use."""
    return {"reasoning_content": thought, "reasoning": thought} if thought else {}


def _head(kind: str, model: str) -> dict[str, Any]:
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    name = f"{prefix}-{secrets.token_hex(12)}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}


async def whole(session: Session, model: str, echo: str = "") -> dict[str, Any]:
    """The reply that is not streamed."""
    choices = [Choice(session.chat) for _ in session.streams]
    async for update in session.updates():
        choices[update.sample].add(update)
    rows = [
        {
            "index": index,
            **({"message": one.message()} if session.chat else {"text": echo + one.answer}),
            "logprobs": logprobs(one.tokens, session.chat) if session.logprobs else None,
            "finish_reason": one.finish_reason,
        }
        for index, one in enumerate(choices)
    ]
    head = _head("chat.completion" if session.chat else "text_completion", model)
    return {**head, "choices": rows, "usage": session.usage}


async def events(
    session: Session, model: str, usage: bool, echo: str = ""
) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream. usage: whether the last one holds the token counts."""
    chat, choices = session.chat, [Choice(session.chat) for _ in session.streams]
    head = _head("chat.completion.chunk" if chat else "text_completion", model)

    def event(index: int, content: Any, **more: Any) -> dict[str, Any]:
        content = {"delta" if chat else "text": content}
        row = {"index": index, **content, "logprobs": None, "finish_reason": None, **more}
        return {**head, "choices": [row]}

    for index in range(len(choices) if chat or echo else 0):
        yield event(index, {"role": "assistant", "content": ""} if chat else echo)
    async for update in session.updates():
        index, choice = update.sample, choices[update.sample]
        thought, answer = choice.add(update)
        reason = choice.finish_reason
        more = {"logprobs": logprobs(update.tokens, chat)} if update.tokens else {}
        if not chat:
            if answer or more or reason:
                yield event(index, answer, **more, finish_reason=reason)
            continue
        if thought:
            yield event(index, _reasoning(thought), **more)
            more = {}
        if answer or more:
            yield event(index, {"content": answer}, **more)
        if reason:
            calls = [{"index": i, **call} for i, call in enumerate(choice.calls)]
            yield event(index, {"tool_calls": calls} if calls else {}, finish_reason=reason)
    if usage:
        yield {**head, "choices": [], "usage": session.usage}


def logprobs(tokens: list[dict[str, Any]], chat: bool) -> dict[str, Any]:
    """Log-probs as chats have them, or as completions do."""
    if chat:
        return {"content": tokens, "refusal": None}
    texts = [one["token"] for one in tokens]
    tops = [{other["token"]: other["logprob"] for other in one["top_logprobs"]} for one in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [one["logprob"] for one in tokens],
        "top_logprobs": tops,
        "text_offset": [0, *itertools.accumulate(map(len, texts))][:-1],
    }
