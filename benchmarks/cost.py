"""Seconds promised by a cost table, against whole models: the parent and children, timed apart.

    python benchmarks/cost.py [--parents NAME ...] [--rounds 6] [--seed 1]

Each parent's space is priced by what the cost stage runs (`measure`, `calibrate`). Fresh random
architectures, another seed than the calibration's, and two like a search's then take turns with
the parent, two engines at a time: `speeds` gives the speed-up that `compare` would show, and
`least_seconds` the seconds that a table is about. How far the parent's own seconds spread is how
far the machine drifts. Parents are the checkpoints beside the repository
where they are, and one of 12 layers with random weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tessera.model.config import ModelConfig, uniform
from tessera.model.source import load_config
from tessera.model.transformer import Transformer
from tessera.puzzle.compare import CompareConfig, speeds
from tessera.puzzle.cost import (
    CostConfig,
    Key,
    Prices,
    Seconds,
    architectures,
    calibrate,
    least_seconds,
    measure,
    monotone,
    offered_words,
    predicted,
)
from tessera.puzzle.cost_table import Scenario, Words
from tessera.puzzle.space import SpaceConfig, build_space

SHARED = Path(__file__).parents[2] / "shared" / "models"
CHECKPOINTS = ("stories260k", "tinystories-char-940k")
DEEP = "12 layers, random"
SCENARIO = Scenario()
STEPS = SCENARIO.new - 1
FRESH = 6  # random architectures for each parent
COLUMNS = ("speed-up", "seconds", "prefill", "decode")


@dataclass(frozen=True)
class Timed:
    """One architecture and its parent as measured in turn."""

    name: str
    words: Words
    speedup: float
    own: Seconds
    parent: Seconds


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    print(
        f"batch {SCENARIO.batch}, {SCENARIO.prompt} + {SCENARIO.new} tokens; errors are promised / "
        "measured - 1, calibrated and, in brackets, of words alone\n"
    )
    for name, config in parents(options.parents).items():
        report(name, config, options.rounds, options.seed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parents", nargs="*", help=f"of {', '.join((*CHECKPOINTS, DEEP))}")
    parser.add_argument("--rounds", type=int, default=6, help="for each architecture")
    parser.add_argument("--seed", type=int, default=1, help="of architectures; 0 is calibration's")
    return parser.parse_args()


def parents(chosen: Sequence[str] | None) -> dict[str, ModelConfig]:
    """The checkpoints that are here, and the deep one; those of these names, where given."""
    found = {name: load_config(SHARED / name) for name in CHECKPOINTS if (SHARED / name).is_dir()}
    found[DEEP] = ModelConfig(
        vocab_size=1024,
        hidden_size=128,
        num_attention_heads=4,
        head_dim=32,
        blocks=uniform("gqa-4", "swiglu-256", 12),
    )
    return {name: config for name, config in found.items() if not chosen or name in chosen}


def report(name: str, parent: ModelConfig, rounds: int, seed: int) -> None:
    words, begun = offered_words(build_space(SpaceConfig(), parent)), time.process_time()
    settings = CostConfig(scenario=SCENARIO)  # what a cost stage measures, with its defaults
    whole_words = architectures(parent.words, words, settings.wholes)
    prices, wholes = measure(parent, words, whole_words, settings, "cost")
    spent = time.process_time() - begun
    tables = (calibrate(prices, wholes), monotone(prices))
    print(f"\n{name}: {len(words)} words and {len(wholes)} models in {spent:.0f} CPU s\n")
    print(f"| architecture | measured | {' | '.join(COLUMNS)} |\n|---|--:|--:|--:|--:|--:|")
    errors: list[list[dict[str, float]]] = [[], []]
    alone: list[float] = []
    for label, child in children(parent, words, seed).items():
        timed = in_turn(label, parent, child, rounds)
        both = [errors_of(table, parent, timed) for table in tables]
        cells = [f"{both[0][c]:+.1%} ({both[1][c]:+.1%})" for c in COLUMNS]
        print(f"| {label} | {timed.speedup:.2f}x | {' | '.join(cells)} |", flush=True)
        for kept, one in zip(errors, both, strict=True):
            kept.append(one)
        alone.append(1000 * total(timed.parent))
    for what, over in (("largest", max), ("median", statistics.median)):
        cells = []
        for column in COLUMNS:
            pair = [over(abs(one[column]) for one in kept) for kept in errors]
            cells.append(f"{pair[0]:.1%} ({pair[1]:.1%})")
        print(f"| {what}, absolute | | {' | '.join(cells)} |", flush=True)
    own = 1000 * total(wholes[0][1])
    print(
        f"\nThe parent took {own:.0f} ms beside words, and {min(alone):.0f} to {max(alone):.0f} "
        "beside each of these: seconds cannot be promised closer than that.",
        flush=True,
    )


def children(parent: ModelConfig, words: list[Key], seed: int) -> dict[str, Words]:
    """Random architectures, from near the parent to anywhere, and two such as searches find."""
    fresh = architectures(parent.words, words, FRESH, seed)[1:]
    found = {f"random {i}": child for i, child in enumerate(fresh, 1)}
    quarter = f"swiglu-{int(parent.words[0][1].removeprefix('swiglu-')) // 4}"
    narrow = quarter if ("ffn", quarter) in words else narrowest(words)
    found["every other attention removed"] = [
        ("noop" if i % 2 else attention, ffn) for i, (attention, ffn) in enumerate(parent.words)
    ]
    found[f"{narrow} everywhere"] = [(attention, narrow) for attention, _ in parent.words]
    return found


def narrowest(words: list[Key]) -> str:
    """The FFN word of the second least width."""
    widths = sorted(int(w.removeprefix("swiglu-")) for _, w in words if w.startswith("swiglu-"))
    return f"swiglu-{widths[1]}"


def in_turn(name: str, parent: ModelConfig, words: Words, rounds: int) -> Timed:
    """A child beside its parent, nobody else alive: speed-up and least seconds."""
    shapes = {"parent": parent, "child": parent.with_words(words)}
    models = {
        key: Transformer(shape).init_weights(0).eval().requires_grad_(False)
        for key, shape in shapes.items()
    }
    timing = CompareConfig(scenario=SCENARIO, rounds=rounds)
    speedup = speeds(models, timing, name)["child"]["speedup"]
    least = least_seconds(shapes, SCENARIO, rounds, name)
    own, theirs = ((float(p), float(d)) for p, d in (least["child"], least["parent"]))
    return Timed(name, words, speedup, own, theirs)


def errors_of(prices: Prices, parent: ModelConfig, timed: Timed) -> dict[str, float]:
    """promised / measured - 1 by column."""
    own, theirs = predicted(prices, timed.words), predicted(prices, parent.words)
    return {
        "speed-up": total(theirs) / total(own) / timed.speedup - 1,
        "seconds": total(own) / total(timed.own) - 1,
        "prefill": own[0] / timed.own[0] - 1,
        "decode": own[1] / timed.own[1] - 1,
    }


def total(pair: Seconds) -> float:
    return pair[0] + STEPS * pair[1]


if __name__ == "__main__":
    main()
