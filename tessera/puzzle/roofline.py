"""Seconds of words and models on a device that is not here, from its data sheet. Torch-free.

    seconds of a product = max(operations / (peak · share), bytes / (bandwidth · share))

A subblock is its products, its attention over the past, its elementwise passes, its kernels, and
under tensor parallelism one all-reduce; prefill of the whole batch and one decode step at the mean
length of the cache are priced apart. Weights are read once a pass and the KV cache once a step.
Q, K, V, gate and up are split by columns, their partners by rows, KV heads copied where there are
fewer of them than devices. A linear subblock is held whole by every device, so that it, like a
no-op, needs no exchange. Constants and where they come from are in `devices.py`. Not modelled:
wave quantisation, schedulers, paging, an embedding or head kept wider than the rest, overlap.

This machine's CPU as a `Device`: what products, reads and calls take, measured in a second.

The shares of the peak are 1, since the peak is what was reached. Products are the engine's own
(`Matrix`), in float32, on as many threads as torch has.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from tessera.devices import CPU, DTYPES, Device, DeviceError, find_device
from tessera.generate.packed import Matrix
from tessera.generate.scheduler import clock
from tessera.model.config import GQA, KINDS, Chain, ModelConfig, NoOp, SwiGLU, Variant, parse_kind
from tessera.puzzle.cost_table import Scenario

# Kernels of one pass, elementwise ones fused into what an inference engine fuses them into.
ATTENTION_KERNELS = 5  # norm with the residual; QKV; RoPE and cache write; attention; output
FFN_KERNELS = 4  # norm with the residual; gate and up; SiLU times up; down
LINEAR_KERNELS = 2  # norm with the residual; the product
BASE_KERNELS = 4  # embedding; last norm; head; choice of a token


@dataclass(frozen=True)
class Serving:
    """What serves: `tensor_parallel` devices, the data type of products, bytes a stored number.

    Activations and attention stay in bf16 where products are FP8.
    """

    device: Device
    dtype: str
    tensor_parallel: int = 1
    bytes_per_parameter: float = 0.0  # 0: as many as dtype has
    bytes_per_kv: float = 0.0

    def __post_init__(self) -> None:
        self.device.flops(self.dtype)  # refuses what the device lacks
        if self.tensor_parallel < 1:
            raise DeviceError(
                f"tensor_parallel is {self.tensor_parallel}; it counts devices, from 1"
            )
        own = DTYPES[self.dtype]
        object.__setattr__(self, "bytes_per_parameter", self.bytes_per_parameter or own)
        object.__setattr__(self, "bytes_per_kv", self.bytes_per_kv or own)

    @property
    def wide(self) -> str:
        """The data type of activations and attention."""
        return "bf16" if self.dtype == "fp8" else self.dtype

    def share(self, heads: int) -> int:
        """Heads on the fullest device; one at least, so few KV heads are copied."""
        return math.ceil(heads / self.tensor_parallel)

    def work(self, flops: float, moved: float, dtype: str | None = None) -> float:
        """Seconds of one kernel's work: operations and bytes overlap, and the slower counts."""
        device = self.device
        return max(flops / device.flops(dtype or self.dtype), moved / device.rate())

    def exchange(self, rows: int, width: int) -> float:
        """Seconds of an all-reduce of `rows` x `width` activations, by the faster of two ways.

        One shot: every device reads all peers, one hop. Two shots: reduce-scatter and all-gather,
        two hops and less traffic.
        """
        n, device = self.tensor_parallel, self.device
        if n == 1:
            return 0.0
        size = rows * width * DTYPES[self.wide]
        one = device.hop + (n - 1) * size / device.link
        two = 2 * device.hop + 2 * (n - 1) / n * size / device.link
        return min(one, two)

    def gather(self, rows: int, width: int) -> float:
        """Seconds until every device has the `rows` x `width` activations of each."""
        n, device = self.tensor_parallel, self.device
        if n == 1:
            return 0.0
        return device.hop + (n - 1) * rows * width * DTYPES[self.wide] / device.link


@dataclass(frozen=True)
class Pass:
    """One forward pass: rows through the products, (query, key) pairs, cached tokens read."""

    rows: int
    pairs: float
    cached: float


