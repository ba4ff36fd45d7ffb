"""From a reward's table to its verifier: one row of a dict for each kind that is checked here.

`check` runs in the workers of `pool.py`; `prepare` runs before them and finds what is missing.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from tessera.rl.jail.run import JailError, require_isolation
from tessera.rl.rewards import CheckedReward, CodeReward, Reward, RewardError, Sample
from tessera.rl.verifiers import language, mathematics
from tessera.rl.verifiers.code import verify_asserts, verify_outputs
from tessera.rl.verifiers.exact import verify_choice, verify_exact, verify_number
from tessera.rl.verifiers.format import verify_format
from tessera.rl.verifiers.instructions import verify_instructions
from tessera.rl.verifiers.mathematics import verify_math
from tessera.rl.verifiers.outcome import Outcome, unjudged, wrong


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
        except (ImportError, JailError, RewardError) as error:
            raise RewardError(f"the reward {name!r} cannot be computed: {error}") from None


@functools.cache
def imported(path: str) -> Callable[[Sample], Outcome]:
    """The function that `module:function` names. Raises RewardError."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RewardError(f"{path}: {error}; is its folder on PYTHONPATH?") from None
