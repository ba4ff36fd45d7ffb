"""What an engine is: tokens in, tokens out.

    generate(prompts, params) -> completions      score(sequences) -> log-probs      sync(module)

Three verbs serve evaluation, reinforcement learning and measurement alike. An engine knows
nothing of text: chat templates, stop words and answers belong to its callers. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from tessera.model.transformer import Transformer

Progress = Callable[[int, int], None]


class GenerationError(ValueError):
    """A request an engine cannot serve; the text says what to change."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to continue a prompt.

    temperature 0 is greedy. top_k 0 and top_p 1 switch the filters off; top_k is applied first
    and top_p to what it leaves. n is the number of samples a prompt. A token of stop_token_ids
    ends the completion and is its last token; with none, every completion has max_tokens.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    n: int = 1
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "n"):
            if getattr(self, name) < 1:
                raise GenerationError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise GenerationError(
                f"temperature is {self.temperature}; use 0 for greedy or a positive number"
            )
        if self.top_k < 0:
            raise GenerationError(f"top_k is {self.top_k}; use 0 for no limit or a positive count")
        if not 0 < self.top_p <= 1:
            raise GenerationError(f"top_p is {self.top_p}; it must lie in (0, 1], 1 for no limit")
        if not 0 <= self.seed < 2**64:
            raise GenerationError(f"seed is {self.seed}; it must lie in [0, 2**64)")


@dataclass(slots=True)
class Completion:
    """One continuation; the prompt is not part of it.

    logprobs[i] is the log-probability of token_ids[i] under the model itself, before temperature
    and filters, so it compares with a trainer's. version is that of the weights.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] = "length"
    version: int = 0


class Engine(Protocol):
    """The contract of every engine."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        keys: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """`params.n` completions of each prompt, in the prompts' order.

        A sample's randomness is a function of (seed, key, sample, position), whatever else is in
        the batch; `keys`, one integer a prompt, default to 0, 1, 2, … `progress(done, total)` is
        called as completions finish. Raises GenerationError.
        """
        ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-prob of each token given its prefix.

        Entry t speaks of token t + 1, so a sequence of T tokens has T - 1 entries.
        """
        ...

    def sync(self, module: Transformer, version: int) -> None:
        """Take the weights `module` has now; completions carry `version` from here on."""
        ...

    def close(self) -> None:
        """Give back the memory. The engine cannot be used afterwards."""
        ...


def check_sequences(
    sequences: Sequence[Sequence[int]], what: str, vocab_size: int, longest: int
) -> None:
    """Raise GenerationError for a sequence that is empty, too long or holds unknown ids."""
    for i, tokens in enumerate(sequences):
        if not tokens:
            raise GenerationError(f"{what} {i} is empty; give at least one token (bos will do)")
        if len(tokens) > longest:
            raise GenerationError(
                f"{what} {i} has {len(tokens)} tokens; the model's max_position_embeddings leaves "
                f"room for {longest}"
            )
        if min(tokens) < 0 or max(tokens) >= vocab_size:
            bad = next(t for t in tokens if not 0 <= t < vocab_size)
            raise GenerationError(
                f"{what} {i} holds token id {bad}, but the vocabulary has {vocab_size}: "
                "was it encoded by another model's tokenizer?"
            )
