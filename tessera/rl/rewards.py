"""What a recipe may say of rewards: one table a reward, told apart by `kind`.

    [[grpo.rewards]]
    kind = "math"                   # the last box against the row's `answer`
    [[grpo.rewards]]
    kind = "format"                 # the reasoning switch
    weight = 0.2
    [[grpo.rewards]]
    kind = "judge"
    endpoint = { url = "http://judge:8000/v1", model = "Llama-3.3-70B-Instruct" }

The keys that name a field (`answer = "expected_answer"`) say where in a row of data the checker's
expectation stands.

From a reward's table to its verifier: one row of a dict for each kind that is checked here.

`check` runs in the workers of `pool.py`; `prepare` runs before them and finds what is missing.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from pydantic import Field

from tessera.ask.endpoint import EndpointConfig
from tessera.data.conversation import Mode, switch_of
from tessera.data.thought import split
from tessera.rl.jail.run import Isolation, JailError, Limits, require_isolation
from tessera.rl.verifiers import language, mathematics
from tessera.rl.verifiers.code import CASES_TOGETHER, verify_asserts, verify_outputs
from tessera.rl.verifiers.exact import verify_choice, verify_exact, verify_format, verify_number
from tessera.rl.verifiers.instructions import read_instructions, verify_instructions
from tessera.rl.verifiers.mathematics import verify_math
from tessera.rl.verifiers.outcome import Outcome, unjudged, wrong
from tessera.runs.files import RunError
from tessera.runs.recipe import Config
from tessera.table import nearest


class RewardError(ValueError):
    """Rewards that cannot be computed as asked; the text says what to change."""


@dataclass(frozen=True)
class Sample:
    """One completion to be judged: its prompt's messages, its text, and its row's own fields.

    completion: the assistant's text, thoughts included, and the `<think>` that its prompt opened.
    truncated: cut at the length limit.
    """

    messages: Sequence[Mapping[str, str]]
    completion: str
    fields: Mapping[str, Any]
    truncated: bool = False

    @property
    def answer(self) -> str:
        """What is said after the thoughts."""
        return split(self.completion).answer.strip()

    @property
    def switch(self) -> Mode | None:
        """What the system prompt asks of the thoughts."""
        return switch_of(self.messages)


class RewardConfig(Config):
    """weight: its factor in the sum. deadline: seconds a sample, then its checker is killed, or its
    server not waited for any more: could-not-judge.

    name: in tables and logs; the kind unless given.
    """

    weight: float = Field(default=1.0, allow_inf_nan=False)
    deadline: float = Field(default=10.0, gt=0)
    name: str = ""


class MathReward(RewardConfig):
    kind: Literal["math"]
    answer: str = "answer"


class NumberReward(RewardConfig):
    kind: Literal["number"]
    answer: str = "answer"
    tolerance: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class ExactReward(RewardConfig):
    kind: Literal["exact"]
    answer: str = "answer"
    ignore_case: bool = True


class ChoiceReward(RewardConfig):
    kind: Literal["choice"]
    answer: str = "answer"
    choices: int = Field(default=26, ge=2, le=26)


class FormatReward(RewardConfig):
    kind: Literal["format"]


class InstructionsReward(RewardConfig):
    """loose, partial: see `verifiers.instructions`."""

    kind: Literal["instructions"]
    instructions: str = "instruction_id_list"
    arguments: str = "kwargs"
    loose: bool = False
    partial: bool = False


class CodeReward(RewardConfig):
    """Asserts where a row has `tests`; else its `inputs` and `outputs`.

    isolation: what stands between the program and this machine, see `jail`.
    """

    kind: Literal["code"]
    tests: str = "tests"
    setup: str = "setup"
    inputs: str = "inputs"
    outputs: str = "outputs"
    limits: Limits = Limits()
    isolation: Isolation = "namespaces"
    deadline: float = Field(default=60.0, gt=0)

    def model_post_init(self, _: Any) -> None:
        least = self.limits.seconds * CASES_TOGETHER + 10
        if self.deadline < least:
            raise ValueError(
                f"deadline = {self.deadline:g} cuts limits.seconds short; give {least:g}"
            )

    def asserts(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is judged by its tests; a null, as JSON lines have it, is no test."""
        return row.get(self.tests) is not None or row.get(self.inputs) is None


class FunctionReward(RewardConfig):
    """Your own: `module:function`, called with a Sample in a worker; returns an Outcome."""

    kind: Literal["function"]
    function: str = Field(pattern=r"^[\w.]+:\w+$")


