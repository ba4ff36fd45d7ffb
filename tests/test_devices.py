"""Named devices: found by plain names, refused with what there is, slower than their sheets."""

from __future__ import annotations

import pytest

from tessera.devices import CPU, DEVICES, DTYPES, DeviceError, find_device
from tessera.puzzle.roofline import Serving


@pytest.mark.parametrize("name", ["rtx4090", "RTX 4090", "rtx-4090", "Rtx_4090"])
def test_names_are_plain(name: str):
    assert find_device(name) is DEVICES["RTX 4090"]


def test_no_two_devices_have_one_plain_name():
    assert [find_device(name).name for name in DEVICES] == list(DEVICES)
    assert len(set(map(id, map(find_device, DEVICES)))) == len(DEVICES)


def test_an_unknown_device_is_told_the_nearest_and_all():
    with pytest.raises(DeviceError, match="unknown device 'H10'; did you mean 'H100'") as caught:
        find_device("H10")
    assert all(name in str(caught.value) for name in (*DEVICES, CPU))


def test_an_unknown_dtype_is_told_those_there_are():
    with pytest.raises(DeviceError, match="A100 has no 'fp8'; .*Allowed: bf16"):
        Serving(DEVICES["A100"], "fp8")
    with pytest.raises(DeviceError, match="H100 has no 'fp4'; .*Allowed: bf16, fp8"):
        DEVICES["H100"].flops("fp4")


def test_devices_are_counted_from_one():
    with pytest.raises(DeviceError, match="tensor_parallel.*0"):
        Serving(DEVICES["H100"], "fp8", 0)


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_software_reaches_less_than_the_data_sheet(device):
    assert device.rate() < device.bandwidth < device.memory * 1e3
    assert device.link < device.bandwidth
    for dtype, peak in device.peak.items():
        assert dtype in DTYPES and device.flops(dtype) < peak
    assert {"bf16", "fp32"} <= device.peak.keys()  # what a training computes in
    if "fp8" in device.peak:  # half the bytes, twice the operations; sheets round
        assert device.peak["fp8"] == pytest.approx(2 * device.peak["bf16"], rel=0.02)
