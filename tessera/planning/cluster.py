"""The machines of a plan: how many, of which device, joined how."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tessera.devices import GB, Device, DeviceError, find_device

# What one GPU sends to another machine in one direction: a 400 Gb/s port each, as DGX H100 has.
NETWORK = 50 * GB
_CLUSTER = re.compile(r"(?:(\d+)x)?(?:(\d+)x)?([A-Za-z].*)")


class ClusterError(ValueError):
    """No such cluster; the text says how one is written."""


@dataclass(frozen=True)
class Cluster:
    """`nodes` machines of `gpus` devices; network: bytes a second a device, one direction."""

    nodes: int
    gpus: int
    device: Device
    network: float = NETWORK

    @property
    def world(self) -> int:
        return self.nodes * self.gpus

    def link(self, ranks: int) -> float:
        """Bytes a second between `ranks` neighbours: the slower network where machines differ."""
        return self.device.link if ranks <= self.gpus else min(self.device.link, self.network)

    def __str__(self) -> str:
        return f"{self.nodes}x{self.gpus}x{self.device.name}"


def parse_cluster(text: str, network: float = NETWORK) -> Cluster:
    """`9x8xH100`: 9 machines of 8; `8xH100`: one machine; `H100`: one device.

    Raises ClusterError for what is none of these or has none of a thing.
    """
    match = _CLUSTER.fullmatch(text.strip())
    if match is None:
        raise ClusterError(
            f"{text!r} is no cluster; write machines x devices x name, as 9x8xH100, 8xH100 or H100"
        )
    first, second, name = match.groups()
    nodes, gpus = (int(first), int(second)) if second else (1, int(first or 1))
    if nodes < 1 or gpus < 1:
        raise ClusterError(f"{text!r} has no device; both numbers begin at 1")
    try:
        return Cluster(nodes, gpus, find_device(name), network)
    except DeviceError as error:
        raise ClusterError(str(error)) from None
