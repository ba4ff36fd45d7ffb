"""What each word costs: parameters and bytes counted, seconds measured or computed (Puzzle §2.5).

    source = "measured"   in this engine, corrected by whole models
             "counted"    no seconds at all
             "roofline"   from a named device's data sheet; "cpu" is this machine

A table is of one scenario at one batch. Each is kept in the run's state as soon as it is done.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt, model_validator

from tessera import dist
from tessera.devices import CPU, DTYPES, Device, DeviceError, find_device
from tessera.generate.engine import SamplingParams
from tessera.generate.torch_engine import TorchEngine
from tessera.model.config import GQA, KINDS, BlockConfig, ModelConfig, NoOp, Variant, parse_kind
from tessera.model.placement import inference_dtype
from tessera.model.source import load_config
from tessera.model.transformer import Transformer
from tessera.progress import Progress
from tessera.puzzle.cost_table import PricedConfig, Scenario, Words
from tessera.puzzle.roofline import Serving, probe_cpu, roofline_seconds
from tessera.puzzle.space import Space, read_space
from tessera.runs.files import resumable
from tessera.runs.run import Run

Key = tuple[str, str]  # (kind, word)
Seconds = tuple[float, float]  # of prefill, of one decode step
Prices = Mapping[Key, Seconds]
Timed = Sequence[tuple[Words, Seconds]]

BASE = ("base", "")
PREFILLS = 3  # a round has as many, for one run of decode steps, of which there are many
NOISE = 0.05  # how far, relatively, a model is from the sum of right prices
TRUST = 0.10  # how far, relatively, a scaled price is from the right one
FASTEST = 0.2  # no factor is below


class CostConfig(PricedConfig):
    """Scenarios, and where seconds come from. `device` and `tensor_parallel` are the roofline's;
    bytes follow from `dtype` unless given. Measured models are fp32 or bf16, "auto" being bf16 on
    an accelerator and fp32 on a CPU."""

    source: Literal["measured", "counted", "roofline"] = "measured"
    rounds: int = Field(default=8, ge=3)
    depth: PositiveInt | None = None  # layers a word is measured in; None: the parent's
    wholes: int = Field(default=8, ge=0)  # architectures beside the parent to calibrate by; 0: none
    device: str | None = None
    dtype: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    tensor_parallel: PositiveInt = 1
    bytes_per_parameter: float = Field(default=0.0, ge=0)  # 0: as many as dtype has
    bytes_per_kv: float = Field(default=0.0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        names = {"float32": "fp32", "bfloat16": "bf16"}  # as every other table calls them
        given = {k: names.get(str(v), v) if k == "dtype" else v for k, v in given.items()}
        own = {"roofline": "fp32" if str(given.get("device")).lower() == CPU else "bf16"}
        own["counted"] = "fp32"
        table = {"dtype": own.get(str(given.get("source")), "auto"), **given}
        size = DTYPES.get(str(table["dtype"]), 0.0)
        return {"bytes_per_parameter": size, "bytes_per_kv": size, **table}

    @model_validator(mode="after")
    def _agrees(self) -> CostConfig:
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
            )
        elif self.source == "measured" and self.dtype == "fp8":
            raise ValueError(
                f"dtype = {self.dtype!r}, but measured models are fp32 or bf16; set another source"
            )
        elif self.source == "counted" and self.dtype == "auto":
            raise ValueError('dtype = "auto" is of what is measured; say fp32, bf16 or fp8')
        return self

    def here(self) -> CostConfig:
        """The same with "auto", and the bytes that follow from it, as this device has them."""
        if self.dtype != "auto":
            return self
        dtype = "bf16" if inference_dtype() == torch.bfloat16 else "fp32"
        sizes = ("bytes_per_parameter", "bytes_per_kv")
        found = {key: getattr(self, key) or DTYPES[dtype] for key in sizes}
        return self.model_copy(update={"dtype": dtype, **found})


def count(
    config: ModelConfig, kind: str, variant: Variant, scenario: Scenario, sizes: tuple[float, float]
) -> dict:
    parameters = config.subblock_params(kind, variant)
    kv = config.kv_bytes(variant, sizes[1]) if isinstance(variant, GQA) else 0.0
    memory = parameters * sizes[0] + kv * scenario.cached_tokens
    return {"parameters": parameters, "kv_bytes_per_token": kv, "bytes": memory}


def base_row(config: ModelConfig, bytes_per_parameter: float) -> dict:
    outside = replace(config, blocks=()).num_params()
    columns = {"parameters": outside, "kv_bytes_per_token": 0.0}
    return {"kind": "base", "word": "", **columns, "bytes": outside * bytes_per_parameter}


def offered_words(space: Space) -> list[Key]:
    layers = range(len(space.layers))
    return list(dict.fromkeys((k, w) for i in layers for k in KINDS for w in space.words(i, k)))


def prompts_of(scenario: Scenario, vocab_size: int) -> list[list[int]]:
    """Random prompts of a fixed seed; their content does not matter for time."""
    shape = scenario.batch, scenario.prompt
    return np.random.default_rng(0).integers(0, vocab_size, shape).tolist()


def generation_seconds(engine: TorchEngine, vocab_size: int, scenario: Scenario) -> Seconds:
    """Seconds of (prefill, one decode step) for the scenario's requests, all of equal length."""
    engine.reset_stats()
    sampling = SamplingParams(max_tokens=scenario.new, temperature=0.0)
    engine.generate(prompts_of(scenario, vocab_size), sampling)
    stats = engine.stats
    return stats.prefill_seconds, stats.decode_seconds / max(1, stats.decode_steps)


