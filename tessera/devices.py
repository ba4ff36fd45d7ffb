"""The accelerators known by name, from the makers' data sheets: dense peaks, SXM boards.

The four constants come from measurements published on H100s or H200s, none of which
`benchmarks/roofline.py` predicts; the B200's own latency comes from a row that it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tessera.table import nearest

GB, TB, TFLOPS = 1e9, 1e12, 1e12
# COMPUTE, MEMORY: the share of the peak and of the bandwidth that software reaches.
# Best FP8 product found on an H200 (the same die): 1453 of 1979 TFLOPS; bf16 reaches 0.80 (Bekman,
# ml-engineering, "maximum achievable matmul FLOPS"). A model's products are at most as good.
COMPUTE = 0.73
# Llama-3.2-1B decoded in bf16 by one persistent kernel on an H100: 78 % of the bandwidth (Spector
# et al., "Look Ma, No Bubbles!", 2025).
MEMORY = 0.78
# What torch's trainings reach, everything that is not counted included: launches, exchanges that
# nothing hides, clocks under load. Llama 3.1 8B at 8,192 tokens on 8 H100, FSDP and selective
# checkpointing: 5,762 tokens/s a GPU, 6,667 compiled, "33% to 39% MFU" by a count that does not
# halve attention (torchtitan, benchmarks/llama3_h100_202412); `benchmarks/plan.py` has more.
TRAINING = 0.40
# Seconds from one kernel's start to its dependent's, beyond its work. Engines that launch kernel by
# kernel reach "at most 50 %" there: 0.53 ms more for the 148 kernels that we count. That includes
# the gaps of their hosts; a lean engine has less.
KERNEL = 3.6e-6
# Super-49B-v1.5 in FP8 by vLLM 0.16 on one B200: 13.4, 12.3 and 11.2 ms a token at 1, 8 and 16
# requests (Vultr's inference cookbook, 2026). Reading the weights is 8.2 of them, and 569 kernels
# the rest: 9, 7 and 4 us.
LATENCIES = {"B200": 7e-6}
# Seconds of one exchange between devices, the kernel around it included. All-reduce of up to 32 KB
# on 8 H100: 6-8 us by one kernel, 9-12 us by another (SGLang, pull request 2904). Over PCIe it is
# longer.
HOP = 8e-6
DTYPES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0}  # bytes of a weight, and of a cached value
CPU = "cpu"  # the machine at hand, which is measured


class DeviceError(ValueError):
    """No such device or data type; the text names those there are."""


@dataclass(frozen=True)
class Device:
    """One accelerator: bytes, bytes a second, and operations a second by data type.

    link: sent to its peers in one direction. compute, memory_share: what engines reach of peak and
    bandwidth; training: of the peak, trainings. kernel, hop: seconds.
    """

    name: str
    memory: float
    bandwidth: float
    peak: Mapping[str, float]
    link: float
    compute: float = COMPUTE
    memory_share: float = MEMORY
    training: float = TRAINING
    kernel: float = KERNEL
    hop: float = HOP

    def flops(self, dtype: str) -> float:
        """Operations a second that products of this data type reach. Raises DeviceError."""
        if dtype not in self.peak:
            raise DeviceError(f"{self.name} has no {dtype!r}; {nearest(dtype, self.peak)}")
        return self.compute * self.peak[dtype]

    def rate(self) -> float:
        """Bytes a second that long reads reach."""
        return self.memory_share * self.bandwidth


# GB of memory, TB/s, GB/s of link, TFLOPS by type (float32 off the tensor cores, torch's default).
_SHEETS = {
    "H100": (80, 3.35, 450, {"bf16": 989, "fp8": 1979, "fp32": 67}),
    "H200": (141, 4.8, 450, {"bf16": 989, "fp8": 1979, "fp32": 67}),
    "B200": (180, 7.7, 900, {"bf16": 2250, "fp8": 4500, "fp32": 75}),
    "A100": (80, 2.039, 300, {"bf16": 312, "fp32": 19.5}),
    "L40S": (48, 0.864, 32, {"bf16": 362, "fp8": 733, "fp32": 91.6}),
    "RTX 4090": (24, 1.008, 32, {"bf16": 165, "fp8": 330, "fp32": 82.6}),
}
DEVICES: dict[str, Device] = {
    name: Device(
        name,
        memory * GB,
        rate * TB,
        {t: n * TFLOPS for t, n in peak.items()},
        link * GB,
        kernel=LATENCIES.get(name, KERNEL),
    )
    for name, (memory, rate, link, peak) in _SHEETS.items()
}


def find_device(name: str) -> Device:
    """The device of a name, case, spaces and dashes aside. Raises DeviceError."""

    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    for device in DEVICES.values():
        if plain(device.name) == plain(name):
            return device
    raise DeviceError(f"unknown device {name!r}; {nearest(name, (*DEVICES, CPU))}")
