"""Search: seconds to a proved optimum on spaces as large as the papers'.

    python benchmarks/search.py [--seeds 5] [--share 0.6] [--time-limit 300]

80 layers x 54 options up to 126 layers x 200 options a layer, in three forms: two places a layer
whose words multiply to that number (attention x FFN, what tessera searches), the same with pairs
trained together among them, and one place with that many words (a search over whole blocks). A
wider word costs more and hurts less, with noise on both, which makes trade-offs close and proofs
hard. Latency and memory are each held to a share of the parent's.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator

import harness
import highspy
import numpy as np
from harness import Command, table

from tessera.puzzle.program import Option, Solution, solve

COLUMNS = ("seconds", "bytes")
# layers, words of each place of a layer, and how many of each place's are also trained in pairs
SPACES = {
    "80 layers x 54 (6 attention x 9 FFN)": (80, {"attention": 6, "ffn": 9}, (0, 0)),
    "80 layers x 54, 12 of them pairs": (80, {"attention": 6, "ffn": 9}, (4, 3)),
    "80 layers x 54 whole blocks": (80, {"ffn": 54}, (0, 0)),
    "126 layers x 54 (6 attention x 9 FFN)": (126, {"attention": 6, "ffn": 9}, (0, 0)),
    "126 layers x 54, 12 of them pairs": (126, {"attention": 6, "ffn": 9}, (4, 3)),
    "126 layers x 200 (10 attention x 20 FFN)": (126, {"attention": 10, "ffn": 20}, (0, 0)),
    "126 layers x 200 whole blocks": (126, {"ffn": 200}, (0, 0)),
}
TOY = "8 layers x 54, 12 of them pairs"


def run(options: argparse.Namespace) -> None:
    rows = []
    spaces = {TOY: (8, {"attention": 6, "ffn": 9}, (4, 3))} if options.smoke else SPACES
    for name, (layers, places, paired) in spaces.items():
        found, variables = [], 0
        for seed in range(options.seeds):
            words = instance(seed, layers, places)
            pairs = list(pairs_of(seed, words, layers, *paired))
            limits = {c: options.share * parent_cost(words, c) for c in COLUMNS}
            apart = [(pair.layer, *pair.word.split("+")) for pair in pairs]
            solution = solve(words + pairs, limits, apart, time_limit=options.time_limit)
            check(solution, limits, layers * len(places))
            found.append(solution)
            variables = len(words + pairs)
        seconds = [solution.seconds for solution in found]
        rows.append(
            {
                "space": name,
                "variables": variables,
                "seconds, median": f"{statistics.median(seconds):.2f}",
                "max": f"{max(seconds):.2f}",
                "largest gap": f"{max(solution.gap for solution in found):.1e}",
            }
        )
    table(
        rows,
        f"HiGHS {highspy.Highs().version()}, {options.seeds} random instances each, seconds and "
        f"bytes at most {options.share:g} of the parent's",
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=5, help="instances of each size")
    parser.add_argument("--share", type=float, default=0.6, help="budget, as a share of parent's")
    parser.add_argument("--time-limit", type=float, default=300.0)


def instance(seed: int, layers: int, places: dict[str, int]) -> list[Option]:
    """Every word of every place; the parent's own comes first, scores 0 and costs most."""
    rng = np.random.default_rng(seed)
    return [
        option
        for layer in range(layers)
        for kind, count in places.items()
        for option in words_of(rng, layer, kind, count)
    ]


def words_of(rng: np.random.Generator, layer: int, kind: str, count: int) -> Iterator[Option]:
    sensitivity, price = rng.lognormal(0.0, 1.0), {c: rng.uniform(0.5, 1.5) for c in COLUMNS}
    for i in range(count):
        width = 1.0 if i == 0 else rng.uniform(0.0, 0.95)
        score = sensitivity * (1 - width) ** 2 * rng.lognormal(0.0, 0.2)
        costs = {c: price[c] * width * (1.0 if i == 0 else rng.uniform(0.9, 1.1)) for c in COLUMNS}
        yield Option(layer, kind, f"{kind}-{i}", score, costs)


def pairs_of(
    seed: int, options: list[Option], layers: int, attentions: int, ffns: int
) -> Iterator[Option]:
    """Words 1 to n of either place trained together: the same cost, less hurt than apart."""
    rng = np.random.default_rng(seed + 1000)
    table = {option.key: option for option in options}
    for layer in range(layers):
        for i, j in itertools.product(range(1, attentions + 1), range(1, ffns + 1)):
            a = table[layer, "attention", f"attention-{i}"]
            f = table[layer, "ffn", f"ffn-{j}"]
            score = (a.score + f.score) * rng.uniform(0.6, 1.0)
            costs = {c: a.costs[c] + f.costs[c] for c in COLUMNS}
            yield Option(layer, "block", f"{a.word}+{f.word}", score, costs)


def parent_cost(options: list[Option], column: str) -> float:
    return sum(o.costs[column] for o in options if o.word.endswith("-0"))


def check(solution: Solution, limits: dict[str, float], places: int) -> None:
    """The solver's word is not taken for it: every place has a word and every budget holds."""
    assert sum(len(option.places) for option in solution.options) == places
    for column, limit in limits.items():
        assert sum(o.costs[column] for o in solution.options) <= limit * (1 + 1e-6)


if __name__ == "__main__":
    harness.main(__doc__, Command(run, arguments, {"seeds": 2}))
