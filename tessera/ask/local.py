"""A model of tessera as the teacher: any `Engine` in this process, asked through its template."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tessera.ask.ask import AskError, Receive, Reply, Request
from tessera.data.thought import Splitter
from tessera.vllm.choice import EngineChoice, open_engine

if TYPE_CHECKING:
    from tessera.data.tokenizer import Tokenizer
    from tessera.generate.engine import Engine

KNOWN = {"max_tokens", "temperature", "top_p"}


class EngineConfig(EngineChoice):
    """The model that the stage's `model` names, generated with by an engine of this process.

    batch: requests handed to the engine at once; what a batch gave is kept when it ends. asking:
    "text" gives a base model the question and a line's end, and no chat template.
    """

    kind: Literal["engine"]
    batch: int = Field(default=64, ge=1)
    asking: Literal["chat", "text"] = "chat"


class LocalAnswerer:
    """An `Answerer` in this process."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prompt: Callable[[Request], list[int]],
        model: str,
        batch: int,
        seed: int,
    ) -> None:
        self.engine, self.tokenizer, self.prompt = engine, tokenizer, prompt
        self.model, self.batch, self.seed = model, batch, seed

    def ask(self, requests: Iterable[Request], receive: Receive) -> None:
        """See `Answerer.ask`; requests that sample alike are generated together."""
        alike = itertools.groupby(requests, key=lambda one: json.dumps(one.sampling))
        for _, group in alike:
            while batch := tuple(itertools.islice(group, self.batch)):
                self._ask(batch, receive)

    def _ask(self, batch: tuple[Request, ...], receive: Receive) -> None:
        from tessera.generate.engine import GenerationError, SamplingParams
        from tessera.generate.text import said

        if any(request.embed for request in batch):
            raise AskError('a teacher of kind "engine" gives no vectors; use kind = "embedder"')
        tokenizer = self.tokenizer
        sampling = {key: value for key, value in batch[0].sampling.items() if key in KNOWN}
        params = SamplingParams(**sampling, seed=self.seed, stop_token_ids=tokenizer.eos_ids)
        prompts = [self.prompt(one) for one in batch]
        keys = [int(one.key(self.model)[:15], 16) for one in batch]
        try:
            found = self.engine.generate(prompts, params, keys=keys)
        except GenerationError as error:
            if len(batch) == 1:  # this one is too long, say
                return receive(batch[0], Reply(error=str(error)))
            for one in batch:
                self._ask((one,), receive)
            return None
        for request, prompt, (completion, *_) in zip(batch, prompts, found, strict=True):
            tokens = completion.token_ids
            splitter = Splitter()
            told = splitter.push(said(tokenizer, prompt, tokens)) + splitter.flush()
            reply = Reply(told.answer, told.thought, completion.finish_reason, len(tokens))
            receive(request, reply)
        return None


def load(config: EngineConfig, model: Path | None, seed: int) -> LocalAnswerer:
    """The teacher of a model directory or run. Raises AskError without one."""
    from tessera.data.chat import ChatEncoder
    from tessera.data.tokenizer import load_tokenizer
    from tessera.model.checkpoint import load_model
    from tessera.runs.run import fingerprint_path

    if model is None:
        raise AskError(
            'a teacher of kind "engine" is the model of the stage: say model = "RUN OR PATH"'
        )
    engine = open_engine(config, load_model(model, frozen=True), config.batch)
    tokenizer = load_tokenizer(model)
    if config.asking == "chat":
        encoder = ChatEncoder.of(tokenizer)

        def prompt(request: Request) -> list[int]:
            return encoder.prompt(request.messages, request.mode)
    else:

        def prompt(request: Request) -> list[int]:
            return tokenizer.encode(request.messages[-1]["content"] + "\n", bos=True)

    name = fingerprint_path(model)
    return LocalAnswerer(engine, tokenizer, prompt, name, config.batch, seed)
