"""A model that is served: from the fields of a request to what the engine is asked."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from tessera.data.calls import MARKED, CallReader, Dialect, template_dialects
from tessera.data.chat import ChatEncoder
from tessera.data.conversation import Message, Mode, SchemaError, tidy
from tessera.data.switch import NONE, is_variable, requested
from tessera.data.thought import CLOSE, OPEN, Splitter
from tessera.data.tokenizer import Tokenizer
from tessera.generate.engine import SamplingParams, check_sequences
from tessera.generate.grammar import Grammars, calls_rule
from tessera.generate.requests import Grammar, Handle
from tessera.generate.text import TextStream, opens_thought, stop_criterion, thinking_budget
from tessera.generate.token_bytes import TokenBytes
from tessera.generate.torch_engine import TorchEngine
from tessera.serve.fields import ChatRequest, CompletionRequest, Ids, SamplingRequest
from tessera.serve.replies import Choice, Echo, Session, entries_of


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

    @cached_property
    def token_bytes(self) -> TokenBytes:
        return TokenBytes(self.tokenizer)

    @cached_property
    def dialects(self) -> tuple[Dialect, ...]:
        """How the model writes calls of tools; the first is the one it must use."""
        return template_dialects(self.encoder.template)

    @cached_property
    def marks(self) -> list[str]:
        """What announces calls: special tokens of some models, and part of the text."""
        return [dialect.mark for dialect in self.dialects if dialect.mark]

    @cached_property
    def _grammars(self) -> Grammars:
        marks = (OPEN, CLOSE, *(dialect.mark for dialect in MARKED))
        return Grammars(self.tokenizer, self.engine.config.vocab_size, marks)

    def prepare(self) -> None:
        """Do what takes long with a large vocabulary, before there is anybody to wait for it."""
        _ = self.token_bytes
        self._grammars.prepare()

    def submit(self, request: ChatRequest | CompletionRequest) -> Session:
        """Queue a request. May take long: it is called outside of the event loop.

        Raises what the template, the sampling and the queue raise.
        """
        found = self._chat(request) if isinstance(request, ChatRequest) else self._texts(request)
        self.engine.queue(found.handles)
        return found

    def _chat(self, request: ChatRequest) -> Session:
        prompt, mode = self._chat_prompt(request)
        opened, params = self._opened(request, prompt), self._params(request)
        if request.thinking_budget is not None:
            budget = thinking_budget(self.tokenizer, request.thinking_budget, bool(opened))
            params = replace(params, thinking=budget)
        may_think = mode != "off" and self.encoder.switch != NONE
        grammar = self._grammar(request, "opened" if opened else "may" if may_think else "none")
        dialects, marks = (self.dialects, self.marks) if request.functions else ((), ())
        stop, ends = request.stop or (), params.stop_token_ids
        choices = [
            Choice(
                TextStream(self.tokenizer, prompt, stop, opened, marks, ends),
                self._names(request),
                reader=CallReader(dialects) if dialects else None,
                single=not request.parallel_tool_calls,
            )
            for _ in range(request.n)
        ]
        return Session([self._handle(request, prompt, params, grammar)], choices, [prompt], True)

    def _texts(self, request: CompletionRequest) -> Session:
        prompts = [self._ids(prompt, request) for prompt in request.prompts]
        config = self.engine.config
        check_sequences(prompts, "prompt", config.vocab_size, config.max_position_embeddings)
        echoes = self._echoes(request, prompts) if request.echo else [Echo() for _ in prompts]
        stop, handles = request.stop or (), []
        if request.limit:
            params, grammar = self._params(request), self._grammar(request, "none")
            handles = [
                self._handle(request, prompt, params, grammar, key)
                for key, prompt in enumerate(prompts)
            ]
        ends = handles[0].samples[0].params.stop_token_ids if handles else ()
        choices = [
            Choice(
                TextStream(self.tokenizer, prompt, stop, None, (), ends),
                self._names(request),
                echo,
            )
            for prompt, echo in zip(prompts, echoes, strict=True)
            for _ in range(request.n)
        ]
        return Session(handles, choices, prompts, False)

    def _names(self, request: ChatRequest | CompletionRequest) -> TokenBytes | None:
        """How tokens are written beside their log-probs; None where nobody asks for them."""
        return None if request.num_logprobs is None else self.token_bytes

    def _params(self, request: ChatRequest | CompletionRequest) -> SamplingParams:
        ends = () if request.ignore_eos else self.tokenizer.eos_ids
        return SamplingParams(
            max_tokens=request.limit or self.engine.config.max_position_embeddings,
            temperature=request.temperature,
            top_k=max(0, request.top_k),
            top_p=request.top_p,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            frequency_penalty=request.frequency_penalty,
            presence_penalty=request.presence_penalty,
            logit_bias=tuple(sorted(request.logit_bias.items())),
            n=request.n,
            stop_token_ids=(*ends, *request.stop_token_ids),
            seed=secrets.randbits(63) if request.seed is None else request.seed % 2**64,
            logprobs=request.num_logprobs or 0,
        )

    def _handle(
        self,
        request: SamplingRequest,
        prompt: Ids,
        params: SamplingParams,
        grammar: Callable[[], Grammar] | None,
        key: int = 0,
    ) -> Handle:
        stop = request.stop
        stopping = stop_criterion(self.tokenizer, stop, prompt) if stop else None
        return self.engine.request(
            prompt, params, key=key, timeout=self.timeout, stopping=stopping, grammar=grammar
        )

    def _grammar(
        self, request: SamplingRequest, thought: Literal["none", "may", "opened"]
    ) -> Callable[[], Grammar] | None:
        """What the answer must obey: a form, calls of tools, or either."""
        form, calls, must = request.form, None, False
        if isinstance(request, ChatRequest) and request.functions:
            named = isinstance(request.tool_choice, dict)
            must = named or request.tool_choice == "required"
            if form or must:
                several = request.parallel_tool_calls and not named
                calls = calls_rule(request.functions, self.dialects[0], several)
        rules = [rule for rule in (None if must else form, calls) if rule]
        return self._grammars.compile(rules, thought) if rules else None

    def _opened(self, request: ChatRequest, prompt: Ids) -> bool | None:
        """Whether the answer begins inside of a thought; None: it can hold none any more."""
        if request.ending == "open":
            splitter = Splitter()
            splitter.push(_messages(request)[-1]["content"])
            if splitter.thinking or splitter.answering:
                return True if splitter.thinking else None
        return opens_thought(self.tokenizer, prompt)

    def _ids(self, prompt: str | Ids, request: CompletionRequest) -> Ids:
        if not isinstance(prompt, str):
            return prompt
        return self.tokenizer.encode(prompt, request.add_special_tokens, special=True)

    def _echoes(self, request: CompletionRequest, prompts: Sequence[Ids]) -> list[Echo]:
        """What is repeated of each prompt, with its log-probs where they are asked for."""
        empty = [([0.0] * (len(ids) - 1), [[]] * (len(ids) - 1)) for ids in prompts]
        count = request.num_logprobs
        scores = empty if count is None else self.engine.score_top(prompts, count)
        found = []
        for given, ids, score in zip(request.prompts, prompts, scores, strict=True):
            begun = isinstance(given, str) and request.add_special_tokens
            hidden = len(self.tokenizer.begin) if begun else 0
            entries = entries_of(self.tokenizer, ids, *score, hidden)
            # Some tokenizers drop white space of a text; tokens must join to what is given back.
            joined = "".join(entry.text for entry in entries)
            text = given if isinstance(given, str) and count is None else joined
            found.append(Echo(text, () if count is None else entries))
        return found

    def _chat_prompt(self, request: ChatRequest) -> tuple[Ids, Mode | None]:
        messages = _messages(request)
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


def _messages(request: ChatRequest) -> list[Message]:
    found = tidy([message.model_dump(exclude_none=True) for message in request.messages])
    if not found:
        raise SchemaError("messages hold no text to answer")
    return found
