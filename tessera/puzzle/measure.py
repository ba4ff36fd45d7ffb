"""Seconds of words and of whole models, on the engine they will run on (Puzzle §2.5).

A word is measured in a model of `depth` equal layers of it, beside the same model with no layers
at all; the difference is divided by `depth`. Whole architectures take turns with them, which is
what `calibrate.py` needs. Weights are random, which costs the same as trained. The least of all
rounds is kept: a neighbour on the machine only ever adds (the least repeats to 4 %, the lower
quartile to 5-9 %, where four others keep two cores busy). With one torch thread on a CPU, seconds
are the thread's own (`clock` of the torch engine).
"""

from __future__ import annotations

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
PREFILLS = 4  # for one run of decode steps; a scenario has one, which alone would be noisy


def generation_seconds(
    engine: TorchEngine, vocab_size: int, scenario: Scenario, prefills: int = 1
) -> Seconds:
    """Seconds of (prefill, one decode step) for the scenario's requests, all of equal length.

    prefills: how often to read the prompts; the least time of them is the answer.
    """
    prompts = prompts_of(scenario, vocab_size)
    times = []
    for new in (*(1,) * (prefills - 1), scenario.new):
        engine.reset_stats()
        engine.generate(prompts, SamplingParams(max_tokens=new, temperature=0.0))
        times.append(engine.stats.prefill_seconds)
    stats = engine.stats
    return min(times), stats.decode_seconds / max(1, stats.decode_steps)


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
    """The least (prefill, decode step) of each model; they take turns, round by round."""
    engines = {key: random_engine(shape) for key, shape in shapes.items()}
    samples: dict[Hashable, list[Seconds]] = {key: [] for key in engines}
    with Progress(label, rounds + 1, "probes", quiet=quiet) as bar:
        for _ in range(rounds + 1):  # the first round warms up
            for key, engine in engines.items():
                vocab = shapes[key].vocab_size
                samples[key].append(generation_seconds(engine, vocab, scenario, PREFILLS))
            bar.advance(1, len(engines))
    for engine in engines.values():
        engine.close()
    return {key: np.array(values[1:]).min(axis=0) for key, values in samples.items()}


def random_engine(config: ModelConfig) -> TorchEngine:
    """An engine over random weights of this shape."""
    module = Transformer(config).init_weights(0)
    return TorchEngine(module.eval().requires_grad_(False))


def _pair(values: np.ndarray) -> Seconds:
    return float(values[0]), float(values[1])
