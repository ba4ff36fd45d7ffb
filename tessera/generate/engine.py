"""What an engine is: tokens in, tokens out.

    as_completed(requests) -> completions as they end      generate(prompts, params) -> all of them
    score(sequences) -> log-probs      sync(module)

Text belongs to the callers (`text.py` helps them). No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from tessera.model.transformer import Transformer

# Called about once a second with the tokens of the completions under way, and how many these are.
Working = Callable[[int, int], None]
FinishReason = Literal["stop", "length", "cancelled", "timeout"]


class GenerationError(ValueError):
    """A request an engine cannot serve; the text says what to change."""


class QueueFullError(RuntimeError):
    """The engine has as many requests waiting as it may hold: the caller should try later."""


class ClosedError(RuntimeError):
    """The engine takes no more requests."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """A budget for the thought, after which it is closed and the answer goes on.

    The thought is open from the first token where `starts` is empty, else once the tokens end
    with one of `starts`; one of `ends` closes it. One tag can be several token sequences, because
    a tokenizer may merge `>` with the newline behind it. After `max_tokens` of thought `ends[0]` is
    forced, or the rest of an end that the model has begun. Forced tokens count as tokens of the
    completion, and their log-probs are the model's.
    """

    max_tokens: int
    ends: tuple[tuple[int, ...], ...]
    starts: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise GenerationError(f"thinking budget is {self.max_tokens}; it must be 0 or more")
        if not self.ends or not all((*self.ends, *self.starts)):
            raise GenerationError(
                "a thinking budget needs at least one sequence in ends, and none that is empty"
            )


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to continue a prompt.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 switch the filters off; top_k is applied
    first, top_p to what it leaves, and min_p drops what is less likely than that share of the
    likeliest. repetition_penalty divides the positive logits of tokens that prompt or completion
    hold, and multiplies the negative ones (Keskar et al. 2019); 1 is none. OpenAI's penalties look
    at the completion alone: frequency_penalty is taken off a token's logit for each time that it
    holds the token, presence_penalty once. logit_bias holds (token, what is added to its logit),
    before any penalty. n is the number of samples a prompt. A token of stop_token_ids ends the
    completion and is its last token; with none, every completion has max_tokens. logprobs is how
    many of the likeliest tokens are reported at each position, beside the chosen one.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    n: int = 1
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int = 0
    thinking: Thinking | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        positive = self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)
        warm = self.temperature >= 0 and math.isfinite(self.temperature)
        for name, valid, wanted in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("n", self.n >= 1, "at least 1"),
            ("temperature", warm, "0 for greedy or a positive number"),
            ("top_k", self.top_k >= 0, "0 for no limit or a positive count"),
            ("logprobs", self.logprobs >= 0, "0 for no report or a positive count"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1], 1 for no limit"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1], 0 for no limit"),
            ("repetition_penalty", positive, "1 for none or a positive number"),
            ("seed", 0 <= self.seed < 2**64, "in [0, 2**64)"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "0 for none or a number"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "0 for none or a number"),
            ("logit_bias", all(math.isfinite(b) for _, b in self.logit_bias), "of finite numbers"),
        ):
            if not valid:
                raise GenerationError(f"{name} is {getattr(self, name)}; it must be {wanted}")


@dataclass(slots=True)
class Completion:
    """One continuation; the prompt is not part of it.

    logprobs[i] is the log-probability of token_ids[i] under the model itself, before temperature
    and filters, so it compares with a trainer's. version is that of the weights that gave the
    first token. top_logprobs[i] holds the likeliest tokens at i as (id, log-prob) pairs, the
    likeliest first, if requested.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    version: int = 0
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class GenerationRequest:
    """A prompt for `Engine.as_completed`.

    samples: the numbers of those to make, 0 to params.n - 1 where not given. stopping: makes a
    criterion for each sample, which gets its tokens and ends it with True; tessera's engine alone.
    owner: the caller's, who finds it in what comes back.
    """

    prompt: Sequence[int]
    params: SamplingParams
    key: int = 0
    samples: Sequence[int] | None = None
    stopping: Callable[[], Callable[[int], bool]] | None = None
    owner: Any = None

    @property
    def numbers(self) -> Sequence[int]:
        return range(self.params.n) if self.samples is None else self.samples


# A request, the number of the sample, and the sample.
Completed = tuple[GenerationRequest, int, Completion]


class Engine(Protocol):
    """The contract of every engine."""

    def as_completed(
        self, requests: Iterable[GenerationRequest], working: Working | None = None
    ) -> Generator[Completed, None, None]:
        """Every sample of every request as it ends; requests are read as there is room for them.

        A sample's randomness is a function of (seed, key, sample, position), whatever else is under
        way. Prompts of similar length are read together where they follow each other. Closed before
        its end, the generator cancels what is under way. Raises GenerationError.
        """
        ...

    def check(self, requests: Sequence[GenerationRequest]) -> None:
        """Raise GenerationError where one of them cannot be served."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        keys: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """`params.n` completions of each prompt, in the prompts' order.

        `keys`, one integer a prompt, default to 0, 1, 2, … Raises GenerationError.
        """
        ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-prob of each token given its prefix.

        Entry t is that of token t + 1, so a sequence of T tokens has T - 1 entries.
        """
        ...

    def sync(self, module: Transformer, version: int) -> None:
        """Take the weights `module` has now; completions carry `version` from here on."""

    def sleep(self) -> None:
        """Free memory for the trainer; nothing may be asked until the next `sync`."""

    def close(self) -> None:
        """Give back the memory. The engine cannot be used afterwards."""


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    keys: Sequence[int] | None,
) -> list[list[Completion]]:
    """`Engine.generate` by way of `as_completed`, the longest prompts first."""
    keys = range(len(prompts)) if keys is None else keys
    if len(keys) != len(prompts):
        raise GenerationError(f"{len(prompts)} prompts, but {len(keys)} keys: give one each")
    pairs = enumerate(zip(prompts, keys, strict=True))
    requests = [GenerationRequest(prompt, params, key, owner=i) for i, (prompt, key) in pairs]
    engine.check(requests)
    found = [[Completion()] * params.n for _ in prompts]
    requests.sort(key=lambda one: -len(one.prompt))
    with closing(engine.as_completed(requests)) as completed:
        for request, number, completion in completed:
            found[request.owner][number] = completion
    return found


def check_sequences(
    sequences: Sequence[Sequence[int]], what: str, vocab_size: int, longest: int
) -> None:
    """Raise GenerationError for a sequence that is empty, too long or holds unknown ids."""
    for i, tokens in enumerate(sequences):
        if not tokens:
            raise GenerationError(f"{what} {i} is empty; give at least one token (bos will do)")
        if len(tokens) > longest:
            raise GenerationError(
                f"{what} {i} has {len(tokens)} tokens; max_position_embeddings leaves room for "
                f"{longest}"
            )
        if min(tokens) < 0 or max(tokens) >= vocab_size:
            bad = next(t for t in tokens if not 0 <= t < vocab_size)
            raise GenerationError(
                f"{what} {i} holds token id {bad}, but the vocabulary has {vocab_size}: "
                "use this model's tokenizer"
            )
