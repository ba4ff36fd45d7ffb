"""The fields of a request to the server.

The fields are the OpenAI API's, and vLLM's names for what that lacks. What would change the answer
and is not done is refused by name; null is the absence of a field; other unknown fields are
ignored, as other servers do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from tessera.data.chat import Ending
from tessera.generate import grammar
from tessera.generate.engine import GenerationError

MAX_STOPS = 16
# Parameters of OpenAI and vLLM that are not done, with the values that ask for nothing.
NOT_DONE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("audio", "web_search_options", "chat_template"), ()),
    **dict.fromkeys(("prompt_logprobs", "truncate_prompt_tokens", "prompt_embeds"), ()),
    **dict.fromkeys(("allowed_token_ids", "repetition_detection", "guided_grammar"), ()),
    # Of other servers (llama.cpp, TGI, SGLang, Ollama, OpenRouter, Anthropic).
    **dict.fromkeys(("structural_tag", "guided_whitespace_pattern", "grammar", "ebnf"), ()),
    **dict.fromkeys(("regex", "json_schema", "format", "options", "instructions", "input"), ()),
    **dict.fromkeys(("typical_p", "top_a", "tfs_z", "top_n_sigma", "mirostat"), (1, 0)),
    **dict.fromkeys(("dry_multiplier", "xtc_probability", "no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("max_new_tokens", "n_predict", "max_length", "num_predict"), ()),
    **dict.fromkeys(("min_new_tokens",), (0,)),
    **dict.fromkeys(("enable_thinking", "think", "thinking", "reasoning"), ()),
    **dict.fromkeys(("lora_path", "lora_request", "adapter_id", "models", "system"), ()),
    **dict.fromkeys(("logits_processors", "custom_logit_processor", "num_beams"), ([], 1)),
    **dict.fromkeys(("functions", "documents", "bad_words", "logprob_token_ids"), ([],)),
    **dict.fromkeys(("mm_processor_kwargs", "media_io_kwargs", "vllm_xargs"), ({},)),
    **dict.fromkeys(("use_beam_search", "include_stop_str_in_output", "watermarking"), (False,)),
    **dict.fromkeys(("return_token_ids", "return_tokens_as_token_ids"), (False,)),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens"), (True,)),
    "function_call": ("none", "auto"),
    "include_reasoning": (True,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "suffix": ("",),
    "verbosity": ("medium",),
}
INSTEAD = {
    "functions": "; give tools",
    "function_call": "; give tool_choice",
    **dict.fromkeys(("max_new_tokens", "n_predict", "num_predict"), "; give max_tokens"),
    **dict.fromkeys(
        ("enable_thinking", "think", "thinking", "reasoning"), "; give reasoning_effort"
    ),
    **dict.fromkeys(("regex", "json_schema", "format"), "; give response_format"),
    **dict.fromkeys(("instructions", "system"), "; give a message of role system"),
}
Ids = list[int]
PROMPTS = ({str}, {int}, {list})  # the types in a list of prompts
_Penalty = Annotated[float, Field(ge=-2, le=2)]


def _tidied(data: Any, more: dict[str, tuple[Any, ...]]) -> Any:
    """A request's object without nulls. Raises ValueError for what is not done, or no text."""
    if not isinstance(data, dict):
        return data
    for key, value in data.items():
        try:
            json.dumps([key, value], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{ascii(key)} holds half a surrogate pair, which is no character; send UTF-8"
            ) from None
        except RecursionError:
            raise ValueError(f"{key} is nested too deeply") from None
    found = {key: value for key, value in data.items() if value is not None}
    for name, neutral in {**NOT_DONE, **more}.items():
        if name in found and found[name] not in neutral:
            raise ValueError(
                f"{name} is not done by this server; leave it out{INSTEAD.get(name, '')}"
            )
    return found


class StructuredOutputs(BaseModel):
    """vLLM's ways to say the form of an answer; one of them."""

    model_config = ConfigDict(extra="forbid")

    json_schema: dict[str, Any] | str | None = Field(
        default=None, validation_alias=AliasChoices("json", "guided_json")
    )
    json_object: bool | None = None
    regex: str | None = Field(
        default=None, min_length=1, validation_alias=AliasChoices("regex", "guided_regex")
    )
    choice: list[str] | None = Field(
        default=None, min_length=1, validation_alias=AliasChoices("choice", "guided_choice")
    )

    def rule(self) -> str:
        """Raises GenerationError for none and for several."""
        given = [value for value in self.__dict__.values() if value not in (None, False)]
        if len(given) != 1:
            raise GenerationError(
                "structured_outputs takes one of json, json_object, regex, choice"
            )
        if self.regex is not None:
            return grammar.regex_rule(self.regex)
        if self.choice is not None:
            return grammar.choice_rule(self.choice)
        schema: Any = self.json_schema or {"type": "object"}
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except ValueError as error:
                raise GenerationError(
                    f"the JSON schema of the answer is no JSON: {error}"
                ) from None
        return grammar.json_rule(schema)


