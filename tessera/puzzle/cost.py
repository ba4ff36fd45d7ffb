"""Seconds of words and of whole models, on the engine they will run on (Puzzle §2.5).

A word is measured in a model of `depth` equal layers of it, beside the same model with no layers
at all; the difference is divided by `depth`. As many layers as the parent has fill caches as it
does: of a parent of 12 layers, probes of 6 promise two thirds of the time, probes of 12 promise
seven eighths. Whole architectures take turns with them, for `calibrate.py`. Weights are random,
which costs the same as trained. A neighbour on the machine only ever adds, and for a while, so
each decode step keeps its least time over all rounds: on two busy cores that repeats to 0.8-4.7 %,
the least mean of a round to 2.7-5.3 %. On a CPU with one torch thread, seconds are the thread's
own (`clock` of the torch engine).

Prices of words corrected by whole models, so that sums promise what models take. Torch-free.

A word repeated in a model of its own is not what it is between others: its weights and its cache
push out what the next one needs, and six alike keep theirs nearer. So the parent and a few
architectures of the space are timed beside the words. First all prices are scaled by s, the median
of measured / promised; then each price p gets a factor f by ridge regression on relative errors,

    min over f of  sum over models (sum of f·p / measured - 1)^2 / NOISE^2
                 + sum over words (f - s)^2 / TRUST^2

which leaves a price at the scale where no model speaks about it. What that is worth is told by
models left out of the fit in turn.

What each word costs: parameters and bytes counted, seconds measured or computed.

    source = "measured"   in this engine, corrected by whole models: `measure.py`, `calibrate.py`
             "counted"    no seconds at all
             "roofline"   from a named device's data sheet: `roofline.py`; "cpu" is this machine

A table is of one scenario at one batch. Each is kept in the run's state as soon as it is done, and
a run that goes on prices what is missing.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from tessera.devices import CPU, DTYPES, Device, DeviceError, find_device
from tessera.generate.engine import SamplingParams
from tessera.generate.torch_engine import TorchEngine
from tessera.model.config import GQA, KINDS, BlockConfig, ModelConfig, NoOp, Variant, parse_kind
from tessera.model.source import load_config
from tessera.model.transformer import Transformer
from tessera.progress import Progress
from tessera.puzzle.cost_table import DEFAULT, Scenario, Words
from tessera.puzzle.roofline import Serving, probe_cpu, seconds_of
from tessera.runs.run import Run, read_json

__all__ = ["CostConfig", "cost_rows", "count", "generation_seconds", "monotone", "price", "stage"]

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
        self.prompts = prompts_of(scenario, engine.config.vocab_size)
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


Key = tuple[str, str]
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


class CostConfig(BaseModel):
    """Scenarios, and where seconds come from; `measure = false` is `source = "counted"`.

    `device`, `dtype` and `tensor_parallel` are the roofline's; bytes follow from `dtype` unless
    given. Measured models are float32.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scenario: Scenario = Scenario()
    scenarios: dict[str, Scenario] = {}  # by name; when given, they replace `scenario`
    batches: list[PositiveInt] = []  # price every scenario at each; empty: at its own
    source: Literal["measured", "counted", "roofline"] = "measured"
    measure: bool = True
    rounds: int = Field(default=8, ge=3)
    depth: PositiveInt | None = None  # layers a word is measured in; None: the parent's
    wholes: int = Field(default=8, ge=0)  # architectures beside the parent to calibrate by; 0: none
    device: str | None = None
    dtype: Literal["fp32", "bf16", "fp8"] = "fp32"
    tensor_parallel: PositiveInt = 1
    bytes_per_parameter: float = Field(default=4.0, gt=0)
    bytes_per_kv: float = Field(default=4.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, given: Any) -> Any:
        """What other keys decide: the source by `measure`, bytes by `dtype`, `dtype` by device."""
        if not isinstance(given, dict):
            return given
        told = dict(given)
        if "measure" in told:
            told.setdefault("source", "measured" if told["measure"] else "counted")
        told.setdefault("source", "measured")
        told.setdefault("measure", told["source"] == "measured")
        accelerator = told["source"] == "roofline" and str(told.get("device")).lower() != CPU
        told.setdefault("dtype", "bf16" if accelerator else "fp32")
        size = DTYPES.get(str(told["dtype"]), 4.0)
        return {"bytes_per_parameter": size, "bytes_per_kv": size} | told

    @model_validator(mode="after")
    def _agrees(self) -> CostConfig:
        if self.measure != (self.source == "measured"):
            raise ValueError(
                f"measure = {str(self.measure).lower()} contradicts source = {self.source!r}; "
                "drop measure, which is the older spelling"
            )
        if self.source == "roofline":
            if self.device is None:
                raise ValueError('source = "roofline" needs a device, for example device = "H100"')
            if self.device.lower() != CPU:
                find_device(self.device).flops(self.dtype)
            elif (self.dtype, self.tensor_parallel) != ("fp32", 1):
                raise DeviceError(f"device = {CPU!r} has dtype 'fp32' and tensor_parallel 1 only")
        elif self.device is not None or self.tensor_parallel > 1:
            raise ValueError(
                f"device and tensor_parallel belong to the roofline, and source is {self.source!r}"
                '; set source = "roofline" or drop them'
            )
        elif self.source == "measured" and self.dtype != "fp32":
            raise ValueError(
                f"dtype = {self.dtype!r}, but measured models are fp32; drop it, or set source = "
                '"roofline" or "counted"'
            )
        return self

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


