"""Processes: who this one is among those that `torchrun` started, and sums over all of them.

With one process everything here is a no-op. Torch is imported by the calls that need it.
"""

from __future__ import annotations

import datetime as dt
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

PATIENCE = dt.timedelta(days=30)  # how long the others wait for work that one process does


def rank() -> int:
    """This process's number, 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes there are, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process's number on its machine: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """True in the one process that writes files and prints."""
    return rank() == 0


def device() -> torch.device:
    """Where this process computes: its own GPU, or the CPU."""
    import torch

    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def processes() -> Iterator[None]:
    """The process group of this job while the body runs: NCCL with GPUs, gloo without."""
    if world() == 1:
        yield
        return
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    torch.distributed.init_process_group(_backend())
    for make in (waiting_group, saving_group):  # in every process, in the same order
        make()
    try:
        yield
    finally:
        for made in (waiting_group, saving_group, mesh):  # they end with the job
            made.cache_clear()
        torch.distributed.destroy_process_group()


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if device().type == "cuda" else "gloo"


@functools.cache
def waiting_group() -> torch.distributed.ProcessGroup | None:
    """All processes, for waiting however long it takes; None with one process."""
    return _patient_group()


@functools.cache
def saving_group() -> torch.distributed.ProcessGroup | None:
    """All processes, for the thread that saves beside training's collectives; None with one."""
    return _patient_group()


def _patient_group() -> torch.distributed.ProcessGroup | None:
    if world() == 1:
        return None
    import torch.distributed

    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)  # type: ignore[return-value]


def lost_peer(error: BaseException) -> bool:
    """True for the error of a collective whose other side has died or fallen silent."""
    if world() == 1 or not isinstance(error, RuntimeError):
        return False
    import torch.distributed

    known = isinstance(error, torch.distributed.DistError)
    return known or any(name in str(error) for name in ("gloo", "NCCL", "Connection closed"))


def max(value: Tensor) -> Tensor:
    """The elementwise maximum of a tensor over all processes; the argument is untouched."""
    return sum(value, "MAX")


def sum(value: Tensor, operation: str = "SUM") -> Tensor:
    """The sum of a tensor over all processes, the same in each; the argument is untouched."""
    if world() == 1:
        return value
    import torch.distributed

    total = value.clone()
    torch.distributed.all_reduce(total, getattr(torch.distributed.ReduceOp, operation))
    return total


def broadcast(value: Any) -> Any:
    """The main process's picklable object, in every process."""
    if world() == 1:
        return value
    import torch.distributed

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every process's picklable object, in the order of ranks, in every process."""
    if world() == 1:
        return [value]
    import torch.distributed

    everyone: list[Any] = [None] * world()
    torch.distributed.all_gather_object(everyone, value)
    return everyone


def barrier(group: torch.distributed.ProcessGroup | None = None) -> None:
    """Returns when every process has called it; group: `saving_group` in the thread that saves."""
    if world() > 1:
        import torch.distributed

        torch.distributed.barrier(group or waiting_group())


@functools.cache
def mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """A grid of all processes, for `fully_shard` and DTensor; one process is a grid, too."""
    import torch.distributed
    from torch.distributed.device_mesh import init_device_mesh

    if world() == 1 and not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(_backend(), store=store, rank=0, world_size=1)
    return init_device_mesh(device().type, shape, mesh_dim_names=names)
