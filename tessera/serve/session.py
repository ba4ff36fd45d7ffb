"""A model that is served: from the fields of a request to what the engine is asked."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from tessera.data.calls import MARKED, CallReader, Dialect, template_dialects
from tessera.data.chat import ChatEncoder
from tessera.data.switch import NONE
from tessera.data.thought import CLOSE, OPEN
from tessera.data.tokenizer import Tokenizer
from tessera.generate.engine import SamplingParams
from tessera.generate.grammar import Grammars, calls_rule
from tessera.generate.requests import NOT_FINITE, Grammar, Handle, NotFiniteError
from tessera.generate.text import TextStream, stop_criterion, thinking_budget
from tessera.generate.token_bytes import TokenBytes
from tessera.generate.torch_engine import TorchEngine
from tessera.serve.fields import ChatRequest, CompletionRequest, Ids, SamplingRequest
from tessera.serve.prepare import Prepared
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

    def submit(self, asked: Prepared) -> Session:
        """Queue a request. May take long: it is called outside of the event loop.

        Raises what the sampling, the grammars and the queue raise.
        """
        request = asked.request
        if isinstance(request, ChatRequest):
            found = self._chat(request, asked)
        else:
            found = self._texts(request, asked)
        self.engine.queue(found.handles)
        return found

    def _chat(self, request: ChatRequest, asked: Prepared) -> Session:
        (prompt,), mode, opened = asked.prompts, asked.mode, asked.opened
        params = self._params(request)
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

    def _texts(self, request: CompletionRequest, asked: Prepared) -> Session:
        prompts = asked.prompts
        echoes = self._echoes(request, asked) if request.echo else [Echo() for _ in prompts]
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

    def _echoes(self, request: CompletionRequest, asked: Prepared) -> list[Echo]:
        """What is repeated of each prompt, with its log-probs where they are asked for."""
        prompts = asked.prompts
        empty = [([0.0] * (len(ids) - 1), [[]] * (len(ids) - 1)) for ids in prompts]
        count = request.num_logprobs
        scores = empty if count is None else self.engine.score_top(prompts, count)
        if any(math.isnan(value) for logprobs, _ in scores for value in logprobs):
            raise NotFiniteError(NOT_FINITE)
        found = []
        for given, ids, score in zip(asked.texts, prompts, scores, strict=True):
            begun = isinstance(given, str) and request.add_special_tokens
            hidden = len(self.tokenizer.begin) if begun else 0
            entries = entries_of(self.tokenizer, ids, *score, hidden)
            # Some tokenizers drop white space of a text; tokens must join to what is given back.
            joined = "".join(entry.text for entry in entries)
            text = given if isinstance(given, str) and count is None else joined
            found.append(Echo(text, () if count is None else entries))
        return found
