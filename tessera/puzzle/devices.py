"""The accelerators we know by name: memory, bandwidth, peak arithmetic, link.

Dense (not sparse) peaks of the makers' data sheets, SXM boards where there is a choice; torch-free.
`link` is what one device sends in one direction to its peers, which bounds an all-reduce. What
software gets out of them is four numbers, the same for every accelerator unless it says otherwise:

    COMPUTE, MEMORY   the share of the peak that large products and long reads reach. Dense FP8 and
                      bf16 products on an H100 run at 60-70 % of its data sheet (power limits the
                      clock), reads of weights at 80-90 % of its bandwidth.
    KERNEL            seconds from one kernel's start to its dependent's, beyond its work: launch,
                      ramp and tail inside a CUDA graph, 2-3 us.
    HOP               seconds of one exchange between devices: a flag written and seen over NVLink,
                      with the kernel around it, 7-10 us for 8 devices.

Round numbers, taken from no source that could be cited, the latencies with one published speed in
view (a 405B on 8 H100); `benchmarks/results/roofline.md` says what predictions owe to each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tessera.recipe import nearest

GB, TB, TFLOPS = 1e9, 1e12, 1e12
COMPUTE, MEMORY = 0.6, 0.8
KERNEL, HOP = 2.5e-6, 8e-6
DTYPES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0}  # bytes of a weight, and of a cached value
CPU = "cpu"  # the name of the machine at hand, which `probe.probe_cpu` measures


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


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("H100", 80 * GB, 3.35 * TB, {"bf16": 989 * TFLOPS, "fp8": 1979 * TFLOPS}, 450 * GB),
        Device("H200", 141 * GB, 4.8 * TB, {"bf16": 989 * TFLOPS, "fp8": 1979 * TFLOPS}, 450 * GB),
        Device("B200", 180 * GB, 7.7 * TB, {"bf16": 2250 * TFLOPS, "fp8": 4500 * TFLOPS}, 900 * GB),
        Device("A100", 80 * GB, 2.039 * TB, {"bf16": 312 * TFLOPS}, 300 * GB),
        Device("L40S", 48 * GB, 0.864 * TB, {"bf16": 362 * TFLOPS, "fp8": 733 * TFLOPS}, 32 * GB),
        Device(
            "RTX 4090", 24 * GB, 1.008 * TB, {"bf16": 165 * TFLOPS, "fp8": 330 * TFLOPS}, 32 * GB
        ),
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
