"""A reward for tests that a policy of three training steps has some of: variety of its letters."""

from __future__ import annotations

from tessera.rl.rewards import Sample
from tessera.rl.verifiers.outcome import Outcome


def variety(sample: Sample) -> Outcome:
    return Outcome("right", len(set(sample.completion)) / 32)


def unable(sample: Sample) -> Outcome:
    """Nothing can be told."""
    raise KeyError("no letters")
