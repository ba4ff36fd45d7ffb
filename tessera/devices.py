"""The accelerators known by name: memory, bandwidth, peak arithmetic, link.

Dense (not sparse) peaks of the makers' data sheets, SXM boards where there is a choice. `link` is
what one device sends in one direction to its peers, which bounds an all-reduce. The four constants
come from measurements published on H100s or H200s, none of which `benchmarks/roofline.py` predicts.
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
# Seconds from one kernel's start to its dependent's, beyond its work. Engines that launch kernel by
# kernel reach "at most 50 %" there: 0.53 ms more for the 148 kernels that we count. That includes
# the gaps of their hosts; a lean engine has less.
KERNEL = 3.6e-6
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
    """One accelerator. Bytes, bytes a second, and operations a second by data type.

    compute, memory_share: what software reaches of peak and bandwidth; kernel, hop: seconds.
    """

    name: str
    memory: float
    bandwidth: float
    peak: Mapping[str, float]
    link: float
    compute: float = COMPUTE
    memory_share: float = MEMORY
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


def _tera(**peaks: float) -> dict[str, float]:
    """Peaks by data type, of as many TFLOPS; float32 off the tensor cores, torch's default."""
    return {dtype: peak * TFLOPS for dtype, peak in peaks.items()}


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("H100", 80 * GB, 3.35 * TB, _tera(bf16=989, fp8=1979, fp32=67), 450 * GB),
        Device("H200", 141 * GB, 4.8 * TB, _tera(bf16=989, fp8=1979, fp32=67), 450 * GB),
        Device("B200", 180 * GB, 7.7 * TB, _tera(bf16=2250, fp8=4500, fp32=75), 900 * GB),
        Device("A100", 80 * GB, 2.039 * TB, _tera(bf16=312, fp32=19.5), 300 * GB),
        Device("L40S", 48 * GB, 0.864 * TB, _tera(bf16=362, fp8=733, fp32=91.6), 32 * GB),
        Device("RTX 4090", 24 * GB, 1.008 * TB, _tera(bf16=165, fp8=330, fp32=82.6), 32 * GB),
    )
}


def find_device(name: str) -> Device:
    """The device of a name, upper or lower case, spaces and dashes aside.

    Raises DeviceError with the nearest name and all of them.
    """
    for device in DEVICES.values():
        if _plain(device.name) == _plain(name):
            return device
    raise DeviceError(f"unknown device {name!r}; {nearest(name, (*DEVICES, CPU))}")


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
