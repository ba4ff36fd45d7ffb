"""Seconds of words on a device that is not here, from its data sheet; and this CPU as a device.

    seconds of a product = max(operations / (peak · share), bytes / (bandwidth · share))

Constants are in `devices.py`. Not modelled: wave quantisation, schedulers, paging, overlap.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from tessera.devices import CPU, DTYPES, Device, DeviceError
from tessera.generate.packed import Matrix
from tessera.generate.scheduler import clock
from tessera.model.config import GQA, Chain, ModelConfig, NoOp, SwiGLU, Variant, parse_kind
from tessera.puzzle.cost_table import Scenario

# Kernels of one pass, elementwise ones fused into what an inference engine fuses them into.
ATTENTION_KERNELS = 5  # norm with the residual; QKV; RoPE and cache write; attention; output
FFN_KERNELS = 4  # norm with the residual; gate and up; SiLU times up; down
LINEAR_KERNELS = 2  # norm with the residual; the product
BASE_KERNELS = 4  # embedding; last norm; head; choice of a token
ROWS, SIDE = 512, 2048  # of the products whose rate is a CPU's peak
READ = 64 * 2**20  # bytes of weights that a single row streams; more than caches hold
Seconds = tuple[float, float]


@dataclass(frozen=True)
class Pass:
    """One forward pass: rows through the products, (query, key) pairs, cached tokens read."""

    rows: int
    pairs: float
    cached: float


def passes(scenario: Scenario, sliding_window: int | None) -> tuple[Pass, Pass]:
    batch, length = scenario.batch, scenario.prompt
    window = min(sliding_window or length, length)
    pairs = length * window - window * (window - 1) / 2  # causal: the first rows see fewer
    mean = scenario.prompt + scenario.new / 2
    seen = min(sliding_window or mean, mean)
    return Pass(batch * length, batch * pairs, batch * length), Pass(
        batch, batch * seen, batch * seen
    )


@dataclass(frozen=True)
class Serving:
    """What serves: `tensor_parallel` devices, the data type of products, bytes a stored number."""

    device: Device
    dtype: str
    tensor_parallel: int = 1
    bytes_per_parameter: float = 0.0  # 0: as many as dtype has
    bytes_per_kv: float = 0.0

    def __post_init__(self) -> None:
        self.device.flops(self.dtype)  # refuses what the device lacks
        if self.tensor_parallel < 1:
            raise DeviceError(f"tensor_parallel = {self.tensor_parallel}; give 1 or more devices")
        own = DTYPES[self.dtype]
        object.__setattr__(self, "bytes_per_parameter", self.bytes_per_parameter or own)
        object.__setattr__(self, "bytes_per_kv", self.bytes_per_kv or own)

    @property
    def wide(self) -> str:
        """The data type of activations and attention; bf16 where products are FP8."""
        return "bf16" if self.dtype == "fp8" else self.dtype

    def share(self, heads: int) -> int:
        return math.ceil(heads / self.tensor_parallel)

    def work(self, flops: float, moved: float, dtype: str | None = None) -> float:
        """Seconds of one kernel's work: operations and bytes overlap, and the slower counts."""
        device = self.device
        return max(flops / device.flops(dtype or self.dtype), moved / device.rate())

    def exchange(self, rows: int, width: int) -> float:
        """Seconds of an all-reduce of `rows` x `width` activations, by the faster of two ways: all
        read all peers, one hop; or reduce-scatter and all-gather, two hops, less traffic."""
        n, device = self.tensor_parallel, self.device
        if n == 1:
            return 0.0
        size = rows * width * DTYPES[self.wide]
        one = device.hop + (n - 1) * size / device.link
        two = 2 * device.hop + 2 * (n - 1) / n * size / device.link
        return min(one, two)

    def gather(self, rows: int, width: int) -> float:
        n, device = self.tensor_parallel, self.device
        if n == 1:
            return 0.0
        return device.hop + (n - 1) * rows * width * DTYPES[self.wide] / device.link

    def product(self, rows: int, inputs: int, outputs: int) -> float:
        """Activations `(rows, inputs)` times weights `(inputs, outputs)`, which are read once."""
        activations = rows * (inputs + outputs) * DTYPES[self.wide]
        weights = inputs * outputs * self.bytes_per_parameter
        return self.work(2.0 * rows * inputs * outputs, weights + activations)

    def moved(self, numbers: float) -> float:
        return numbers * DTYPES[self.wide] / self.device.rate()


def word_seconds(
    config: ModelConfig, variant: Variant, scenario: Scenario, serving: Serving
) -> tuple[float, float]:
    """Seconds of (prefill, one decode step) that one word adds."""
    prefill, decode = passes(scenario, config.sliding_window)
    return _subblock(config, variant, prefill, serving), _subblock(config, variant, decode, serving)


