"""A conversation in the terminal: the thought dimmed, then the answer, then tokens and seconds."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from tessera.data.chat import ChatEncoder
from tessera.data.conversation import Message, Mode
from tessera.data.switch import NONE, require_switch
from tessera.data.thought import Thought
from tessera.data.tokenizer import load_tokenizer
from tessera.generate.engine import SamplingParams
from tessera.generate.text import TextStream, opens_thought, thinking_budget
from tessera.generate.torch_engine import TorchEngine
from tessera.model.placed import DtypeName
from tessera.model.placement import for_inference
from tessera.model.source import resolve

HELP = "/on  /off  /clear  /help  (Ctrl-C stops an answer, Ctrl-D leaves)"
COMMAND = re.compile(r"/[a-z]+")  # a line of its own; others are the user's text
SAMPLING: dict[Mode | None, dict[str, float]] = {
    "on": {"temperature": 0.6, "top_p": 0.95},
    "off": {"temperature": 0.0},
    None: {"temperature": 0.6, "top_p": 0.95},
}


@dataclass(frozen=True)
class Asking:
    """How a model is asked. mode: None, as it stands. budget: tokens until a thought is closed.

    switch: the model's own where not given. variables: further ones of its chat template. dtype:
    what it computes in.
    """

    mode: Mode | None = None
    switch: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int = 2048
    budget: int | None = None
    dtype: DtypeName = "auto"


class Conversation:
    """A model and the messages so far. Raises SwitchError for "on" of a model without a switch."""

    def __init__(self, model: Path, asking: Asking) -> None:
        self.max_tokens, self.budget = asking.max_tokens, asking.budget
        self.variables, self.messages = asking.variables, list[Message]()
        self.tokenizer = load_tokenizer(model)
        self.encoder = ChatEncoder.of(self.tokenizer, switch=asking.switch, today=True)
        require_switch(self.encoder.switch, asking.mode, "the model")
        self.mode: Mode | None = asking.mode or self.encoder.default
        placement = for_inference(model, dtype=asking.dtype)
        self.engine = TorchEngine(placement.load(model, frozen=True))

    def command(self, name: str) -> str:
        """Run a command that begins with /; returns the text to show."""
        if name in ("/on", "/off"):
            if self.encoder.switch == NONE:
                return "the model has no reasoning switch; --switch says how it is told"
            self.mode = "on" if name == "/on" else "off"
            return f"thinking {self.mode}"
        if name == "/clear":
            self.messages.clear()
            return "begun anew"
        return HELP if name == "/help" else f"{name} is no command; {HELP}"

    def answer(self, question: str, show: Callable[[Thought], None]) -> str:
        """Tokens and seconds as text; `show` gets each piece. Keeps what came before Ctrl-C."""
        self.messages.append({"role": "user", "content": question})
        prompt = self.encoder.prompt(self.messages, self.mode, variables=self.variables)
        opened = opens_thought(self.tokenizer, prompt)
        stream, thinking = TextStream(self.tokenizer, prompt, opened=opened), None
        if self.budget is not None:
            thinking = thinking_budget(self.tokenizer, self.budget, opened)
        params = SamplingParams(
            max_tokens=self.max_tokens,
            stop_token_ids=self.tokenizer.eos_ids,
            seed=time.time_ns() % 2**63,
            thinking=thinking,
            **SAMPLING[self.mode],  # type: ignore[arg-type]
        )
        start, text, handle = time.monotonic(), Thought(), self.engine.submit(prompt, params)
        (completion,), seen = handle.completions, 0
        try:
            while not handle.done:
                self.engine.step()
                fresh, seen = completion.token_ids[seen:], len(completion.token_ids)
                text += (piece := stream.push(fresh))
                show(piece)
        except KeyboardInterrupt:
            handle.cancel()
            self.engine.step()
        text += (piece := stream.finish())
        show(piece)
        apart = {} if text.thought is None else {"reasoning_content": text.thought}
        self.messages.append({"role": "assistant", "content": text.answer, **apart})
        count, seconds = len(completion.token_ids), time.monotonic() - start
        thought = f", {stream.thought_tokens} of them thought" if stream.thought_tokens else ""
        return f"{count} tokens{thought}, {seconds:.1f} s, {count / seconds:,.0f} tokens/s"


def chat(model: str, asking: Asking) -> None:
    """Answer questions until the end of the input."""
    console = Console(highlight=False)
    conversation = Conversation(resolve(model), asking)
    said = f"thinking {conversation.mode}. " if conversation.mode else ""
    console.print(f"{said}{HELP}", style="dim")
    in_thought = False

    def show(piece: Thought) -> None:
        nonlocal in_thought
        if piece.thought:
            in_thought = True
            console.print(piece.thought, style="dim italic", end="", markup=False)
        if piece.answer:
            if in_thought:
                console.print("\n")
            in_thought = False
            console.print(piece.answer, end="", markup=False)

    while True:
        try:
            question = input("\n> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if COMMAND.fullmatch(question):
            console.print(conversation.command(question), style="dim")
        elif question:
            in_thought = False
            summary = conversation.answer(question, show)
            console.print(f"\n{summary}", style="dim", markup=False)
