"""Processes: who this one is among those that `torchrun` started, and sums over all of them.

With one process everything here is a no-op. Torch is imported by the calls that need it.
"""

from __future__ import annotations

import datetime as dt
import functools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from tessera.devices import DeviceError
from tessera.table import nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
PATIENCE = dt.timedelta(days=30)  # how long the others wait for work that one process does
TIMEOUT = 120  # minutes, unless the environment variable TESSERA_TIMEOUT says


def timeout() -> dt.timedelta:
    """How long a collective waits for the slowest process: its rollouts and its judging, too.

    The end of a process ends the job at once under torchrun; this is for one that hangs.
    """
    given = os.environ.get("TESSERA_TIMEOUT", str(TIMEOUT))
    try:
        minutes = float(given)
        if not 0 < minutes < math.inf:
            raise ValueError
    except ValueError:
        raise DeviceError(
            f"TESSERA_TIMEOUT = {given!r} is no number of minutes above 0; the default is {TIMEOUT}"
        ) from None
    return dt.timedelta(minutes=minutes)


def rank() -> int:
    """This process's number, 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes there are, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process's number on its machine: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def share_of_machine(count: int) -> int:
    """This process's part of something that a machine has `count` of; one at the least."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return count // here or 1


def is_main() -> bool:
    """True in the one process that writes files and prints."""
    return rank() == 0


KINDS = ("cuda", "xpu", "mps", "cpu")  # ROCm's torch says cuda, too
HOST = "cpu"  # the machine's memory, where an accelerator's parameters may wait
_chosen: list[str] = []  # the kind of device said for the job, then for the stage


def device() -> torch.device:
    """Where this process computes: its own accelerator, or the CPU.

    What `computing_on` or the environment variable TESSERA_DEVICE says; else the accelerator that
    torch finds. No other code chooses a device.
    """
    import torch

    kind = _chosen[-1] if _chosen else os.environ.get("TESSERA_DEVICE") or _accelerator()
    if kind not in KINDS:
        hint = "; CUDA_VISIBLE_DEVICES says which of several" if kind.startswith("cuda:") else ""
        raise DeviceError(f"unknown device {kind!r}; {nearest(kind, KINDS)}{hint}")
    if kind not in ("cpu", _accelerator()):
        raise DeviceError(
            f"there is no device {kind!r} here: torch {torch.__version__} computes on "
            f"{' or '.join(dict.fromkeys((_accelerator(), 'cpu')))}; say that, or leave it out"
        )
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, local_rank())


def _accelerator() -> str:
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


@contextmanager
def computing_on(kind: str | None) -> Iterator[None]:
    """`device()` is of this kind (of `KINDS`) while the body runs; None leaves it as it is.

    Raises DeviceError where this machine has none.
    """
    if kind is None:
        yield
        return
    _chosen.append(kind)
    try:
        device()
        yield
    finally:
        _chosen.pop()


def device_memory() -> int | None:
    """Bytes that this process's accelerator has; None on a CPU, or where it does not say."""
    import torch

    if device().type in ("cuda", "xpu"):
        return getattr(torch, device().type).get_device_properties(device()).total_memory
    return torch.mps.recommended_max_memory() if device().type == "mps" else None


def widest_float(of: torch.device | None = None) -> torch.dtype:
    """float64, or float32 where the device (this process's, unless given) has none, as MPS."""
    import torch

    where = of or device()
    known = where.type != "xpu" or torch.xpu.get_device_properties(where).has_fp64
    return torch.float64 if known and where.type != "mps" else torch.float32


def copies_ahead(to: torch.device) -> bool:
    """Whether a copy from the CPU may go on while its source is let go: MPS would read what is next
    in that memory (pytorch issue 189690)."""
    return to.type != "mps"


@contextmanager
def processes() -> Iterator[None]:
    """The process group of this job while the body runs: NCCL with GPUs, gloo without."""
    if world() == 1:
        yield
        return
    import torch

    if device().type != "cpu":
        torch.accelerator.set_device_index(local_rank())
    torch.distributed.init_process_group(_backend(), timeout=timeout())
    for make in (waiting_group, saving_group):  # in every process, in the same order
        make()
    try:
        yield
    finally:
        for made in (waiting_group, saving_group, _mesh):  # they end with the job
            made.cache_clear()
        torch.distributed.destroy_process_group()


def _backend() -> str:
    own = {"cuda": "nccl", "xpu": "xccl"}.get(device().type)
    if world() > 1 and own is None and device().type != "cpu":
        raise DeviceError(
            f"{device().type} computes in one process; start one, or set TESSERA_DEVICE=cpu"
        )
    return f"cpu:gloo,{device().type}:{own}" if own else "gloo"


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


def broadcast(
    value: Any, source: int = 0, group: torch.distributed.ProcessGroup | None = None
) -> Any:
    """The main process's picklable object, or that of a group's first, in every process; source:
    another's, -1 the last's."""
    if world() == 1:
        return value
    import torch.distributed

    box = [value]
    size = torch.distributed.get_world_size(group)
    torch.distributed.broadcast_object_list(box, group=group, group_src=source % size)
    return box[0]


def gather(value: Any, group: torch.distributed.ProcessGroup | None = None) -> list[Any]:
    """The picklable object of every process, or of a group's, in each, in the order of ranks."""
    if world() == 1:
        return [value]
    import torch.distributed

    everyone: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(everyone, value, group)
    return everyone


def send(value: Tensor, to: int) -> torch.distributed.Work:
    """Begins to send a tensor, which must stay as it is until the answer's `wait` returns."""
    import torch.distributed

    work = torch.distributed.isend(value, to)
    assert work is not None
    return work


def receive(value: Tensor, source: int) -> Tensor:
    """`value`, filled with what another process sends."""
    import torch.distributed

    torch.distributed.recv(value, source)
    return value


def on_main(compute: Callable[[], T], group: torch.distributed.ProcessGroup | None = None) -> T:
    """What the main process computes, or a group's first, in every process; what it raises is
    raised in all of them."""
    if world() == 1:
        return compute()
    import torch.distributed

    found: tuple[T | None, Exception | None] = (None, None)
    if torch.distributed.get_rank(group) == 0:
        try:
            found = compute(), None
        except Exception as error:
            found = None, error
    if group is None:
        barrier()  # which waits longer than a broadcast does
    value, error = broadcast(found, group=group)
    if error is not None:
        raise error
    return value


def barrier(group: torch.distributed.ProcessGroup | None = None) -> None:
    """Returns when every process has called it; group: `saving_group` in the thread that saves."""
    if world() > 1:
        import torch.distributed

        torch.distributed.barrier(group or waiting_group())


def mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """A grid of all processes, for `fully_shard` and DTensor; one process is a grid, too."""
    return _mesh(device().type, shape, names)


@functools.cache
def _mesh(kind: str, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    import torch.distributed
    from torch.distributed.device_mesh import init_device_mesh

    if world() == 1 and not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(_backend(), store=store, rank=0, world_size=1)
    made = init_device_mesh(kind, shape, mesh_dim_names=names)
    for group in made.get_all_groups():  # they do not take after the job's
        torch.distributed.distributed_c10d._set_pg_timeout(timeout(), group)
    return made