class JudgeReward(RewardConfig):
    """An LLM that says whether prediction and reference agree (Llama-Nemotron §5.1).

    template: with {question}, {answer} and {prediction}; it must ask for a last line
    `Verdict: right` or `Verdict: wrong`. Empty: the built-in one.
    """

    kind: Literal["judge"]
    endpoint: EndpointConfig
    answer: str = "answer"
    template: str = ""
    max_tokens: int = Field(default=1024, ge=1)
    deadline: float = Field(default=120.0, gt=0)


class ModelReward(RewardConfig):
    """A reward model's score of the answer, right from `right_from` on, for the counts alone.

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


def require_fields(rewards: Sequence[Reward], row: Mapping[str, Any]) -> None:
    """Checks that a row holds what the rewards judge by, before anything is generated from it.

    Raises RewardError for a missing field, InstructionError for an unknown instruction.
    """
    for reward in rewards:
        for key in _fields(reward, row):
            if row.get(key) is None:
                raise RewardError(
                    f"the reward {reward.name or reward.kind!r} judges by the field {key!r}, which "
                    f"this row has not; {nearest(key, row)}"
                )
        if reward.kind == "instructions":
            read_instructions(row[reward.instructions], row[reward.arguments])


def _fields(reward: Reward, row: Mapping[str, Any]) -> list[str]:
    if isinstance(reward, InstructionsReward):
        return [reward.instructions, reward.arguments]
    if isinstance(reward, CodeReward):
        return [reward.tests] if reward.asserts(row) else [reward.inputs, reward.outputs]
    answer = getattr(reward, "answer", None)
    return [cast(str, answer)] if answer else []


def _code(reward: CodeReward, sample: Sample) -> Outcome:
    box: dict[str, Any] = {"limits": reward.limits, "isolation": reward.isolation}
    fields = sample.fields
    if reward.asserts(fields):
        setup = fields.get(reward.setup) or ""
        return verify_asserts(sample.answer, fields[reward.tests], setup=setup, **box)
    cases = fields[reward.inputs], fields[reward.outputs]
    return verify_outputs(sample.answer, *cases, **box)


_CHECKS: dict[str, Callable[[Any, Sample], Outcome]] = {
    "math": lambda r, s: verify_math(s.answer, str(s.fields[r.answer])),
    "number": lambda r, s: verify_number(s.answer, s.fields[r.answer], tolerance=r.tolerance),
    "exact": lambda r, s: verify_exact(
        s.answer, str(s.fields[r.answer]), ignore_case=r.ignore_case
    ),
    "choice": lambda r, s: verify_choice(s.answer, str(s.fields[r.answer]), choices=r.choices),
    "format": lambda r, s: verify_format(s.completion, s.switch, truncated=s.truncated),
    "instructions": lambda r, s: verify_instructions(
        s.answer,
        s.fields[r.instructions],
        s.fields[r.arguments],
        loose=r.loose,
        partial=r.partial,
    ),
    "code": _code,
    "function": lambda r, s: imported(r.function)(s),
}


def check(reward: CheckedReward, sample: Sample) -> Outcome:
    """A reward's verdict on a sample. Whatever goes wrong within is could-not-judge, with why.

    An answer is wrong where there is none, whatever the checker: the thoughts were not finished.
    """
    if reward.kind not in ("format", "function") and not sample.answer:
        return wrong("no answer")
    try:
        outcome = _CHECKS[reward.kind](reward, sample)
    except (Exception, RecursionError) as error:
        return unjudged(f"{type(error).__name__}: {error}"[:300])
    if not isinstance(outcome, Outcome):
        return unjudged(f"the checker returned {type(outcome).__name__} and no Outcome")
    return outcome


def prepare(rewards: Sequence[Reward]) -> None:
    """Finds a missing library, function or jail now and not at the first sample.

    Raises RewardError.
    """
    for reward in rewards:
        name = reward.name or reward.kind
        try:
            if reward.kind == "math":
                mathematics.require_library()
            elif reward.kind == "instructions":
                language.require_library()
            elif reward.kind == "code" and reward.isolation == "namespaces":
                require_isolation()
            elif reward.kind == "function":
                imported(reward.function)
        except (JailError, RewardError, RunError) as error:
            raise RewardError(f"the reward {name!r} cannot be computed: {error}") from None


@functools.cache
def imported(path: str) -> Callable[[Sample], Outcome]:
    """The function that `module:function` names. Raises RewardError."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RewardError(f"{path}: {error}; is its folder on PYTHONPATH?") from None
