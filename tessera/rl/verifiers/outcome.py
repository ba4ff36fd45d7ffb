"""The result of a check: right, wrong, or could-not-judge, with a score where it was judged.

A checker that failed says nothing about the completion. A score of 0 in its place would be learned
from, so there is no score without a verdict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Verdict = Literal["right", "wrong", "could-not-judge"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True)
class Outcome:
    """A verdict, its score (None if and only if it is could-not-judge), and why.

    Scores of checkers lie in [0, 1]; those of reward models are not bounded.
    """

    verdict: Verdict
    score: float | None
    reason: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"{self.verdict!r} is no verdict; {', '.join(VERDICTS)} are")
        if (self.score is None) != (self.verdict == "could-not-judge"):
            raise ValueError(f"a score of {self.score} does not go with {self.verdict!r}")
        if self.score is not None and not abs(self.score) < float("inf"):
            raise ValueError(f"a score must be a finite number, not {self.score}")


def right(reason: str = "") -> Outcome:
    return Outcome("right", 1.0, reason)


def wrong(reason: str) -> Outcome:
    return Outcome("wrong", 0.0, reason)


def unjudged(reason: str) -> Outcome:
    return Outcome("could-not-judge", None, reason)


def judged(holds: bool, reason: str) -> Outcome:
    """Right where something holds, else wrong for the reason given."""
    return right() if holds else wrong(reason)
