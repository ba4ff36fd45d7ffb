"""What a recipe may say of rewards: one table a reward (`[[grpo.rewards]]`), told apart by `kind`.

Keys that name a field (`answer = "expected_answer"`) say where a row has what the checker expects.
`check` runs in the workers of `pool.py`; `prepare` runs before and finds what is missing.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from tessera.ask.endpoint import EndpointConfig
from tessera.data.conversation import Mode, switch_of
from tessera.data.thought import split
from tessera.rl.jail.run import Isolation, JailError, Limits, require_isolation
from tessera.rl.verifiers import english, language, mathematics
from tessera.rl.verifiers.code import CLOCK_TIMES
from tessera.rl.verifiers.instructions import read_instructions
from tessera.rl.verifiers.judge import judge
from tessera.rl.verifiers.outcome import Outcome, unjudged
from tessera.runs.files import RunError
from tessera.runs.recipe import Config
from tessera.table import nearest

Row = Mapping[str, Any]


class RewardError(ValueError):
    """Rewards that cannot be computed as asked; the text says what to change."""


@dataclass(frozen=True)
class Sample:
    """One completion to be judged: its prompt's messages, its text, and its row's own fields.

    completion: the assistant's text, thoughts included, and the `<think>` that its prompt opened.
    truncated: cut at the length limit. mode: what the prompt asked for, where its messages do not
    say it.
    """

    messages: Sequence[Mapping[str, str]]
    completion: str
    fields: Row
    truncated: bool = False
    mode: Mode | None = None

    @property
    def answer(self) -> str:
        """The text after the thoughts."""
        return split(self.completion).answer.strip()


class RewardConfig(Config):
    """weight: its factor in the sum. deadline: seconds a sample, then its checker is killed, or its
    server not waited for any more: could-not-judge. name: in tables and logs; by default the kind.
    """

    weight: float = Field(default=1.0, allow_inf_nan=False)
    deadline: float = Field(default=10.0, gt=0)
    name: str = ""

    def fields(self, row: Row) -> list[str]:
        """The fields of a row that it judges by."""
        return []

    def prepare(self) -> None:
        """Raises JailError, RewardError or RunError if it cannot be computed here."""


class AnswerReward(RewardConfig):
    answer: str = "answer"

    def fields(self, row: Row) -> list[str]:
        return [self.answer]


class KnownAnswer(AnswerReward):
    """What `judge` says of an answer, by the expected one and the options of its kind."""

    kind: str

    def check(self, sample: Sample) -> Outcome:
        known = RewardConfig.model_fields.keys() | {"kind", "answer"}
        options = {key: value for key, value in self if key not in known}
        return judge(self.kind, sample.completion, sample.fields[self.answer], **options)


class MathReward(KnownAnswer):
    kind: Literal["math"]

    def prepare(self) -> None:
        mathematics.require_library()


class NumberReward(KnownAnswer):
    kind: Literal["number"]
    tolerance: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class ExactReward(KnownAnswer):
    kind: Literal["exact"]
    ignore_case: bool = True


class ChoiceReward(KnownAnswer):
    kind: Literal["choice"]
    choices: int = Field(default=26, ge=2, le=26)


class FormatReward(RewardConfig):
    kind: Literal["format"]

    def check(self, sample: Sample) -> Outcome:
        switch = sample.mode or switch_of(sample.messages)
        return judge(self.kind, sample.completion, switch=switch, truncated=sample.truncated)


class InstructionsReward(RewardConfig):
    """loose, partial: see `verifiers.instructions`."""

    kind: Literal["instructions"]
    instructions: str = "instruction_id_list"
    arguments: str = "kwargs"
    loose: bool = False
    partial: bool = False

    def fields(self, row: Row) -> list[str]:
        return [self.instructions, self.arguments]

    def prepare(self) -> None:
        language.require_library()
        english.require_library()

    def check(self, sample: Sample) -> Outcome:
        return judge(
            self.kind,
            sample.completion,
            instruction_id_list=sample.fields[self.instructions],
            kwargs=sample.fields[self.arguments],
            loose=self.loose,
            partial=self.partial,
        )


class CodeReward(RewardConfig):
    """Asserts where a row has `tests`; else its `inputs` and `outputs`. isolation: see `jail`.

    limits.seconds: CPU time of a program, and of one input, and as long it may sleep; by the clock
    it may take eight times as long, and what has not ended then could not be judged.
    """

    kind: Literal["code"]
    tests: str = "tests"
    setup: str = "setup"
    entry_point: str = "entry_point"
    inputs: str = "inputs"
    outputs: str = "outputs"
    limits: Limits = Limits()
    isolation: Isolation = "namespaces"
    deadline: float = Field(default=100.0, gt=0)

    def model_post_init(self, _: Any) -> None:
        least = self.limits.seconds * CLOCK_TIMES + 10
        if self.deadline < least:
            raise ValueError(
                f"deadline = {self.deadline:g} cuts limits.seconds short; give {least:g}"
            )

    def fields(self, row: Row) -> list[str]:
        # A null, as JSON lines have it, is no test.
        asserts = row.get(self.tests) is not None or row.get(self.inputs) is None
        return [self.tests] if asserts else [self.inputs, self.outputs]

    def prepare(self) -> None:
        if self.isolation == "namespaces":
            require_isolation()

    def check(self, sample: Sample) -> Outcome:
        keys = ("tests", "setup", "entry_point", "inputs", "outputs")
        given = {key: sample.fields.get(getattr(self, key)) for key in keys}
        return judge(
            self.kind, sample.completion, limits=self.limits, isolation=self.isolation, **given
        )


class FunctionReward(RewardConfig):
    """Your own: `module:function`, called with a Sample in a worker; returns an Outcome."""

    kind: Literal["function"]
    function: str = Field(pattern=r"^[\w.]+:\w+$")

    def prepare(self) -> None:
        _imported(self.function)

    def check(self, sample: Sample) -> Outcome:
        return _imported(self.function)(sample)


class JudgeReward(AnswerReward):
    """An LLM that says whether prediction and reference agree (Llama-Nemotron §5.1).

    template: with {question}, {answer} and {prediction}; it must ask for a last line
    `Verdict: right` or `Verdict: wrong`. Empty: the built-in one.
    """

    kind: Literal["judge"]
    endpoint: EndpointConfig
    template: str = ""
    max_tokens: int = Field(default=1024, ge=1)
    deadline: float = Field(default=120.0, gt=0)


class ModelReward(RewardConfig):
    """A reward model's score of the answer; at `right_from` or more it counts as right in tables.

    It is asked as a chat that ends with the answer, and replies `reward:-3.25` (NVIDIA NIM's form).
    """

    kind: Literal["reward_model"]
    endpoint: EndpointConfig
    right_from: float = Field(default=0.0, allow_inf_nan=False)
    deadline: float = Field(default=120.0, gt=0)


CheckedReward = (
    MathReward
    | NumberReward
    | ExactReward
    | ChoiceReward
    | FormatReward
    | InstructionsReward
    | CodeReward
    | FunctionReward
)
AskedReward = JudgeReward | ModelReward
Reward = Annotated[CheckedReward | AskedReward, Field(discriminator="kind")]


def names(rewards: Sequence[Reward]) -> list[str]:
    """The name of each reward. Raises RewardError where two share one."""
    found = [reward.name or reward.kind for reward in rewards]
    for name in found:
        if found.count(name) > 1:
            raise RewardError(f"two rewards are called {name!r}; give one of them another name")
    return found


def require_fields(rewards: Sequence[Reward], row: Row) -> None:
    """Raises RewardError for a field that a row lacks, InstructionError for an unknown one."""
    for reward in rewards:
        for key in reward.fields(row):
            if row.get(key) is None:
                raise RewardError(
                    f"the reward {reward.name or reward.kind!r} judges by the field {key!r}, which "
                    f"is missing in this row; {nearest(key, row)}"
                )
        if isinstance(reward, InstructionsReward):
            read_instructions(row[reward.instructions], row[reward.arguments])


def check(reward: CheckedReward, sample: Sample) -> Outcome:
    """A reward's verdict on a sample; could-not-judge, with the reason, if the checker fails."""
    try:
        outcome = reward.check(sample)
    except Exception as error:
        return unjudged(f"{type(error).__name__}: {error}"[:300])
    if not isinstance(outcome, Outcome):
        return unjudged(f"the checker returned {type(outcome).__name__} and no Outcome")
    return outcome


def prepare(rewards: Sequence[CheckedReward]) -> None:
    """Raises RewardError for a missing library, function or jail."""
    for reward in rewards:
        try:
            reward.prepare()
        except (JailError, RewardError, RunError) as error:
            name = reward.name or reward.kind
            raise RewardError(f"the reward {name!r} cannot be computed: {error}") from None


@functools.cache
def _imported(path: str) -> Callable[[Sample], Outcome]:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RewardError(f"{path}: {error}; is its folder on PYTHONPATH?") from None
