"""Tokens and heads spread over processes: what they exchange, and what the gradient of it is."""

from __future__ import annotations

from torch import Size, Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


def summed_gradient(weight: Tensor, mesh: DeviceMesh) -> Tensor:
    """A weight that each process applies to other tokens or heads; its gradient is their sum."""
    same = DTensor.from_local(weight, mesh, [Replicate()], run_check=False)
    return same.to_local(grad_placements=[Partial()])


def own_tokens(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """This process's part of `(B,T,C)` along T; the gradient is all processes', gathered."""
    same = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return same.redistribute(placements=[Shard(1)]).to_local()


def all_tokens(x: Tensor, length: int, mesh: DeviceMesh) -> DTensor:
    """`(B,T,C)` of the parts that the processes hold, T = `length`, the same in each.

    The gradient is scattered, and summed before where it comes in parts.
    """
    shape = Size((x.shape[0], length, x.shape[2]))
    stride = (length * shape[2], shape[2], 1)
    parts = DTensor.from_local(x, mesh, [Shard(1)], run_check=False, shape=shape, stride=stride)
    return parts.redistribute(placements=[Replicate()])
