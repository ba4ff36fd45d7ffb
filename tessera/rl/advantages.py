"""Advantages of the samples of one prompt: how much better each is than its group.

    GRPO   A_i = (r_i - mean r) / std r                 (DeepSeekMath, arXiv 2402.03300, §4.1)
    RLOO   A_i = r_i - mean of r_j over j != i          (Ahmadian et al., arXiv 2402.14740)

A reward that is None could not be judged, or is left out: it has no advantage and no part in the
group's mean, so that nobody is compared with a sample of which nothing is known. Where all are
worth the same, up to rounding, every advantage is 0 exactly: that is how others know it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

EPSILON = 1e-6
ROUNDING = 1e-12  # rewards no further apart than this are the same sum, added in another order

Advantages = Callable[[Sequence[float]], list[float]]


def grpo(rewards: Sequence[float], *, std: bool = True) -> list[float]:
    """Distances from the group's mean, in standard deviations of its samples.

    std=False leaves them in rewards (Dr. GRPO, arXiv 2503.20783): with it, prompts that are nearly
    always or nearly never solved count more.
    """
    if _alike(rewards):
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    if not std:
        return centred
    deviation = (sum(one * one for one in centred) / (len(rewards) - 1)) ** 0.5
    return [one / (deviation + EPSILON) for one in centred] if deviation > EPSILON else centred


def rloo(rewards: Sequence[float]) -> list[float]:
    """Distances from the mean of the others; 0 for a sample that has no others."""
    if _alike(rewards):
        return [0.0] * len(rewards)
    total = sum(rewards)
    return [reward - (total - reward) / (len(rewards) - 1) for reward in rewards]


def _alike(rewards: Sequence[float]) -> bool:
    """True too of a single one: it has nobody to be compared with."""
    return max(rewards) - min(rewards) <= ROUNDING


def of_group(rewards: Sequence[float | None], rule: Advantages) -> list[float | None]:
    """The rule's advantages of the samples that have a reward; None for the others."""
    known = [reward for reward in rewards if reward is not None]
    found = iter(rule(known) if known else ())
    return [None if reward is None else next(found) for reward in rewards]