def measure(
    config: ModelConfig,
    words: Iterable[Key],
    wholes: Sequence[Words],
    settings: CostConfig,
    label: str,
    quiet: bool = False,
) -> tuple[dict[Key, Seconds], list[tuple[Words, Seconds]]]:
    """What the base takes and each (kind, word) adds, a model of `depth` equal layers less one with
    none, over `depth`; and what whole architectures take."""
    depth = settings.depth or len(config.blocks)
    empty = BlockConfig(NoOp(), NoOp())
    probes: dict[Key, ModelConfig] = {BASE: replace(config, blocks=())}
    for kind, word in words:
        if word != "noop":
            block = replace(empty, **{kind: parse_kind(kind, word)})
            probes[kind, word] = replace(config, blocks=(block,) * depth)
    models: dict[Hashable, ModelConfig] = {**probes}
    models |= {i: config.with_words(whole) for i, whole in enumerate(wholes)}
    dtype = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
    least = least_seconds(models, settings.scenario, settings.rounds, label, quiet, dtype)
    prices = {key: _pair(np.maximum(0.0, (least[key] - least[BASE]) / depth)) for key in probes}
    prices[BASE] = _pair(least[BASE])
    return prices, [(whole, _pair(least[i])) for i, whole in enumerate(wholes)]


