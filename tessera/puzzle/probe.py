"""This machine's CPU as a `Device`: what products, reads and calls take, measured in a second.

The shares of the peak are 1, since the peak is what was reached. Products are the engine's own
(`Matrix`), in float32, on as many threads as torch has.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable

import torch

from tessera.devices import CPU, Device
from tessera.generate.packed import Matrix
from tessera.generate.stats import clock

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
