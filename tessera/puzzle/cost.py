"""What each word costs: parameters and bytes counted, seconds measured or computed.

    source = "measured"   in this engine, corrected by whole models: `measure.py`, `calibrate.py`
             "counted"    no seconds at all
             "roofline"   from a named device's data sheet: `roofline.py`; "cpu" is this machine

A table is of one scenario at one batch. Each is kept in the run's state as soon as it is done, and
a run that goes on prices what is missing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from tessera.devices import CPU, DTYPES, Device, DeviceError, find_device
from tessera.model.config import GQA, KINDS, ModelConfig, Variant, parse_kind
from tessera.model.source import load_config
from tessera.puzzle.calibrate import Key, Seconds, architectures, calibrate, held_out, monotone
from tessera.puzzle.cost_table import DEFAULT, Scenario
from tessera.puzzle.measure import generation_seconds, measure
from tessera.puzzle.probe import probe_cpu
from tessera.puzzle.roofline import Serving, seconds_of
from tessera.runs.manifest import read_json
from tessera.runs.run import Run

__all__ = ["CostConfig", "cost_rows", "count", "generation_seconds", "monotone", "price", "stage"]


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
