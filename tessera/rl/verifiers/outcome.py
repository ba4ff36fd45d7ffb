"""The result of a check: right, wrong, or could-not-judge, which has no score to learn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Verdict = Literal["right", "wrong", "could-not-judge"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True)
class Outcome:
    """A verdict, its score (None for could-not-judge; checkers': in [0, 1]), and why."""

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
