"""What a policy learns from in one optimizer step, at most: the answers that it writes itself.

    tokens    G (P - 1 + S A)         pairs    G (P (P - 1) / 2 + S (A P + A (A - 1) / 2))

G groups a step, of one prompt of P tokens and S answers of A. A prompt stands once in a row and its
answers go on from it (`rl/experience.py`); of a preference pair S is 2. Every answer is taken to be
as long as `max_tokens`, and every group to have a signal: an upper bound. Generating and judging
are no part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from tessera.objectives.rpo import RPOConfig
from tessera.rl.rollouts import RolloutConfig
from tessera.train.flops import Work
from tessera.train.optim import TrainConfig

# Our own assumption: a question in its template. It counts once a group, so little hangs on it.
PROMPT = 256


@dataclass(frozen=True)
class Experience:
    """groups of a step, answers of a group that are learnt from, tokens of an answer and a prompt.

    engine: weights to generate with stand beside those that are trained. written: answers of a
    rollout, 0 where they are read from files.
    """

    groups: int
    answers: int
    length: int
    prompt: int
    engine: bool
    written: int

    @property
    def tokens(self) -> int:
        """Positions of a step."""
        return self.groups * (self.prompt - 1 + self.answers * self.length)

    def work(self, window: int | None) -> Work:
        """Of a step; window: the most tokens that one attends to."""
        shared = _seen(self.prompt - 1, window)
        answer = _seen(self.prompt - 1 + self.length, window) - shared
        return Work(self.tokens, self.groups * (shared + self.answers * answer))

    def train(self, given: TrainConfig) -> TrainConfig:
        """The training as planned: its steps are as large as this, its documents as long."""
        longest = self.prompt - 1 + self.length
        told = {"tokens_per_step": self.tokens, "sequence_length": max(2, longest)}
        return given.model_copy(update=told)


def experience(config: RolloutConfig, train: TrainConfig) -> Experience:
    """Of a step of `grpo`, `rloo` or `rpo`; of files, pairs as long as `max_tokens` says."""
    groups, answers = -(-config.prompts_per_rollout // config.updates_per_rollout), config.samples
    written = config.prompts_per_rollout * config.samples * (1 + config.dynamic_sampling)
    if isinstance(config, RPOConfig):
        answers = 2
        if config.paths:
            groups, written = config.pairs_per_step, 0
    row = train.microbatch_tokens
    length = min(config.max_tokens, row)
    prompt = max(1, min(PROMPT, row - length + 1))
    engine = bool(written) and config.engine == "tessera"
    return Experience(groups, answers, length, prompt, engine, written)


def _seen(length: int, window: int | None) -> int:
    """Pairs of the first `length` tokens of a document with those that they attend to."""
    whole = min(length, window or length)
    return whole * (whole + 1) // 2 + (length - whole) * whole
