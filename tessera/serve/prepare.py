"""From the bytes of a request to what the engine is asked, in processes of their own.

Validating, rendering and tokenising a megabyte takes seconds of Python, which streams would wait
for; in another process they do not, and its time and memory are limited. Small bodies have a
process of their own: they do not wait behind large ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from tessera.data.bounded import Bounded, LimitError
from tessera.data.chat import ChatEncoder
from tessera.data.conversation import Message, Mode, SchemaError, tidy
from tessera.data.switch import is_variable, requested
from tessera.data.template import TemplateError
from tessera.data.thought import Splitter
from tessera.data.tokenizer import load_tokenizer
from tessera.generate.engine import GenerationError, QueueFullError, check_sequences
from tessera.generate.text import opens_thought
from tessera.serve.fields import ChatRequest, CompletionRequest, Ids

SECONDS, MIB = 20.0, 1024  # that one request may take
SMALL = 32 * 1024  # bytes of a body that does not wait behind larger ones
MAX_WAITING = 64 * 2**20  # bytes of bodies that wait
KINDS = {"chat": ChatRequest, "text": CompletionRequest}


class FieldError(ValueError):
    """A body that is no request. args: what is wrong, and the field, if it is one's fault."""


@dataclass(frozen=True)
class Limits:
    """Of the engine that answers: its context, its vocabulary, and the samples that may wait."""

    room: int
    vocab_size: int
    queue: int


@dataclass(frozen=True)
class Prepared:
    """A request without its messages, and the prompts that they have become.

    texts: the prompts of `/v1/completions` as they were given, where they are to be repeated.
    opened: whether an answer begins inside of a thought; None: it can hold none any more.
    """

    request: ChatRequest | CompletionRequest
    prompts: list[Ids]
    texts: list[str | Ids]
    mode: Mode | None = None
    opened: bool | None = None


class Preparer:
    """The function of the process. nice: how far it stands back for others."""

    def __init__(self, home: Path, switch: str | None, limits: Limits, nice: int) -> None:
        os.nice(nice)
        self.tokenizer, self.switch, self.limits = load_tokenizer(home), switch, limits
        with contextlib.suppress(TemplateError):  # said where a conversation is to be answered
            _ = self.encoder

    @cached_property
    def encoder(self) -> ChatEncoder:
        """Raises TemplateError for a model without a chat template."""
        return ChatEncoder.of(self.tokenizer, switch=self.switch, today=True)

    def __call__(self, kind: str, body: bytes) -> Prepared:
        """Raises FieldError, and what the template, the tokenizer and the engine refuse."""
        request = _parsed(kind, body)
        if isinstance(request, ChatRequest):
            return self._chat(request)
        count, given = request.n * len(request.prompts), list(request.prompts)
        if count > self.limits.queue:
            raise GenerationError(
                f"{count} samples were asked for, but the queue holds {self.limits.queue} in all: "
                "lower n, or send fewer prompts at once"
            )
        for index, text in enumerate(given):
            self._check_length(text, f"prompt {index}")
        prompts = [
            self.tokenizer.encode(one, request.add_special_tokens, special=True)
            if isinstance(one, str)
            else one
            for one in given
        ]
        check_sequences(prompts, "prompt", self.limits.vocab_size, self.limits.room)
        texts = given if request.echo else []
        return Prepared(request.model_copy(update={"prompt": ""}), prompts, texts)

    def _chat(self, request: ChatRequest) -> Prepared:
        messages = tidy([message.model_dump(exclude_none=True) for message in request.messages])
        if not messages:
            raise SchemaError("messages hold no text to answer")
        for index, one in enumerate(messages):
            self._check_length(one["content"], f"message {index}")
        ids, mode = self._prompt(request, messages)
        check_sequences([ids], "prompt", self.limits.vocab_size, self.limits.room - 1)
        opened = self._opened(request, messages[-1]["content"], ids)
        return Prepared(request.model_copy(update={"messages": []}), [ids], [], mode, opened)

    def _check_length(self, text: str | Ids, what: str) -> None:
        """Refuse a text that cannot fit, before it is rendered and tokenised."""
        most = self.limits.room * (self.tokenizer.longest if isinstance(text, str) else 1)
        if most and len(text) > most:
            unit = "characters" if isinstance(text, str) else "tokens"
            raise GenerationError(
                f"{what} has {len(text):,} {unit}, more tokens than the {self.limits.room:,} that "
                "max_position_embeddings leaves room for"
            )

    def _prompt(self, request: ChatRequest, messages: list[Message]) -> tuple[Ids, Mode | None]:
        variables, effort = dict(request.chat_template_kwargs or {}), request.reasoning_effort
        own = variables.get(self.encoder.switch)
        asked = variables.get("enable_thinking", own if isinstance(own, bool) else None)
        mode = requested(
            messages, self.encoder.switch, enable_thinking=asked, reasoning_effort=effort
        )
        if effort is not None:
            variables.setdefault("reasoning_effort", effort)
        tools = request.shown_tools
        if mode and is_variable(self.encoder.switch):  # the text stays, whatever it says
            variables, said = {self.encoder.switch: mode == "on", **variables}, None
        else:
            mode = said = mode or self.encoder.default
        ids = self.encoder.prompt(messages, said, tools, variables, ending=request.ending)
        return ids, mode

    def _opened(self, request: ChatRequest, last: str, prompt: Ids) -> bool | None:
        if request.ending == "open":
            splitter = Splitter()
            splitter.push(last)
            if splitter.thinking or splitter.answering:
                return True if splitter.thinking else None
        return opens_thought(self.tokenizer, prompt)


def _parsed(kind: str, body: bytes) -> ChatRequest | CompletionRequest:
    try:
        return KINDS[kind].model_validate(json.loads(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where, text = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        if where:
            raise FieldError(f"{where}: {text}", where) from None
        own = first["type"] == "value_error"
        raise FieldError(text if own else "the body is no JSON object", None) from None
    except RecursionError:
        raise FieldError("the body is nested too deeply", None) from None
    except ValueError as error:
        raise FieldError(
            f"the body is no JSON object; send one with Content-Type: application/json ({error})",
            None,
        ) from None


class Preparers:
    """Two processes: for small bodies and for large ones, which stand back for the engine."""

    def __init__(self, home: Path, switch: str | None, limits: Limits) -> None:
        maker, self.waiting = f"{__name__}:Preparer", 0
        self._lanes = [
            (Bounded(maker, (home, switch, limits, nice), SECONDS, MIB), ThreadPoolExecutor(1))
            for nice in (0, 10)
        ]
        for bounded, pool in self._lanes:
            pool.submit(bounded.start)

    async def __call__(self, kind: str, body: bytes) -> Prepared:
        """Raises what `Preparer` raises, LimitError, and QueueFullError where too many wait."""
        if self.waiting + len(body) > MAX_WAITING:
            raise QueueFullError("too many large requests are being read; try again later")
        bounded, pool = self._lanes[len(body) > SMALL]
        self.waiting += len(body)
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, bounded, kind, body)
        except LimitError as error:
            raise LimitError(f"reading the request was stopped: {error}") from None
        finally:
            self.waiting -= len(body)

    def close(self) -> None:
        for bounded, pool in self._lanes:
            pool.shutdown(wait=False, cancel_futures=True)
            bounded.close()
