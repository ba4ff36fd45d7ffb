"""A request to the server: its fields, and its prompt.

The fields are the OpenAI API's, and vLLM's names for what that lacks. Unknown fields are ignored,
as other servers do.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tessera.data.chat import ChatEncoder
from tessera.data.conversation import tidy
from tessera.data.switch import requested
from tessera.data.tokenizer import Tokenizer
from tessera.generate.engine import SamplingParams
from tessera.generate.text import TextStream, opens_thought, stop_criterion, thinking_budget
from tessera.generate.torch_engine import TorchEngine
from tessera.serve.replies import Choice, Session

MAX_STOPS = 16


class SamplingRequest(BaseModel):
    """How to sample, in either kind of request. thinking_budget: tokens of thought at most."""

    model_config = ConfigDict(extra="ignore")

    model: str = ""
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=100, allow_inf_nan=False)
    n: int = Field(default=1, ge=1, le=128)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    thinking_budget: int | None = Field(default=None, ge=0)

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: str | list[str] | None) -> list[str]:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MAX_STOPS or not all(stops):
            raise ValueError(f"give at most {MAX_STOPS} stop strings, none of them empty")
        return stops


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(SamplingRequest):
    """`/v1/chat/completions`. chat_template_kwargs: variables of the chat template. Who says
    whether to think, and in which order: `data/switch.py`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives are reported beside each token; None: no log-probs at all."""
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(SamplingRequest):
    """`/v1/completions`: continue a text or tokens."""

    prompt: str | list[int]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else 16

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


@dataclass
class ServedModel:
    """An engine with the tokenizer of its model.

    timeout: seconds that a request may take. switch: the model's own where not given (switch.py).
    """

    engine: TorchEngine
    tokenizer: Tokenizer
    timeout: float
    switch: str | None = None

    @cached_property
    def encoder(self) -> ChatEncoder:
        """Raises TemplateError for a model without a chat template."""
        return ChatEncoder.of(self.tokenizer, switch=self.switch, today=True)

    def submit(self, request: ChatRequest | CompletionRequest) -> Session:
        """Raises what the template, the sampling and the queue raise."""
        tokenizer, num_logprobs = self.tokenizer, request.num_logprobs
        thinking = opened = None
        if isinstance(request, ChatRequest):
            prompt = self._chat_prompt(request)
            opened = opens_thought(tokenizer, prompt)
            if request.thinking_budget is not None:
                thinking = thinking_budget(tokenizer, request.thinking_budget, opened)
        elif isinstance(request.prompt, str):
            prompt = tokenizer.encode(request.prompt, bos=True)
        else:
            prompt = request.prompt
        params = SamplingParams(
            max_tokens=request.limit or self.engine.config.max_position_embeddings,
            temperature=request.temperature,
            top_k=max(0, request.top_k),
            top_p=request.top_p,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            n=request.n,
            stop_token_ids=tokenizer.eos_ids,
            seed=secrets.randbits(63) if request.seed is None else request.seed % 2**64,
            logprobs=num_logprobs or 0,
            thinking=thinking,
        )
        stops = request.stop or ()
        stopping = stop_criterion(tokenizer, stops, prompt) if stops else None
        handle = self.engine.submit(prompt, params, timeout=self.timeout, stopping=stopping)
        chat = opened is not None
        choices = [
            Choice(TextStream(tokenizer, prompt, stops, opened), chat) for _ in range(request.n)
        ]
        return Session(handle, choices, tokenizer, chat, num_logprobs is not None)

    def _chat_prompt(self, request: ChatRequest) -> list[int]:
        messages = tidy([message.model_dump(exclude_none=True) for message in request.messages])
        variables, effort = dict(request.chat_template_kwargs or {}), request.reasoning_effort
        mode = requested(
            messages,
            self.encoder.switch,
            enable_thinking=variables.get("enable_thinking"),
            reasoning_effort=effort,
        )
        if effort is not None:
            variables.setdefault("reasoning_effort", effort)
        tools = [] if request.tool_choice == "none" else request.tools or []
        return self.encoder.prompt(messages, mode or self.encoder.default, tools, variables)