@dataclass(frozen=True)
class Passes:
    """The two passes a scenario consists of: prefill of the batch, and the mean decode step."""

    scenario: Scenario
    sliding_window: int | None

    @cached_property
    def prefill(self) -> Pass:
        batch, length = self.scenario.batch, self.scenario.prompt
        window = min(self.sliding_window or length, length)
        pairs = length * window - window * (window - 1) / 2  # causal: the first rows see fewer
        return Pass(batch * length, batch * pairs, batch * length)

    @cached_property
    def decode(self) -> Pass:
        batch, length = self.scenario.batch, self.scenario.prompt + self.scenario.new / 2
        seen = min(self.sliding_window or length, length)
        return Pass(batch, batch * seen, batch * seen)


def word_seconds(
    config: ModelConfig, variant: Variant, scenario: Scenario, serving: Serving
) -> tuple[float, float]:
    """Seconds of (prefill, one decode step) that one word adds."""
    passes = Passes(scenario, config.sliding_window)
    prefill, decode = (
        _subblock(config, variant, p, serving) for p in (passes.prefill, passes.decode)
    )
    return prefill, decode


def _subblock(config: ModelConfig, variant: Variant, step: Pass, serving: Serving) -> float:
    match variant:
        case NoOp():
            return 0.0
        case Chain():
            return _chain(config, variant, step, serving)
        case SwiGLU(width):
            return _ffn(config, width, step, serving)
        case GQA(heads):
            return _attention(config, heads, step, serving)


def _chain(config: ModelConfig, chain: Chain, step: Pass, serving: Serving) -> float:
    shapes = chain.shapes(config.hidden_size)
    products = sum(_product(step.rows, columns, rows, serving) for rows, columns in shapes)
    kernels = LINEAR_KERNELS + len(shapes) - 1
    return products + _norm(config, step, serving) + kernels * serving.device.kernel


def _ffn(config: ModelConfig, width: int, step: Pass, serving: Serving) -> float:
    hidden, own = config.hidden_size, math.ceil(width / serving.tensor_parallel)
    products = _product(step.rows, hidden, 2 * own, serving) + _product(
        step.rows, own, hidden, serving
    )
    gate = _moved(3 * own * step.rows, serving)  # reads gate and up, writes their product
    around = _norm(config, step, serving) + serving.exchange(step.rows, hidden)
    return products + gate + around + FFN_KERNELS * serving.device.kernel


def _attention(config: ModelConfig, kv_heads: int, step: Pass, serving: Serving) -> float:
    hidden, dim = config.hidden_size, config.head_dim
    q, kv = serving.share(config.num_attention_heads), serving.share(kv_heads)
    qkv = (q + 2 * kv) * dim
    products = _product(step.rows, hidden, qkv, serving) + _product(
        step.rows, q * dim, hidden, serving
    )
    flops = 4 * step.pairs * q * dim  # QK^T and PV, a multiply and an add each
    past = serving.work(flops, step.cached * 2 * kv * dim * serving.bytes_per_kv, serving.wide)
    turn = _moved(2 * qkv * step.rows, serving)
    around = _norm(config, step, serving) + serving.exchange(step.rows, hidden)
    return products + past + turn + around + ATTENTION_KERNELS * serving.device.kernel


def _product(rows: int, inputs: int, outputs: int, serving: Serving) -> float:
    """Activations `(rows, inputs)` times weights `(inputs, outputs)`, which are read once."""
    activations = rows * (inputs + outputs) * DTYPES[serving.wide]
    weights = inputs * outputs * serving.bytes_per_parameter
    return serving.work(2.0 * rows * inputs * outputs, weights + activations)


def _norm(config: ModelConfig, step: Pass, serving: Serving) -> float:
    """Residual and delta read, their sum and its norm written."""
    return _moved(4 * config.hidden_size * step.rows, serving)


def _moved(numbers: float, serving: Serving) -> float:
    return numbers * DTYPES[serving.wide] / serving.device.rate()


def base_seconds(config: ModelConfig, scenario: Scenario, serving: Serving) -> tuple[float, float]:
    """Seconds of (prefill, one decode step) outside all blocks: embedding, last norm, head.

    The head sees the last token of each prompt. Embedding and head are split by vocabulary, so the
    one's rows are summed over devices and the other's answers gathered.
    """
    own = math.ceil(config.vocab_size / serving.tensor_parallel)
    head = _product(scenario.batch, config.hidden_size, own, serving)
    head += serving.gather(scenario.batch, own)
    fixed = head + BASE_KERNELS * serving.device.kernel
    prefill, decode = (
        fixed
        + _moved(2 * config.hidden_size * rows, serving)
        + serving.exchange(rows, config.hidden_size)
        for rows in (scenario.batch * scenario.prompt, scenario.batch)
    )
    return prefill, decode


