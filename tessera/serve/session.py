"""A request on its way through the engine: rendered, sampled, and read as text piece by piece."""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tessera.data.chat import ChatEncoder
from tessera.data.conversation import Message, Mode, tidy
from tessera.data.switch import requested
from tessera.data.thought import Thought
from tessera.data.tokenizer import Tokenizer
from tessera.generate.engine import FinishReason, SamplingParams, Thinking
from tessera.generate.requests import Handle
from tessera.generate.text import TextStream, opens_thought, stop_watch, thinking_budget
from tessera.generate.torch_engine import TorchEngine
from tessera.serve.schema import ChatRequest, CompletionRequest, Sampled


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token with its log-probability and the likeliest ones beside it."""

    text: str
    logprob: float
    top: list[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class News:
    """What one sample gained. finish_reason comes with the last piece."""

    sample: int
    piece: Thought
    tokens: list[Token] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Talk:
    """A submitted request."""

    handle: Handle
    streams: list[TextStream]
    tokenizer: Tokenizer
    wants_tokens: bool

    @property
    def usage(self) -> dict[str, Any]:
        """The tokens used so far, in the API's form."""
        prompt = len(self.handle.prompt)
        completion = sum(len(one.token_ids) for one in self.handle.completions)
        thought = sum(stream.thought_tokens for stream in self.streams)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "completion_tokens_details": {"reasoning_tokens": thought},
        }

    async def news(self) -> AsyncIterator[News]:
        """Thoughts of every sample as they come. A reader that leaves cancels the request."""
        with self.handle:
            async for delta in self.handle:
                stream = self.streams[delta.sample]
                piece = stream.push(delta.token_ids)
                if delta.finish_reason is not None:
                    piece += stream.finish()
                reason = delta.finish_reason
                if stream.stopped and reason is not None:
                    reason = "stop"
                tokens = self._tokens(delta) if self.wants_tokens else []
                yield News(delta.sample, piece, tokens, reason)

    def _tokens(self, delta: Any) -> list[Token]:
        tops = delta.top_logprobs or [[] for _ in delta.token_ids]
        return [
            Token(self._text(token), logprob, [(self._text(t), value) for t, value in top])
            for token, logprob, top in zip(delta.token_ids, delta.logprobs, tops, strict=True)
        ]

    def _text(self, token: int) -> str:
        return self.tokenizer.decode([token], special=True)


@dataclass
class Talker:
    """A model that can be asked. timeout: seconds that a request may take."""

    engine: TorchEngine
    tokenizer: Tokenizer
    timeout: float

    @cached_property
    def encoder(self) -> ChatEncoder:
        """Raises TemplateError for a model without a chat template."""
        return ChatEncoder.of(self.tokenizer)

    def chat(self, request: ChatRequest) -> Talk:
        """Raises what rendering, sampling and the queue refuse, all with a text for the client."""
        given = [message.model_dump(exclude_none=True) for message in request.messages]
        mode, messages = requested(
            tidy(given),
            enable_thinking=(request.chat_template_kwargs or {}).get("enable_thinking"),
            reasoning_effort=request.reasoning_effort,
        )
        tools = [] if request.tool_choice == "none" else [_tool(t) for t in request.tools or ()]
        prompt = self._prompt(messages, mode, tools)
        opened = opens_thought(self.tokenizer, prompt)
        thinking = None
        if request.thinking_budget is not None:
            thinking = thinking_budget(self.tokenizer, request.thinking_budget, opened)
        top = request.top_logprobs if request.logprobs else 0
        return self._submit(
            prompt, request, request.limit, top, request.logprobs, thinking, opened=opened
        )

    def complete(self, request: CompletionRequest) -> Talk:
        """As `chat`, of a text that is gone on with."""
        prompt = request.prompt
        ids = self.tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else prompt
        wanted = request.logprobs is not None
        return self._submit(
            ids, request, request.limit, request.logprobs or 0, wanted, None, plain=True
        )

    def _prompt(
        self, messages: list[Message], mode: Mode | None, tools: list[dict[str, Any]]
    ) -> list[int]:
        return self.encoder.prompt(self._defused(messages), mode or "off", tools)

    def _defused(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with the tokenizer's own marks broken: nobody ends another's turn."""
        pattern = re.compile(
            "|".join(map(re.escape, sorted(self.tokenizer.special_tokens, key=len, reverse=True)))
            or r"(?!)"
        )

        def broken(found: re.Match[str]) -> str:
            return f"{found[0][0]}\u200b{found[0][1:]}"

        def safe(message: Message) -> Message:
            text = message.get("content")
            if message["role"] == "assistant" or not isinstance(text, str):
                return message
            return {**message, "content": pattern.sub(broken, text)}

        return [safe(message) for message in messages]

    def _submit(
        self,
        prompt: list[int],
        request: Sampled,
        limit: int | None,
        top: int,
        wants_tokens: bool,
        thinking: Thinking | None,
        *,
        opened: bool = False,
        plain: bool = False,
    ) -> Talk:
        seed = secrets.randbits(63) if request.seed is None else request.seed % 2**64
        room = self.engine.packed.config.max_position_embeddings
        params = SamplingParams(
            max_tokens=limit or room,
            temperature=request.temperature,
            top_k=max(0, request.top_k),
            top_p=request.top_p,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            n=request.n,
            stop_token_ids=self.tokenizer.eos_ids,
            seed=seed,
            logprobs=top,
            thinking=thinking,
        )
        watch = stop_watch(self.tokenizer, request.stops, prompt) if request.stops else None
        handle = self.engine.submit(prompt, params, timeout=self.timeout, watch=watch)
        streams = [
            TextStream(
                self.tokenizer, prompt, stops=request.stops, thinking=not plain, opened=opened
            )
            for _ in range(request.n)
        ]
        return Talk(handle, streams, self.tokenizer, wants_tokens)


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool's own description: the API wraps it in {"type": "function", "function": ...}."""
    function = tool.get("function")
    return function if isinstance(function, dict) else tool
