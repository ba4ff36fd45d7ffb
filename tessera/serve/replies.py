"""Samples as the API's JSON: whole replies, the events of a stream, tool calls in the text.

A tool call is `<TOOLCALL>[{"name": …, "arguments": {…}}]</TOOLCALL>` (arXiv 2505.00949).
"""

from __future__ import annotations

import itertools
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from tessera.data.thought import begun
from tessera.data.tokenizer import Tokenizer
from tessera.generate.requests import Delta, Handle
from tessera.generate.text import TextStream

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
    """One sample of a reply so far. Thoughts and tool calls are looked for in chats."""

    def __init__(self, stream: TextStream, chat: bool) -> None:
        self.stream, self.tools = stream, ToolCalls() if chat else None
        self.thought = self.answer = ""
        self.tokens: list[dict[str, Any]] = []
        self.finish_reason: str | None = None

    def add(self, delta: Delta, tokens: list[dict[str, Any]]) -> tuple[str, str]:
        """The parts of thought and answer that are final with these tokens."""
        piece, reason = self.stream.push(delta.token_ids), delta.finish_reason
        if reason is not None:
            piece += self.stream.finish()
            self.finish_reason = "stop" if self.stream.stopped else REASONS[reason]
        thought, answer = piece.thought or "", piece.answer
        if self.tools is not None:
            answer = self.tools.push(answer)
            if reason is not None:
                answer += self.tools.flush()
                self.finish_reason = "tool_calls" if self.calls else self.finish_reason
        self.thought, self.answer = self.thought + thought, self.answer + answer
        self.tokens += tokens
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


@dataclass(slots=True)
class Session:
    """A submitted request. logprobs: whether they are asked for."""

    handle: Handle
    choices: list[Choice]
    tokenizer: Tokenizer
    chat: bool
    logprobs: bool

    @property
    def usage(self) -> dict[str, Any]:
        """The tokens used so far, in the API's form."""
        prompt = len(self.handle.prompt)
        completion = sum(len(one.token_ids) for one in self.handle.completions)
        thought = sum(choice.stream.thought_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "completion_tokens_details": {"reasoning_tokens": thought},
        }

    async def whole(self, model: str, echo: str = "") -> dict[str, Any]:
        """The reply that is not streamed. A reader that leaves cancels the request."""
        with self.handle:
            async for delta in self.handle:
                self.choices[delta.sample].add(delta, self._tokens(delta))
        rows = [
            {
                "index": index,
                **({"message": one.message()} if self.chat else {"text": echo + one.answer}),
                "logprobs": self._logprobs(one.tokens) if self.logprobs else None,
                "finish_reason": one.finish_reason,
            }
            for index, one in enumerate(self.choices)
        ]
        head = self._head("chat.completion", model)
        return {**head, "choices": rows, "usage": self.usage}

    async def events(
        self, model: str, usage: bool, echo: str = ""
    ) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream. usage: whether the last one holds the token counts."""
        head = self._head("chat.completion.chunk", model)

        def event(index: int, content: Any, **more: Any) -> dict[str, Any]:
            content = {"delta" if self.chat else "text": content}
            row = {"index": index, **content, "logprobs": None, "finish_reason": None, **more}
            return {**head, "choices": [row]}

        for index in range(len(self.choices) if self.chat or echo else 0):
            yield event(index, {"role": "assistant", "content": ""} if self.chat else echo)
        with self.handle:
            async for delta in self.handle:
                index, choice = delta.sample, self.choices[delta.sample]
                tokens = self._tokens(delta)
                thought, answer = choice.add(delta, tokens)
                reason = choice.finish_reason
                more = {"logprobs": self._logprobs(tokens)} if tokens else {}
                if not self.chat:
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
            yield {**head, "choices": [], "usage": self.usage}

    def _head(self, kind: str, model: str) -> dict[str, Any]:
        prefix, kind = ("chatcmpl", kind) if self.chat else ("cmpl", "text_completion")
        name = f"{prefix}-{secrets.token_hex(12)}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": model}

    def _tokens(self, delta: Delta) -> list[dict[str, Any]]:
        """The tokens with their log-probs as chats have them; none unless they are asked for."""

        def one(token: int, logprob: float) -> dict[str, Any]:
            text = self.tokenizer.decode([token], special=True)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        if not self.logprobs:
            return []
        tops = delta.top_logprobs or [[] for _ in delta.token_ids]
        return [
            {**one(token, logprob), "top_logprobs": [one(*pair) for pair in top]}
            for token, logprob, top in zip(delta.token_ids, delta.logprobs, tops, strict=True)
        ]

    def _logprobs(self, tokens: list[dict[str, Any]]) -> dict[str, Any]:
        if self.chat:
            return {"content": tokens, "refusal": None}
        texts = [one["token"] for one in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [one["logprob"] for one in tokens],
            "top_logprobs": [{t["token"]: t["logprob"] for t in o["top_logprobs"]} for o in tokens],
            "text_offset": [0, *itertools.accumulate(map(len, texts))][:-1],
        }
