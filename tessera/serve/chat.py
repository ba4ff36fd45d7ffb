"""A conversation in the terminal: the thought dimmed, then the answer, then what it took.

/on  /off    the switch, from the next question on      /clear   begin anew
/help        these words                                 Ctrl-D   leave; Ctrl-C stops an answer
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from tessera.data.chat import ChatEncoder
from tessera.data.conversation import Message, Mode
from tessera.data.thought import Thought
from tessera.data.tokenizer import load_tokenizer
from tessera.generate.engine import SamplingParams
from tessera.generate.text import TextStream, opens_thought, thinking_budget
from tessera.generate.torch_engine import TorchEngine
from tessera.model.checkpoint import load_model
from tessera.model.source import resolve

HELP = "/on  /off  /clear  /help  (Ctrl-C stops an answer, Ctrl-D leaves)"
SAMPLING: dict[Mode, dict[str, float]] = {
    "on": {"temperature": 0.6, "top_p": 0.95},
    "off": {"temperature": 0.0},
}


@dataclass
class Conversation:
    """A model and what was said."""

    model: Path
    mode: Mode
    max_tokens: int
    budget: int | None = None
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokenizer = load_tokenizer(self.model)
        self.encoder = ChatEncoder.of(self.tokenizer)
        self.engine = TorchEngine(load_model(self.model, frozen=True))

    def command(self, word: str) -> str:
        """Obeys a word that begins with /; returns what to tell."""
        if word in ("/on", "/off"):
            self.mode = "on" if word == "/on" else "off"
            return f"thinking {self.mode}"
        if word == "/clear":
            self.messages.clear()
            return "begun anew"
        return HELP if word == "/help" else f"{word} is no command; {HELP}"

    def answer(self, question: str, show: Any) -> str:
        """Asks; `show` gets each `Thought` as it comes. Returns tokens and seconds as text.

        An answer that is interrupted stands as far as it came.
        """
        self.messages.append({"role": "user", "content": question})
        prompt = self.encoder.prompt(self.messages, self.mode)
        opened = opens_thought(self.tokenizer, prompt)
        stream = TextStream(self.tokenizer, prompt, opened=opened)
        thinking = None
        if self.budget is not None:
            thinking = thinking_budget(self.tokenizer, self.budget, opened)
        params = SamplingParams(
            max_tokens=self.max_tokens,
            stop_token_ids=self.tokenizer.eos_ids,
            seed=time.time_ns() % 2**63,
            thinking=thinking,
            **SAMPLING[self.mode],  # type: ignore[arg-type]
        )
        begun, told, handle = time.monotonic(), Thought(), self.engine.submit(prompt, params)
        (completion,), seen = handle.completions, 0
        try:
            while not handle.done:
                self.engine.step()
                fresh, seen = completion.token_ids[seen:], len(completion.token_ids)
                piece = stream.push(fresh)
                told += piece
                show(piece)
        except KeyboardInterrupt:
            handle.cancel()
            self.engine.step()
        piece = stream.finish()
        told += piece
        show(piece)
        apart = {} if told.thought is None else {"reasoning_content": told.thought}
        self.messages.append({"role": "assistant", "content": told.answer, **apart})
        count, seconds = len(completion.token_ids), time.monotonic() - begun
        thought = f", {stream.thought_tokens} of them thought" if stream.thought_tokens else ""
        return f"{count} tokens{thought}, {seconds:.1f} s, {count / seconds:,.0f} tokens/s"


def talk(model: str, mode: Mode, max_tokens: int, budget: int | None) -> None:
    """Reads questions until the end of the input."""
    console = Console(highlight=False)
    conversation = Conversation(resolve(model), mode, max_tokens, budget)
    console.print(f"thinking {mode}. {HELP}", style="dim")
    while True:
        try:
            question = input("\n> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if question.startswith("/"):
            console.print(conversation.command(question.split()[0]), style="dim")
        elif question:
            told = conversation.answer(question, _Shown(console))
            console.print(f"\n{told}", style="dim", markup=False)


class _Shown:
    """Prints pieces as they come, the thought dimmed and a line before the answer."""

    def __init__(self, console: Console) -> None:
        self.console, self.thought, self.answered = console, False, False

    def __call__(self, piece: Thought) -> None:
        if piece.thought:
            self.thought = True
            self.console.print(piece.thought, style="dim italic", end="", markup=False)
        if piece.answer:
            if self.thought and not self.answered:
                self.console.print("\n")
            self.answered = True
            self.console.print(piece.answer, end="", markup=False)
