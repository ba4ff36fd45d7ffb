"""Prices of words corrected by whole models, so that sums promise what models take. Torch-free.

A word repeated in a model of its own is not what it is between others: its weights and its cache
push out what the next one needs, and six alike keep theirs nearer. So the parent and a few
architectures of the space are timed beside the words. First all prices are scaled by s, the median
of measured / promised; then each price p gets a factor f by ridge regression on relative errors,

    min over f of  sum over models (sum of f·p / measured - 1)^2 / NOISE^2
                 + sum over words (f - s)^2 / TRUST^2

which leaves a price at the scale where no model speaks about it. What that is worth is told by
models left out of the fit in turn.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from tessera.model.config import KINDS
from tessera.puzzle.cost_table import Scenario, Words

Key = tuple[str, str]
Seconds = tuple[float, float]
Prices = Mapping[Key, Seconds]
Timed = Sequence[tuple[Words, Seconds]]

NOISE = 0.05  # how far, relatively, a model is from the sum of right prices
TRUST = 0.10  # how far, relatively, a scaled price is from the right one
FASTEST = 0.2  # no factor is below


def architectures(parent: Words, words: Sequence[Key], count: int, seed: int = 0) -> list[Words]:
    """The parent, then `count` architectures on the way from it to anywhere in the space.

    Each keeps every word of the parent with a chance that falls from 3/4 to none.
    """
    rng = random.Random(seed)
    offered = {kind: [word for k, word in words if k == kind] for kind in KINDS}
    found: list[Words] = [parent]
    for i in range(count):
        kept = 0.75 * (1 - i / max(1, count - 1))
        found.append(
            [
                tuple(
                    own if rng.random() < kept else rng.choice(offered[kind])
                    for kind, own in zip(KINDS, pair, strict=True)
                )
                for pair in parent
            ]
        )
    return found


def calibrate(prices: Prices, timed: Timed) -> dict[Key, Seconds]:
    """The prices, prefill and decode each corrected by the models timed, and made `monotone`."""
    if not timed:
        return monotone(prices)
    keys = list(prices)
    columns = []
    for column in range(2):
        alone = np.array([prices[key][column] for key in keys])
        rows = np.array([_counts(words, keys) for words, _ in timed]) * alone
        seconds = np.array([pair[column] for _, pair in timed])
        columns.append(alone * _factors(rows, seconds))
    return monotone({key: (float(p), float(d)) for key, p, d in zip(keys, *columns, strict=True)})


def _factors(rows: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """rows `(models, words)`, what each word contributes to each model -> factors `(words,)`."""
    count = rows.shape[1]
    scale = float(np.median(seconds / rows.sum(1)))
    a = np.concatenate([rows / seconds[:, None] / NOISE, np.eye(count) / TRUST])
    b = np.concatenate([np.full(len(rows), 1 / NOISE), np.full(count, scale / TRUST)])
    return np.maximum(FASTEST, np.linalg.lstsq(a, b, rcond=None)[0])


def monotone(seconds: Prices) -> dict[Key, Seconds]:
    """A narrower word never costs more than a wider one: noise is averaged away (isotonic).

    Without this the search may pick a wide word for being measured faster by luck.
    """
    smoothed = dict(seconds)
    for kind, prefix in (("attention", "gqa-"), ("ffn", "swiglu-")):
        keys = [key for key in seconds if key[0] == kind and key[1].startswith(prefix)]
        keys.sort(key=lambda key: int(key[1].removeprefix(prefix)))
        columns = [_isotonic([seconds[key][i] for key in keys]) for i in range(2)]
        smoothed |= {key: pair for key, pair in zip(keys, zip(*columns, strict=True), strict=True)}
    return smoothed


def _isotonic(values: list[float]) -> list[float]:
    """The closest non-decreasing sequence (pool adjacent violators)."""
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return [float(np.mean(pool)) for pool in pools for _ in pool]


def _counts(words: Words, keys: Sequence[Key]) -> list[int]:
    """How often each key is in an architecture; the base once."""
    found = Counter((kind, w) for pair in words for kind, w in zip(KINDS, pair, strict=True))
    return [1 if kind == "base" else found[kind, word] for kind, word in keys]


def promised(prices: Prices, words: Words) -> Seconds:
    """Seconds of (prefill, one decode step) that prices promise of an architecture."""
    counts = _counts(words, list(prices))
    prefill, decode = np.array(counts) @ np.array(list(prices.values()))
    return float(prefill), float(decode)


def held_out(prices: Prices, timed: Timed, scenario: Scenario) -> list[dict]:
    """A row a model: measured, and promised by prices that were fitted without it."""
    rows = []
    for i, (words, measured) in enumerate(timed):
        others = [*timed[:i], *timed[i + 1 :]]
        rows.append(compared(words, promised(calibrate(prices, others), words), measured, scenario))
    return rows


def compared(words: Words, promise: Seconds, measured: Seconds, scenario: Scenario) -> dict:
    """Promise beside measurement: prefill, one decode step and the scenario; errors relative."""
    row: dict = {"words": [list(pair) for pair in words]}
    pairs = {"prefill_seconds": 0, "decode_seconds": 1}
    for name, i in pairs.items():
        row |= _beside(name, promise[i], measured[i])
    steps = scenario.new - 1
    return row | _beside(
        "seconds", promise[0] + steps * promise[1], measured[0] + steps * measured[1]
    )


def _beside(name: str, promise: float, measured: float) -> dict[str, float]:
    error = promise / measured - 1
    return {f"promised_{name}": promise, f"measured_{name}": measured, f"error_{name}": error}