class JSONSchema(BaseModel):
    model_config = ConfigDict(extra="ignore")

    name: str = ""
    form: dict[str, Any] | bool = Field(alias="schema")


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('type "json_schema" goes with json_schema: {"name": …, "schema": {…}}')
        return self

    def rule(self) -> str | None:
        if self.type == "text":
            return None
        return grammar.json_rule(self.json_schema.form if self.json_schema else {"type": "object"})


class SamplingRequest(BaseModel):
    """How to sample, in either kind of request. thinking_budget: tokens of thought at most."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    model: str = ""
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=100, allow_inf_nan=False)
    frequency_penalty: _Penalty = 0.0
    presence_penalty: _Penalty = 0.0
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    n: int = Field(default=1, ge=1, le=128)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    thinking_budget: int | None = Field(
        default=None,
        ge=0,
        validation_alias=AliasChoices("thinking_budget", "thinking_token_budget"),
    )
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="before")
    @classmethod
    def _tidy(cls, data: Any) -> Any:
        data = _tidied(data, cls.not_done())
        if not isinstance(data, dict):
            return data
        if data.get("thinking_token_budget") == -1:
            del data["thinking_token_budget"]
        guided = ("guided_json", "guided_regex", "guided_choice")
        if given := {name: data[name] for name in guided if name in data}:
            data["structured_outputs"] = given
        if not data.get("stream") and "stream_options" in data:
            raise ValueError("stream_options goes with stream = true")
        return data

    @classmethod
    def not_done(cls) -> dict[str, tuple[Any, ...]]:
        """What this kind of request does not do, beside NOT_DONE."""
        return {}

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: str | list[str] | None) -> list[str]:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MAX_STOPS or not all(stops):
            raise ValueError(f"give at most {MAX_STOPS} stop strings, none of them empty")
        return stops

    @property
    def form(self) -> str | None:
        """The grammar's rule that the answer obeys. Raises GenerationError."""
        if self.structured_outputs is not None:
            return self.structured_outputs.rule()
        return self.response_format.rule() if self.response_format else None


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None


def _named(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool or a choice of one, as it was given: templates print it in its own order."""
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, dict):
        raise ValueError('give {"type": "function", "function": {"name": …}}')
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError("a function has no name")
    if not isinstance(function.get("parameters") or {}, dict):
        raise ValueError(f"the parameters of {function['name']} are no JSON schema")
    return tool


Tool = Annotated[dict[str, Any], AfterValidator(_named)]


class ChatRequest(SamplingRequest):
    """`/v1/chat/completions`. The reasoning switch is set by the system prompt, `/no_think`,
    reasoning_effort or chat_template_kwargs.enable_thinking; the last of these wins."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | Tool = "auto"
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)

    @classmethod
    def not_done(cls) -> dict[str, tuple[Any, ...]]:
        return {"echo": (False,), "add_special_tokens": (False,)}

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        names = [tool["function"]["name"] for tool in self.tools or ()]
        if self.tool_choice not in ("none", "auto") and not names:
            raise ValueError("tool_choice needs tools")
        chosen = self.tool_choice
        if isinstance(chosen, dict) and (wanted := chosen["function"]["name"]) not in names:
            raise ValueError(f"tool_choice names {wanted!r}; the tools are {', '.join(names)}")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt are opposites")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs = true")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives are reported beside each token; None: no log-probs at all."""
        return self.top_logprobs if self.logprobs else None

    @property
    def ending(self) -> Ending:
        if self.continue_final_message:
            return "open"
        return "closed" if self.add_generation_prompt is False else "generation prompt"

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        """What the model is told of."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def functions(self) -> list[dict[str, Any]]:
        """The functions that may be called."""
        chosen, functions = self.tool_choice, [tool["function"] for tool in self.shown_tools]
        if isinstance(chosen, dict):
            return [one for one in functions if one["name"] == chosen["function"]["name"]]
        return functions


class CompletionRequest(SamplingRequest):
    """`/v1/completions`: continue texts or tokens."""

    prompt: str | Ids | list[str] | list[Ids]
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = Field(default=None, ge=1)
    add_special_tokens: bool = True

    @field_validator("prompt", mode="before")
    @classmethod
    def _check_prompt(cls, value: Any) -> Any:
        kinds = {type(one) for one in value} if isinstance(value, list) else {type(value)}
        inside = {type(one) for row in value for one in row} if kinds == {list} else {int}
        if not isinstance(value, str | list) or inside != {int} or kinds not in PROMPTS:
            raise ValueError("give a text, a list of texts, token ids, or a list of lists of them")
        return value

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of > self.n:
            raise ValueError("best_of is not done by this server; leave it out, or give n")
        return self

    @property
    def prompts(self) -> Sequence[str | Ids]:
        value = self.prompt
        one = isinstance(value, str) or (bool(value) and isinstance(value[0], int))
        return [value] if one else value  # type: ignore[return-value]

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else 16

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs
