"""The accelerators we know by name: memory, bandwidth, peak arithmetic, link.

Dense (not sparse) peaks of the makers' data sheets, SXM boards where there is a choice; torch-free.
`link` is what one device sends in one direction to its peers, which bounds an all-reduce.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tessera.recipe import nearest

GB, TB, TFLOPS = 1e9, 1e12, 1e12


class DeviceError(ValueError):
    """No such device; the text names those there are."""


@dataclass(frozen=True)
class Device:
    """One accelerator. Bytes, bytes a second, and operations a second by data type."""

    name: str
    memory: float
    bandwidth: float
    peak: Mapping[str, float]
    link: float


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
    raise DeviceError(f"unknown device {name!r}; {nearest(name, DEVICES)}")


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
