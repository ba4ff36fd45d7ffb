"""What a request may hold: the OpenAI API's fields, and vLLM's names for what that lacks.

Fields that are not known are passed over, as other servers do: clients send more than they need.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MOST_CHOICES = 128
MOST_STOPS = 16


class Words(BaseModel):
    model_config = ConfigDict(extra="ignore")


class Sampled(Words):
    """How to sample, in either kind of request. thinking_budget: tokens of thought at most."""

    model: str = ""
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=100, allow_inf_nan=False)
    n: int = Field(default=1, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    thinking_budget: int | None = Field(default=None, ge=0)

    @field_validator("stop")
    @classmethod
    def _some(cls, value: str | list[str] | None) -> list[str]:
        stops = [value] if isinstance(value, str) else list(value or ())
        if len(stops) > MOST_STOPS or not all(stops):
            raise ValueError(f"give at most {MOST_STOPS} stop strings, none of them empty")
        return stops

    @property
    def stops(self) -> list[str]:
        return list(self.stop or ())

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the tokens that were used."""
        return bool((self.stream_options or {}).get("include_usage"))


class Message(Words):
    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(Sampled):
    """`/v1/chat/completions`. The switch is said by the system prompt, by `/no_think`, by
    reasoning_effort, or by chat_template_kwargs.enable_thinking; the last of these wins."""

    messages: list[Message] = Field(min_length=1)
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


class CompletionRequest(Sampled):
    """`/v1/completions`: text, or tokens, to go on from."""

    prompt: str | list[int]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else 16
