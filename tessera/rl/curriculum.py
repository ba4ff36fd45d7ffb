"""Which prompts a step trains on: at random, or from easy to hard (Llama-Nemotron §5.1).

    share of bin b at step s  ∝  exp(-(c_b - μ_s)² / 2σ²),   μ_s from `start` to `end`, linearly

c_b is the pass rate at the middle of a bin. No prompt comes again before all have come once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from tessera.runs.recipe import Config

ORDER_STREAM = 0x0C0  # keeps these draws apart from others of the same seed


class CurriculumConfig(Config):
    """order: "random", or "curriculum" by pass rate. start, end: the Gaussian's centre at the first
    and last step. sigma: its width. bins: of pass rate in [0, 1]."""

    order: Literal["random", "curriculum"] = "random"
    start: float = Field(default=0.9, ge=0, le=1)
    end: float = Field(default=0.1, ge=0, le=1)
    sigma: float = Field(default=0.2, gt=0)
    bins: int = Field(default=10, ge=2)


@dataclass(frozen=True, slots=True)
class Order:
    """batches: for each step the numbers of its prompts. planned, actual: (steps, bins) shares."""

    batches: list[NDArray[np.int64]]
    planned: NDArray[np.float64]
    actual: NDArray[np.float64]

    def table(self, every: int) -> list[dict[str, Any]]:
        """Rows to show: each bin's planned and actual share, in spans of `every` steps."""
        rows = []
        for first in range(0, len(self.batches), every):
            part = slice(first, first + every)
            means = self.planned[part].mean(0), self.actual[part].mean(0)
            for number, (planned, actual) in enumerate(zip(*means, strict=True)):
                middle = (number + 0.5) / self.planned.shape[1]
                row = {"step": first + 1, "pass_rate": round(middle, 4)}
                rows.append({**row, "planned": float(planned), "actual": float(actual)})
        return rows


def order(
    pass_rates: Sequence[float | None],
    steps: int,
    batch: int,
    config: CurriculumConfig,
    seed: int,
) -> Order:
    """The prompts of each batch. Raises ValueError for a curriculum without pass rates."""
    if config.order == "curriculum" and None in pass_rates:
        raise ValueError(
            'order = "curriculum" needs every prompt\'s pass rate: give profile.samples, or take '
            'order = "random"'
        )
    rng = np.random.default_rng([seed, ORDER_STREAM])
    # Prompts without a pass rate are in the first bin.
    rates = np.array([rate or 0.0 for rate in pass_rates])
    bins = np.minimum((rates * config.bins).astype(np.int64), config.bins - 1)
    if config.order == "random":
        planned = np.tile(np.bincount(bins, minlength=config.bins) / len(bins), (steps, 1))
    else:
        middles = (np.arange(config.bins) + 0.5) / config.bins
        centres = [
            config.start + (config.end - config.start) * step / max(1, steps - 1)
            for step in range(steps)
        ]
        weights = [np.exp(-((middles - one) ** 2) / (2 * config.sigma**2)) for one in centres]
        planned = np.stack([one / one.sum() for one in weights])
    batches = _batches(bins, planned, batch, config.order, rng)
    counts = [np.bincount(bins[chosen], minlength=config.bins) for chosen in batches]
    return Order(batches, planned, np.stack(counts) / batch)


def _batches(
    bins: NDArray[np.int64],
    planned: NDArray[np.float64],
    batch: int,
    kind: str,
    rng: np.random.Generator,
) -> list[NDArray[np.int64]]:
    """The prompts of each batch. Once all prompts have come, they are shuffled and come again."""
    left: list[list[int]] = []  # of each bin, what has not come yet in this round
    batches = []
    for shares in planned:
        chosen: list[int] = []
        while len(chosen) < batch:
            if not any(left):
                shuffled = rng.permutation(len(bins))
                left = [shuffled[bins[shuffled] == b].tolist() for b in range(bins.max() + 1)]
            wanted = batch - len(chosen)
            if kind == "curriculum":
                chosen += _take_by_share(left, wanted, shares)
                continue
            everything = [prompt for pool in left for prompt in pool]
            found = [everything[i] for i in rng.permutation(len(everything))[:wanted]]
            gone = set(found)
            left = [[prompt for prompt in pool if prompt not in gone] for pool in left]
            chosen += found
        batches.append(rng.permutation(np.array(chosen, np.int64)))
    return batches


def _take_by_share(left: list[list[int]], wanted: int, shares: NDArray[np.float64]) -> list[int]:
    """Takes at most `wanted` prompts out of `left`; what bins lack comes from the fullest."""
    amounts = shares[: len(left)] * wanted
    counts = np.floor(amounts).astype(int)
    spare = min(wanted, round(float(amounts.sum()))) - int(counts.sum())
    for number in np.argsort(counts - amounts, kind="stable")[: max(0, spare)]:
        counts[number] += 1
    found: list[int] = []
    for pool, count in zip(left, counts.tolist(), strict=True):
        found += pool[:count]
        del pool[:count]
    while len(found) < wanted and any(left):
        found.append(max(left, key=len).pop(0))
    return found
