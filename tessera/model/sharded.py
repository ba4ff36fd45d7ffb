"""Tensors that are spread over processes, in and out of files, never whole on any one of them.

A checkpoint is read by every process, each the rows that are its own (a tensor of a safetensors
file maps the file, so the rest is never touched). It is written by all of them: a tensor is
gathered, its file's owner keeps it, the others drop it, so a process holds its share of the model
and one tensor more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from tessera import dist


def is_sharded(module: nn.Module) -> bool:
    """True where parameters are spread over processes."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor's all values, in every process; each process calls this in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def place(tensor: Tensor, like: Tensor, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """A copy of this process's part of `tensor`, spread as `like` is; all of it for a plain one.

    dtype: None keeps the tensor's.
    """
    if not isinstance(like, DTensor):
        return tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)
    mesh, placements = like.device_mesh, like.placements
    shape, start = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    local = tensor[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
    local = local.to(
        device=device, dtype=dtype or tensor.dtype, copy=True, memory_format=torch.contiguous_format
    )
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=tensor.shape, stride=like.stride()
    )


def files_of(
    tensors: Mapping[str, Tensor], max_shard_bytes: int, at_least: int = 1
) -> list[list[str]]:
    """Names by file, in order: none larger than allowed unless one tensor is.

    at_least: files wanted, so that as many processes have something to write.
    """
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    limit = min(max_shard_bytes, -(-sum(sizes.values()) // at_least))
    files: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and files[-1]:
            files.append([])
            room = limit
        files[-1].append(name)
        room -= size
    return files


def collect(tensors: Mapping[str, Tensor], files: Sequence[Sequence[str]]) -> dict[int, dict]:
    """The files that this process writes: number -> its tensors, whole, on the CPU."""
    mine: dict[int, dict[str, Tensor]] = {}
    for number, names in enumerate(files):
        for name in names:
            tensor = whole(tensors[name].detach())
            if number % dist.world() == dist.rank():
                mine.setdefault(number, {})[name] = tensor.cpu()
    return mine
