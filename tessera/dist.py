"""Processes: who this one is among those that `torchrun` started, and sums over all of them.

With one process everything here is a no-op, so the same code runs on a laptop. Ranks come from
torchrun's environment variables, the only ones tessera reads; torch is imported by the calls
that need it, never with this module.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh


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


@contextmanager
def processes() -> Iterator[None]:
    """The process group of this job while the body runs: NCCL with GPUs, gloo without."""
    if world() == 1:
        yield
        return
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank())
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def sum(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, the same in each; the argument is untouched."""
    return _reduce(value, "SUM")


def max(value: Tensor) -> Tensor:
    """The elementwise maximum of a tensor over all processes; the argument is untouched."""
    return _reduce(value, "MAX")


def _reduce(value: Tensor, operation: str) -> Tensor:
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


def barrier() -> None:
    """Returns when every process has called it."""
    if world() > 1:
        import torch.distributed

        torch.distributed.barrier()


def mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """A grid of all processes, for `fully_shard` and DTensor."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return init_device_mesh(kind, shape, mesh_dim_names=names)