@dataclass(frozen=True)
class Priced:
    """One table: rows of words and base; rows of whole models that it was calibrated by."""

    rows: list[dict]
    calibration: list[dict]


def cost_rows(
    config: ModelConfig,
    words: list[Key],
    settings: CostConfig,
    name: str,
    quiet: bool = False,
) -> list[dict]:
    """One row a word and one `base` row: counted columns, and seconds unless only counted."""
    return price(config, words, settings, name, quiet).rows


def price(
    config: ModelConfig,
    words: list[Key],
    settings: CostConfig,
    name: str,
    quiet: bool = False,
    device: Device | None = None,
) -> Priced:
    """The table of `settings.scenario`. device: the CPU, where it was probed already."""
    rows = counted_rows(config, words, settings)
    if settings.source == "counted":
        return Priced(rows, [])
    calibration: list[dict] = []
    if settings.source == "measured":
        seconds, calibration = _measured(config, words, settings, name, quiet)
    else:
        serving = serving_of(settings, device)
        seconds = seconds_of(config, words, settings.scenario, serving)
    for row in rows:
        pair = seconds.get((row["kind"], row["word"]), (0.0, 0.0))
        row["prefill_seconds"], row["decode_seconds"] = pair
    return Priced(rows, calibration)


def counted_rows(config: ModelConfig, words: list[Key], settings: CostConfig) -> list[dict]:
    """The counted columns of the base and of every word."""
    outside = config.num_params() - sum(
        config.subblock_params(kind, getattr(block, kind))
        for block in config.blocks
        for kind in KINDS
    )
    base = {"parameters": outside, "kv_bytes_per_token": 0.0}
    base["bytes"] = outside * settings.bytes_per_parameter
    return [{"kind": "base", "word": "", **base}] + [
        {"kind": kind, "word": word, **count(config, kind, parse_kind(kind, word), settings)}
        for kind, word in words
    ]


def _measured(
    config: ModelConfig, words: list[Key], settings: CostConfig, name: str, quiet: bool
) -> tuple[dict[Key, Seconds], list[dict]]:
    """Calibrated seconds, and what models left out of the calibration say of it."""
    scenario = settings.scenario
    wholes = architectures(config.words, words, settings.wholes) if settings.wholes else []
    found = measure(
        config,
        words,
        wholes,
        scenario,
        rounds=settings.rounds,
        depth=settings.depth or len(config.blocks),
        label=name,
        quiet=quiet,
    )
    told = held_out(found.words, found.wholes, scenario)
    return calibrate(found.words, found.wholes), told


def serving_of(settings: CostConfig, device: Device | None = None) -> Serving:
    """What the roofline is asked about; the CPU is probed where it is not given."""
    assert settings.device is not None
    if device is None:
        device = probe_cpu() if settings.device.lower() == CPU else find_device(settings.device)
    return Serving(
        device,
        settings.dtype,
        settings.tensor_parallel,
        settings.bytes_per_parameter,
        settings.bytes_per_kv,
    )


def stage(config: CostConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `cost`: price every word the library offers; `calibration.jsonl` where measured."""
    parent = load_config(inputs["parent"])
    words = _offered(read_json(inputs["library"], "space"))
    torch.manual_seed(run.seed)
    rows, calibration = [], []
    device = serving_of(config).device if config.source == "roofline" else None
    for index, (name, scenario) in enumerate(config.priced()):
        key = {"scenario": name, "batch": scenario.batch}
        settings = config.model_copy(update={"scenario": scenario})
        found = _kept(run, index)
        if found is None:
            found = price(parent, words, settings, run.name, run.quiet, device)
            kept = {"rows": found.rows, "calibration": found.calibration}
            run.write_file(f"state/costs-{index}.json", json.dumps(kept))
        rows += [key | row for row in found.rows]
        calibration += [key | row for row in found.calibration]
    run.write_table("costs", rows)
    if calibration:
        run.write_table("calibration", calibration)
        run.say(_told(calibration))
    run.write_json("scenarios", _scenarios(config))


def _offered(layers: list) -> list[Key]:
    """Every (kind, word) that any layer offers, once."""
    found = (
        (kind, word)
        for layer in layers
        for kind, offered in zip(KINDS, layer, strict=True)
        for word in offered
    )
    return list(dict.fromkeys(found))


def _kept(run: Run, index: int) -> Priced | None:
    """The table that an earlier start of this run finished."""
    file = run.state_path / f"costs-{index}.json"
    return Priced(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def _told(calibration: list[dict]) -> str:
    errors = [abs(row["error_seconds"]) for row in calibration]
    return (
        f"seconds promised of {len(errors)} whole models that prices were not fitted to are off by "
        f"{np.median(errors):.1%} at the median, {max(errors):.1%} at most"
    )


def _scenarios(config: CostConfig) -> dict[str, Any]:
    devices = {"measured": CPU, "counted": None, "roofline": config.device}
    if config.source == "roofline" and config.device and config.device.lower() != CPU:
        devices["roofline"] = find_device(config.device).name
    return {
        "scenarios": {name: one.model_dump() for name, one in config.named.items()},
        "batches": list(dict.fromkeys(config.batches)),
        "source": config.source,
        "device": devices[config.source],
        "dtype": config.dtype,
        "tensor_parallel": config.tensor_parallel,
        "bytes_per_parameter": config.bytes_per_parameter,
        "bytes_per_kv": config.bytes_per_kv,
    }
