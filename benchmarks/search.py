"""Search: seconds to a proved optimum on spaces as large as the papers'.

    python benchmarks/search.py [--seeds 5] [--share 0.6] [--time-limit 300]

80 layers x 54 options and 126 layers x 200 options a layer, each in two forms: two places a
layer whose words multiply to that number (attention x FFN, what tessera searches), and one
place with that many words (what a search over whole blocks has). A wider word costs more and
hurts less, with noise on both, which makes trade-offs close and proofs hard. Latency and memory
are each held to a share of the parent's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator

import highspy
import numpy as np

from tessera.puzzle.program import Option, Solution, solve

COLUMNS = ("seconds", "bytes")
# layers, words of each place of a layer
SPACES = {
    "80 layers x 54 (6 attention x 9 FFN)": (80, {"attention": 6, "ffn": 9}),
    "80 layers x 54 whole blocks": (80, {"ffn": 54}),
    "126 layers x 200 (10 attention x 20 FFN)": (126, {"attention": 10, "ffn": 20}),
    "126 layers x 200 whole blocks": (126, {"ffn": 200}),
}


def main() -> None:
    options = parse()
    rows = []
    for name, (layers, places) in SPACES.items():
        found = []
        for seed in range(options.seeds):
            words = instance(seed, layers, places)
            limits = {c: options.share * parent_cost(words, c) for c in COLUMNS}
            solution = solve(words, limits, time_limit=options.time_limit)
            check(solution, limits, layers * len(places))
            found.append(solution)
        rows.append(line(name, found, len(words)))
    print(
        f"HiGHS {highspy.Highs().version()}, {options.seeds} random instances each, seconds and "
        f"bytes at most {options.share:g} of the parent's\n"
    )
    print("| space | variables | seconds, median | max | largest gap |\n|---|--:|--:|--:|--:|")
    print("\n".join(rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="instances of each size")
    parser.add_argument("--share", type=float, default=0.6, help="budget, as a share of parent's")
    parser.add_argument("--time-limit", type=float, default=300.0)
    return parser.parse_args()


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


def parent_cost(options: list[Option], column: str) -> float:
    return sum(o.costs[column] for o in options if o.word.endswith("-0"))


def check(solution: Solution, limits: dict[str, float], places: int) -> None:
    """The solver's word is not taken for it: every place has a word and every budget holds."""
    assert len(solution.options) == places
    for column, limit in limits.items():
        assert sum(o.costs[column] for o in solution.options) <= limit * (1 + 1e-6)


def line(name: str, found: list[Solution], variables: int) -> str:
    seconds = [solution.seconds for solution in found]
    return (
        f"| {name} | {variables:,} | {statistics.median(seconds):.2f} | {max(seconds):.2f} "
        f"| {max(solution.gap for solution in found):.1e} |"
    )


if __name__ == "__main__":
    main()
