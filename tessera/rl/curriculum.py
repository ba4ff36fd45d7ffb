"""Which prompts a step trains on: by chance, or from easy to hard (Llama-Nemotron §5.1).

    share of bin b at step s  ∝  exp(-(c_b - μ_s)² / 2σ²),   μ_s from `start` to `end`, linearly

c_b is a bin's pass rate in the middle. A batch takes its shares as far as bins can give them, what
is missing from the bin that has most left, and is shuffled. No prompt comes again before all have
come once. The whole order follows from pass rates, config and seed.
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
    """The prompts of each of `steps` batches.

    Raises ValueError for a curriculum over prompts whose pass rate nobody measured.
    """
    if config.order == "curriculum" and None in pass_rates:
        raise ValueError(
            'order = "curriculum" needs every prompt\'s pass rate: give profile.samples, or take '
            'order = "random"'
        )
    rng = np.random.default_rng([seed, ORDER_STREAM])
    bins = _bins(pass_rates, config.bins)
    planned = np.stack([_shares(config, step, steps, bins) for step in range(steps)])
    pools = _Pools(bins, rng)
    batches = [pools.take(batch, planned[step], config.order) for step in range(steps)]
    actual = np.stack(
        [np.bincount(bins[chosen], minlength=config.bins) / batch for chosen in batches]
    )
    return Order(batches, planned, actual)


def _bins(pass_rates: Sequence[float | None], count: int) -> NDArray[np.int64]:
    """The bin of each prompt; those without a pass rate stand in the first."""
    rates = np.array([rate or 0.0 for rate in pass_rates])
    return np.minimum((rates * count).astype(np.int64), count - 1)


def _shares(
    config: CurriculumConfig, step: int, steps: int, bins: NDArray[np.int64]
) -> NDArray[np.float64]:
    """What a batch is to hold of each bin."""
    if config.order == "random":
        return np.bincount(bins, minlength=config.bins) / len(bins)
    centre = config.start + (config.end - config.start) * step / max(1, steps - 1)
    middles = (np.arange(config.bins) + 0.5) / config.bins
    weights = np.exp(-((middles - centre) ** 2) / (2 * config.sigma**2))
    return weights / weights.sum()


class _Pools:
    """The prompts of each bin that have not come yet in this round, shuffled."""

    def __init__(self, bins: NDArray[np.int64], rng: np.random.Generator) -> None:
        self.bins, self.rng = bins, rng
        self.count = int(bins.max()) + 1
        self.left: list[list[int]] = []
        self._fill()

    def _fill(self) -> None:
        shuffled = self.rng.permutation(len(self.bins))
        self.left = [shuffled[self.bins[shuffled] == b].tolist() for b in range(self.count)]

    def take(self, batch: int, shares: NDArray[np.float64], kind: str) -> NDArray[np.int64]:
        """The prompts of one batch; where a round ends in it, it begins the next."""
        chosen: list[int] = []
        while len(chosen) < batch:
            if not any(self.left):
                self._fill()
            wanted = batch - len(chosen)
            chosen += self._by_share(wanted, shares) if kind == "curriculum" else self._any(wanted)
        return self.rng.permutation(np.array(chosen, np.int64))

    def _any(self, wanted: int) -> list[int]:
        everything = [prompt for pool in self.left for prompt in pool]
        picked = self.rng.permutation(len(everything))[:wanted]
        found = [everything[i] for i in picked]
        gone = set(found)
        self.left = [[prompt for prompt in pool if prompt not in gone] for pool in self.left]
        return found

    def _by_share(self, wanted: int, shares: NDArray[np.float64]) -> list[int]:
        found: list[int] = []
        for number, count in enumerate(_whole(shares[: self.count] * wanted, wanted)):
            pool = self.left[number]
            found += pool[:count]
            del pool[:count]
        while len(found) < wanted and any(self.left):
            largest = max(self.left, key=len)
            found.append(largest.pop(0))
        return found


def _whole(amounts: NDArray[np.float64], total: int) -> list[int]:
    """Whole numbers near the amounts, the largest remainders first, at most `total` in all."""
    floors = np.floor(amounts).astype(int)
    spare = min(total, round(float(amounts.sum()))) - int(floors.sum())
    for number in np.argsort(floors - amounts, kind="stable")[: max(0, spare)]:
        floors[number] += 1
    return floors.tolist()
