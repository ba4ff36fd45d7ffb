"""What each word costs: parameters and bytes counted, seconds measured (Puzzle §2.5).

A word is measured where it will run: a model of L equal layers of it goes through the engine's
own prefill and decode in the scenario, beside the same model with no layers at all, and the
difference is divided by L. Weights are random, which costs the same as trained. Rounds are
interleaved over all words and the lower quartile is kept, because noise on a shared machine
only ever adds; with one torch thread on a CPU, seconds are the thread's own (`clock` of the torch
engine). The model with no layers is the `base`: embedding, head, sampling, scheduling.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from tessera.generate.engine import SamplingParams
from tessera.generate.torch_engine import TorchEngine
from tessera.model.config import GQA, KINDS, BlockConfig, ModelConfig, NoOp, Variant, parse_kind
from tessera.model.transformer import Transformer
from tessera.model.weights import load_config
from tessera.progress import Progress
from tessera.puzzle.cost_table import DEFAULT, Scenario
from tessera.run import Run, read_json


class CostConfig(BaseModel):
    """Scenarios, and whether seconds are measured; without, only the counted columns exist."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scenario: Scenario = Scenario()
    scenarios: dict[str, Scenario] = {}  # by name; when given, they replace `scenario`
    batches: list[PositiveInt] = []  # price every scenario at each; empty: at its own
    measure: bool = True
    rounds: int = Field(default=15, ge=3)
    depth: int = Field(default=6, ge=1)  # layers of the models a word is measured in
    bytes_per_parameter: float = 4.0
    bytes_per_kv: float = 4.0

    @property
    def named(self) -> dict[str, Scenario]:
        """The scenarios to price, by name."""
        return dict(self.scenarios) or {DEFAULT: self.scenario}

    def priced(self) -> list[tuple[str, Scenario]]:
        """(name, scenario) of every table to write: each scenario at each batch."""
        return [
            (name, scenario.model_copy(update={"batch": batch}))
            for name, scenario in self.named.items()
            for batch in dict.fromkeys(self.batches or [scenario.batch])
        ]


def count(config: ModelConfig, kind: str, variant: Variant, settings: CostConfig) -> dict:
    """The counted columns of one word."""
    parameters = config.subblock_params(kind, variant)
    kv = config.kv_bytes(variant, settings.bytes_per_kv) if isinstance(variant, GQA) else 0.0
    memory = parameters * settings.bytes_per_parameter + kv * settings.scenario.cached_tokens
    return {"parameters": parameters, "kv_bytes_per_token": kv, "bytes": memory}


def generation_seconds(engine: TorchEngine, vocab_size: int, scenario: Scenario) -> tuple:
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


def measure(
    config: ModelConfig,
    words: Iterable[tuple[str, str]],
    settings: CostConfig,
    name: str,
    quiet: bool = False,
) -> dict[tuple[str, str], tuple[float, float]]:
    """Seconds of (prefill, one decode step) each word adds, and of the base under ("base", "")."""
    depth = settings.depth
    engines = {("base", ""): _probe(config, "ffn", NoOp(), 0)}
    for kind, word in words:
        variant = parse_kind(kind, word)
        if not isinstance(variant, NoOp):
            engines[kind, word] = _probe(config, kind, variant, depth)
    samples: dict[tuple[str, str], list[tuple]] = {key: [] for key in engines}
    with Progress(name, settings.rounds + 1, "probes", quiet=quiet) as bar:
        for _ in range(settings.rounds + 1):  # the first round warms up
            for key, engine in engines.items():
                samples[key].append(
                    generation_seconds(engine, config.vocab_size, settings.scenario)
                )
            bar.advance(1, len(engines))
    low = {k: np.quantile(np.array(v[1:]), 0.25, axis=0) for k, v in samples.items()}
    base = low.pop(("base", ""))
    seconds = {key: tuple(np.maximum(0.0, (v - base) / depth)) for key, v in low.items()}
    return {("base", ""): tuple(base), **seconds}


def _probe(config: ModelConfig, kind: str, variant: Variant, depth: int) -> TorchEngine:
    module = Transformer(probe_config(config, kind, variant, depth)).init_weights(0)
    return TorchEngine(module.eval().requires_grad_(False))


def monotone(seconds: dict[tuple[str, str], tuple[float, float]]) -> dict:
    """A narrower word never costs more than a wider one: noise is averaged away (isotonic).

    Without this the search may pick a wide word for being measured faster by luck.
    """
    smoothed = dict(seconds)
    for kind, prefix in (("attention", "gqa-"), ("ffn", "swiglu-")):
        keys = [key for key in seconds if key[0] == kind and key[1].startswith(prefix)]
        keys.sort(key=lambda key: int(key[1].removeprefix(prefix)))
        columns = [_isotonic([seconds[key][i] for key in keys]) for i in range(2)]
        smoothed |= {key: pair for key, *pair in zip(keys, *columns, strict=True)}
    return smoothed


def _isotonic(values: list[float]) -> list[float]:
    """The closest non-decreasing sequence (pool adjacent violators)."""
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return [float(np.mean(pool)) for pool in pools for _ in pool]


def cost_rows(
    config: ModelConfig,
    words: list[tuple[str, str]],
    settings: CostConfig,
    name: str,
    quiet: bool = False,
) -> list[dict]:
    """One row a word and one `base` row: counted columns, and seconds when measured."""
    measured = measure(config, words, settings, name, quiet) if settings.measure else {}
    seconds = monotone(measured)
    outside = config.num_params() - sum(
        config.subblock_params(kind, getattr(block, kind))
        for block in config.blocks
        for kind in KINDS
    )
    base = {"parameters": outside, "kv_bytes_per_token": 0.0}
    base["bytes"] = outside * settings.bytes_per_parameter
    rows = [{"kind": "base", "word": "", **base}]
    rows += [
        {"kind": kind, "word": word, **count(config, kind, parse_kind(kind, word), settings)}
        for kind, word in words
    ]
    for row in rows if settings.measure else ():
        pair = seconds.get((row["kind"], row["word"]), (0.0, 0.0))
        row["prefill_seconds"], row["decode_seconds"] = map(float, pair)
    return rows


def stage(config: CostConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `cost`: price every word the library offers."""
    parent = load_config(inputs["parent"])
    layers = read_json(inputs["library"], "space")
    words = list(
        dict.fromkeys(
            (kind, word)
            for layer in layers
            for kind, offered in zip(KINDS, layer, strict=True)
            for word in offered
        )
    )
    torch.manual_seed(run.seed)
    rows = []
    for name, scenario in config.priced():
        key = {"scenario": name, "batch": scenario.batch}
        settings = config.model_copy(update={"scenario": scenario})
        found = cost_rows(parent, words, settings, run.name, run.quiet)
        rows += [key | row for row in found]
    run.write_table("costs", rows)
    told = {
        "scenarios": {name: one.model_dump() for name, one in config.named.items()},
        "batches": list(dict.fromkeys(config.batches)),
        "source": "measured" if config.measure else "counted",
        "device": None,
        "bytes_per_parameter": config.bytes_per_parameter,
        "bytes_per_kv": config.bytes_per_kv,
    }
    run.write_json("scenarios", told)
