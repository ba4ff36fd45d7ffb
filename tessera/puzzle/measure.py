"""Seconds of words and of whole models, on the engine they will run on (Puzzle §2.5).

A word is measured in a model of `depth` equal layers of it, beside the same model with no layers
at all; the difference is divided by `depth`. As many layers as the parent has fill caches as it
does: of a parent of 12 layers, probes of 6 promise two thirds of the time, probes of 12 promise
seven eighths. Whole architectures take turns with them, for `calibrate.py`. Weights are random,
which costs the same as trained. A neighbour on the machine only ever adds, and for a while, so
each decode step keeps its least time over all rounds: on two busy cores that repeats to 0.8-4.7 %,
the least mean of a round to 2.7-5.3 %. On a CPU with one torch thread, seconds are the thread's
own (`clock` of the torch engine).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tessera.generate.engine import SamplingParams
from tessera.generate.torch_engine import TorchEngine
from tessera.model.config import BlockConfig, ModelConfig, NoOp, Variant, parse_kind
from tessera.model.transformer import Transformer
from tessera.progress import Progress
from tessera.puzzle.cost_table import Scenario, Words

Seconds = tuple[float, float]  # of prefill, of one decode step
BASE = ("base", "")
PREFILLS = 3  # a round has as many, for one run of decode steps, of which there are many


def generation_seconds(engine: TorchEngine, vocab_size: int, scenario: Scenario) -> Seconds:
    """Seconds of (prefill, one decode step) for the scenario's requests, all of equal length."""
    prompts = prompts_of(scenario, vocab_size)
    engine.reset_stats()
    engine.generate(prompts, SamplingParams(max_tokens=scenario.new, temperature=0.0))
    stats = engine.stats
    return stats.prefill_seconds, stats.decode_seconds / max(1, stats.decode_steps)


def prompts_of(scenario: Scenario, vocab_size: int) -> list[list[int]]:
    """Random prompts of a fixed seed; their content does not matter for time."""
    rng = np.random.default_rng(0)
    return rng.integers(0, vocab_size, (scenario.batch, scenario.prompt)).tolist()


def probe_config(config: ModelConfig, kind: str, variant: Variant, depth: int) -> ModelConfig:
    """`depth` layers of one word and nothing else; depth 0 is the base."""
    block = replace(BlockConfig(NoOp(), NoOp()), **{kind: variant})
    return replace(config, blocks=(block,) * depth)


@dataclass(frozen=True)
class Measured:
    """Seconds of the base and of each word, and of whole architectures timed beside them."""

    words: dict[tuple[str, str], Seconds]
    wholes: list[tuple[Words, Seconds]]


def measure(
    config: ModelConfig,
    words: Iterable[tuple[str, str]],
    wholes: Sequence[Words],
    scenario: Scenario,
    *,
    rounds: int,
    depth: int,
    label: str,
    quiet: bool = False,
) -> Measured:
    """What each (kind, word) adds, what the base takes, and what whole architectures take."""
    shapes: dict[Hashable, ModelConfig] = {BASE: probe_config(config, "ffn", NoOp(), 0)}
    for kind, word in words:
        variant = parse_kind(kind, word)
        if not isinstance(variant, NoOp):
            shapes[kind, word] = probe_config(config, kind, variant, depth)
    probes = list(shapes)
    shapes |= {i: config.with_words(whole) for i, whole in enumerate(wholes)}
    least = least_seconds(shapes, scenario, rounds, label, quiet)
    base = least[BASE]
    found = {key: np.maximum(0.0, (least[key] - base) / depth) for key in probes}
    found[BASE] = base
    return Measured(
        {key: _pair(value) for key, value in found.items()},  # type: ignore[misc]
        [(whole, _pair(least[i])) for i, whole in enumerate(wholes)],
    )


def least_seconds(
    shapes: Mapping[Hashable, ModelConfig],
    scenario: Scenario,
    rounds: int,
    label: str,
    quiet: bool = False,
) -> dict[Hashable, np.ndarray]:
    """The least (prefill, decode step) of each model, `(2,)`; they take turns, round by round."""
    least = {key: _Least(random_engine(shape), scenario) for key, shape in shapes.items()}
    with Progress(label, rounds + 1, "probes", quiet=quiet) as bar:
        for index in range(rounds + 1):
            for one in least.values():
                one.generate(counts=index > 0)  # the first round warms up
            bar.advance(1, len(least))
    for one in least.values():
        one.engine.close()
    return {key: one.seconds() for key, one in least.items()}


class _Least:
    """An engine, and the least time over its generations of the prefill and of each step."""

    def __init__(self, engine: TorchEngine, scenario: Scenario) -> None:
        self.engine, self.scenario = engine, scenario
        self.prompts = prompts_of(scenario, engine.packed.config.vocab_size)
        self.prefill = math.inf
        self.steps: np.ndarray | float = math.inf

    def generate(self, counts: bool) -> None:
        for new in (*(1,) * (PREFILLS - 1), self.scenario.new):
            self.engine.reset_stats()
            self.engine.stats.each_step = steps = []
            self.engine.generate(self.prompts, SamplingParams(max_tokens=new, temperature=0.0))
            if counts:
                self.prefill = min(self.prefill, self.engine.stats.prefill_seconds)
        if counts:
            self.steps = np.minimum(self.steps, steps)

    def seconds(self) -> np.ndarray:
        return np.array([self.prefill, np.mean(self.steps) if np.size(self.steps) else 0.0])


def random_engine(config: ModelConfig) -> TorchEngine:
    """An engine over random weights of this shape."""
    module = Transformer(config).init_weights(0)
    return TorchEngine(module.eval().requires_grad_(False))


def _pair(values: np.ndarray) -> Seconds:
    return float(values[0]), float(values[1])