def _subblock(config: ModelConfig, variant: Variant, step: Pass, serving: Serving) -> float:
    """Q, K, V, gate and up are split by columns over devices, their partners by rows, KV heads
    copied where they are fewer. Every device holds linear subblocks whole: no exchange."""
    hidden, rows = config.hidden_size, step.rows
    norm = serving.moved(4 * hidden * rows)  # residual and delta read, their sum and norm written
    match variant:
        case NoOp():
            return 0.0
        case Chain():
            shapes = variant.shapes(hidden)
            products = sum(serving.product(rows, inputs, outputs) for outputs, inputs in shapes)
            kernels = LINEAR_KERNELS + len(shapes) - 1
            return products + norm + kernels * serving.device.kernel
        case SwiGLU(width):
            own = math.ceil(width / serving.tensor_parallel)
            products = serving.product(rows, hidden, 2 * own) + serving.product(rows, own, hidden)
            gate = serving.moved(3 * own * rows)  # reads gate and up, writes their product
            around = norm + serving.exchange(rows, hidden)
            return products + gate + around + FFN_KERNELS * serving.device.kernel
        case GQA(heads):
            dim = config.head_dim
            q, kv = serving.share(config.num_attention_heads), serving.share(heads)
            qkv = (q + 2 * kv) * dim
            products = serving.product(rows, hidden, qkv) + serving.product(rows, q * dim, hidden)
            flops = 4 * step.pairs * q * dim  # QK^T and PV, a multiply and an add each
            read = step.cached * 2 * kv * dim * serving.bytes_per_kv
            past = serving.work(flops, read, serving.wide)
            turn = serving.moved(2 * qkv * rows)
            around = norm + serving.exchange(rows, hidden)
            return products + past + turn + around + ATTENTION_KERNELS * serving.device.kernel


def base_seconds(config: ModelConfig, scenario: Scenario, serving: Serving) -> tuple[float, float]:
    """Seconds of (prefill, one decode step) outside all blocks: embedding, last norm, and head on
    the last token of each prompt; both are split by vocabulary over devices."""
    own = math.ceil(config.vocab_size / serving.tensor_parallel)
    head = serving.product(scenario.batch, config.hidden_size, own)
    head += serving.gather(scenario.batch, own)
    fixed = head + BASE_KERNELS * serving.device.kernel
    prefill, decode = (
        fixed
        + serving.moved(2 * config.hidden_size * rows)
        + serving.exchange(rows, config.hidden_size)
        for rows in (scenario.batch * scenario.prompt, scenario.batch)
    )
    return prefill, decode


def layer_seconds(config: ModelConfig, scenario: Scenario, serving: Serving) -> list[Seconds]:
    """Seconds of (prefill, one decode step) of each layer."""
    words = {
        variant: word_seconds(config, variant, scenario, serving)
        for block in config.blocks
        for variant in (block.attention, block.ffn)
    }
    pairs = [(words[block.attention], words[block.ffn]) for block in config.blocks]
    return [(a[0] + b[0], a[1] + b[1]) for a, b in pairs]


def model_seconds(config: ModelConfig, scenario: Scenario, serving: Serving) -> Seconds:
    """Seconds of (prefill, one decode step) of a whole model."""
    parts = [base_seconds(config, scenario, serving), *layer_seconds(config, scenario, serving)]
    prefill, decode = (math.fsum(column) for column in zip(*parts, strict=True))
    return prefill, decode


def roofline_seconds(
    config: ModelConfig, words: Iterable[tuple[str, str]], scenario: Scenario, serving: Serving
) -> dict[tuple[str, str], tuple[float, float]]:
    """Seconds of (prefill, one decode step) of each (kind, word), and of the base ("base", "")."""
    found = {("base", ""): base_seconds(config, scenario, serving)}
    for kind, word in words:
        found[kind, word] = word_seconds(config, parse_kind(kind, word), scenario, serving)
    return found


@torch.inference_mode()
def probe_cpu(seconds: float = 0.5) -> Device:
    """This CPU as a device: peak from square products of the engine in float32, bandwidth from one
    row, kernel from tiny calls, each measured for so many seconds. Shares of the peak are 1."""

    def least(call: Callable[[], object]) -> float:
        cpu = torch.device("cpu")
        best, end = math.inf, time.monotonic() + seconds
        while time.monotonic() < end or math.isinf(best):
            start = clock(cpu)
            call()
            best = min(best, clock(cpu) - start)
        return best

    product = Matrix(torch.randn(SIDE, SIDE))
    many = torch.randn(ROWS, SIDE)
    peak = 2 * ROWS * SIDE * SIDE / least(lambda: product(many))
    wide = Matrix(torch.randn(READ // 4 // SIDE, SIDE))
    row = torch.randn(1, SIDE)
    bandwidth = READ / least(lambda: wide(row))
    tiny, little = Matrix(torch.randn(8, 8)), torch.randn(1, 8)
    kernel = least(lambda: tiny(little))
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    shares = {"compute": 1.0, "memory_share": 1.0}
    own = {"link": math.inf, "kernel": kernel, "hop": 0.0}
    return Device(CPU, memory, bandwidth, {"fp32": peak}, **shares, **own)