def least_seconds(
    models: Mapping[Hashable, ModelConfig],
    scenario: Scenario,
    rounds: int,
    label: str,
    quiet: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[Hashable, np.ndarray]:
    """The least (prefill, decode step) of each model, `(2,)`, which take turns round by round; each
    decode step keeps its least time over all rounds, as other load only ever adds."""
    device = dist.device()
    engines = {
        key: TorchEngine(
            Transformer(config).init_weights(0).to(device, dtype).requires_grad_(False).eval()
        )
        for key, config in models.items()
    }
    prefill = dict.fromkeys(engines, math.inf)
    steps: dict[Hashable, Any] = dict.fromkeys(engines, math.inf)
    with Progress(label, rounds + 1, "probes", quiet=quiet) as bar:
        for index in range(rounds + 1):
            for key, engine in engines.items():
                first, each = _timed(engine, scenario)
                if index:  # the first round warms up
                    prefill[key] = min(prefill[key], first)
                    steps[key] = np.minimum(steps[key], each)
            bar.advance(1, len(engines))
    for engine in engines.values():
        engine.close()
    return {key: np.array([prefill[key], np.mean(steps[key])]) for key in engines}


def _timed(engine: TorchEngine, scenario: Scenario) -> tuple[float, list[float]]:
    prompts = prompts_of(scenario, engine.config.vocab_size)
    prefill, steps = math.inf, []
    for new in (*(1,) * (PREFILLS - 1), scenario.new):
        engine.reset_stats()
        engine.stats.each_step = steps = []
        engine.generate(prompts, SamplingParams(max_tokens=new, temperature=0.0))
        prefill = min(prefill, engine.stats.prefill_seconds)
    return prefill, steps


def _pair(values: np.ndarray) -> Seconds:
    return float(values[0]), float(values[1])


def architectures(parent: Words, words: Sequence[Key], count: int, seed: int = 0) -> list[Words]:
    """The parent, then `count` random architectures, which keep each of the parent's words with a
    chance that falls from 3/4 to none."""
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
    """The prices, prefill and decode each corrected by the models timed, and made `monotone`.

    All are scaled by s, the median of measured / promised; then each price p gets a factor f:

        min over f of  sum over models (sum of f·p / measured - 1)^2 / NOISE^2
                     + sum over words (f - s)^2 / TRUST^2
    """
    if not timed:
        return monotone(prices)
    keys, columns = list(prices), []
    counts = np.array([_counts(words, keys) for words, _ in timed])
    for column in range(2):
        alone = np.array([prices[key][column] for key in keys])
        rows, seconds = counts * alone, np.array([pair[column] for _, pair in timed])
        scale = float(np.median(seconds / rows.sum(1)))
        a = np.concatenate([rows / seconds[:, None] / NOISE, np.eye(len(keys)) / TRUST])
        b = np.concatenate([np.full(len(rows), 1 / NOISE), np.full(len(keys), scale / TRUST)])
        columns.append(alone * np.maximum(FASTEST, np.linalg.lstsq(a, b, rcond=None)[0]))
    return monotone({key: (float(p), float(d)) for key, p, d in zip(keys, *columns, strict=True)})


def monotone(seconds: Prices) -> dict[Key, Seconds]:
    """Prices that never fall with a word's width (isotonic): a wide word measured fast by luck is
    not chosen for that."""
    smoothed = dict(seconds)
    for kind, prefix in (("attention", "gqa-"), ("ffn", "swiglu-")):
        keys = [key for key in seconds if key[0] == kind and key[1].startswith(prefix)]
        keys.sort(key=lambda key: int(key[1].removeprefix(prefix)))
        columns = [_isotonic([seconds[key][i] for key in keys]) for i in range(2)]
        smoothed |= dict(zip(keys, zip(*columns, strict=True), strict=True))
    return smoothed


def _isotonic(values: list[float]) -> list[float]:
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return [float(np.mean(pool)) for pool in pools for _ in pool]


def _counts(words: Words, keys: Sequence[Key]) -> list[int]:
    found = Counter((kind, w) for pair in words for kind, w in zip(KINDS, pair, strict=True))
    return [1 if kind == "base" else found[kind, word] for kind, word in keys]


def predicted(prices: Prices, words: Words) -> Seconds:
    """Seconds of (prefill, one decode step) of an architecture, the sum of its prices."""
    return _pair(np.array(_counts(words, list(prices))) @ np.array(list(prices.values())))


def held_out(prices: Prices, timed: Timed, scenario: Scenario) -> list[dict]:
    """A row a model: measured, and promised by prices that were fitted without it."""
    rows = []
    for i, (words, seconds) in enumerate(timed):
        found = calibrate(prices, [*timed[:i], *timed[i + 1 :]])
        rows.append(compared(words, predicted(found, words), seconds, scenario))
    return rows


def compared(words: Words, promised: Seconds, measured: Seconds, scenario: Scenario) -> dict:
    """Promise beside measurement: prefill, one decode step and the scenario; errors relative."""
    row: dict = {"words": [list(pair) for pair in words]}
    whole = [prefill + (scenario.new - 1) * step for prefill, step in (promised, measured)]
    sides = [*zip(promised, measured, strict=True), whole]
    names = ("prefill_seconds", "decode_seconds", "seconds")
    for name, (own, real) in zip(names, sides, strict=True):
        row |= {f"promised_{name}": own, f"measured_{name}": real, f"error_{name}": own / real - 1}
    return row


def price(
    config: ModelConfig,
    words: list[Key],
    settings: CostConfig,
    name: str,
    quiet: bool = False,
    device: Device | None = None,
) -> tuple[list[dict], list[dict]]:
    """(the rows of `settings.scenario`, the base first; rows of models they were calibrated by)."""
    scenario = settings.scenario
    sizes = settings.bytes_per_parameter, settings.bytes_per_kv
    rows = [base_row(config, sizes[0])] + [
        {"kind": kind, "word": word, **count(config, kind, parse_kind(kind, word), scenario, sizes)}
        for kind, word in words
    ]
    calibration: list[dict] = []
    if settings.source == "counted":
        return rows, calibration
    if settings.source == "measured":
        wholes = architectures(config.words, words, settings.wholes) if settings.wholes else []
        prices, timed = measure(config, words, wholes, settings, name, quiet)
        calibration = held_out(prices, timed, scenario)
        seconds = calibrate(prices, timed)
    else:
        device = device or _device(settings)
        serving = Serving(device, settings.dtype, settings.tensor_parallel, *sizes)
        seconds = roofline_seconds(config, words, scenario, serving)
    for row in rows:
        pair = seconds.get((row["kind"], row["word"]), (0.0, 0.0))
        row["prefill_seconds"], row["decode_seconds"] = pair
    return rows, calibration


def _device(settings: CostConfig) -> Device:
    assert settings.device is not None
    return probe_cpu() if settings.device.lower() == CPU else find_device(settings.device)


def stage(config: CostConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `cost`: price every word the library offers; `calibration.jsonl` where measured."""
    parent, config = load_config(inputs["parent"]), config.here()
    words = offered_words(read_space(inputs["library"]))
    torch.manual_seed(run.seed)
    rows, calibration = [], []
    device = _device(config) if config.source == "roofline" else None
    for index, (name, scenario) in enumerate(config.priced()):
        settings = config.model_copy(update={"scenario": scenario})
        table = resumable(
            run.state_path / f"costs-{index}.json",
            lambda own=settings: price(parent, words, own, run.name, run.quiet, device),
        )
        for found, new in zip((rows, calibration), table, strict=True):
            found += [{"scenario": name, "batch": scenario.batch, **row} for row in new]
    run.write_table("costs", rows)
    if calibration:
        errors = [abs(row["error_seconds"]) for row in calibration]
        run.write_table("calibration", calibration)
        run.say(
            f"seconds promised of {len(errors)} whole models that prices were not fitted to are "
            f"off by {np.median(errors):.1%} at the median, {max(errors):.1%} at most"
        )
    source = {"measured": dist.device().type, "counted": None}.get(
        config.source, device and device.name
    )
    run.write_json(
        "scenarios",
        config.described(config.source, source, config.bytes_per_parameter, config.bytes_per_kv)
        | {"dtype": config.dtype, "tensor_parallel": config.tensor_parallel},
    )