def seconds_of(
    config: ModelConfig, words: Iterable[tuple[str, str]], scenario: Scenario, serving: Serving
) -> dict[tuple[str, str], tuple[float, float]]:
    """Seconds of (prefill, one decode step) of each (kind, word), and of the base ("base", "")."""
    found = {("base", ""): base_seconds(config, scenario, serving)}
    for kind, word in words:
        variant = parse_kind(kind, word)
        found[kind, word] = word_seconds(config, variant, scenario, serving)
    return found


def predict(
    config: ModelConfig,
    device: str | Device,
    dtype: str,
    scenario: Scenario,
    tensor_parallel: int = 1,
) -> dict[str, float]:
    """What a whole model does on `tensor_parallel` devices: the sum of its words and the base.

    prefill_seconds, decode_seconds (a step), seconds (the scenario), throughput (tokens/s of all
    devices together), bytes (on each device). Raises DeviceError.
    """
    found = find_device(device) if isinstance(device, str) else device
    serving = Serving(found, dtype, tensor_parallel)
    pairs = [base_seconds(config, scenario, serving)]
    pairs += [
        word_seconds(config, getattr(block, kind), scenario, serving)
        for block in config.blocks
        for kind in KINDS
    ]
    prefill, decode = (math.fsum(column) for column in zip(*pairs, strict=True))
    seconds = prefill + (scenario.new - 1) * decode
    return {
        "prefill_seconds": prefill,
        "decode_seconds": decode,
        "seconds": seconds,
        "throughput": scenario.batch * scenario.new / seconds,
        "bytes": device_bytes(config, scenario, serving),
    }


def device_bytes(config: ModelConfig, scenario: Scenario, serving: Serving) -> float:
    """Bytes of weights and KV cache on the fullest device at the end of the scenario."""
    n = serving.tensor_parallel
    whole = sum(
        config.subblock_params(kind, getattr(block, kind))
        for block in config.blocks
        for kind in KINDS
        if isinstance(getattr(block, kind), Chain)
    )
    split = (config.num_params() - whole) / n
    heads = (
        serving.share(block.attention.num_key_value_heads)
        for block in config.blocks
        if isinstance(block.attention, GQA)
    )
    cached = scenario.cached_tokens * 2 * config.head_dim * serving.bytes_per_kv * sum(heads)
    return (whole + split) * serving.bytes_per_parameter + cached


def largest_batch(
    config: ModelConfig,
    scenario: Scenario,
    serving: Serving,
    share: float = 0.9,
    of_free: bool = False,
) -> int | None:
    """The most requests that fit: 0 where not one does, None where nothing is cached.

    share: of a device's memory for weights and cache (vLLM's rule) or, with `of_free`, of what the
    weights leave for the cache (TensorRT-LLM's).
    """
    one, two = (
        device_bytes(config, scenario.model_copy(update={"batch": batch}), serving)
        for batch in (1, 2)
    )
    each, memory = two - one, serving.device.memory
    weights = one - each
    room = share * (memory - weights) if of_free else share * memory - weights
    return max(0, math.floor(room / each)) if each else None


ROWS, SIDE = 512, 2048  # of the products whose rate is the peak
READ = 64 * 2**20  # bytes of weights that a single row streams; more than caches hold


@torch.inference_mode()
def probe_cpu(seconds: float = 0.5) -> Device:
    """The CPU: peak from square products, bandwidth from one row, kernel from tiny calls.

    seconds: for each of the three.
    """
    product = Matrix(torch.randn(SIDE, SIDE))
    many = torch.randn(ROWS, SIDE)
    peak = 2 * ROWS * SIDE * SIDE / _least(lambda: product(many), seconds)
    wide = Matrix(torch.randn(READ // 4 // SIDE, SIDE))
    row = torch.randn(1, SIDE)
    bandwidth = READ / _least(lambda: wide(row), seconds)
    tiny, little = Matrix(torch.randn(8, 8)), torch.randn(1, 8)
    kernel = _least(lambda: tiny(little), seconds)
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Device(
        CPU,
        memory,
        bandwidth,
        {"fp32": peak},
        link=math.inf,
        compute=1.0,
        memory_share=1.0,
        kernel=kernel,
        hop=0.0,
    )


def _least(call: Callable[[], object], seconds: float) -> float:
    """The least time of a call, by the engine's clock, repeated for this long."""
    cpu = torch.device("cpu")
    least, end = math.inf, time.monotonic() + seconds
    while time.monotonic() < end or math.isinf(least):
        start = clock(cpu)
        call()
        least = min(least, clock(cpu) - start)
    return least
