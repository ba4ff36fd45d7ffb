"""How a model's parts are spread over processes: heads and channels, gathering, clipping.

Parameters that FSDP2 shards are gathered a block at a time, and the embedding, the last norm and
the head from the forward pass to the end of the backward. Blocks of any word shard alike: FSDP
splits dimension 0 of whatever parameters there are, `noop` has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from tessera.model.checkpoint import whole
from tessera.model.config import GQA, ModelConfig, SwiGLU, Variant
from tessera.model.layers import Subblock

PROJECTIONS = {GQA: ("qkv", "o"), SwiGLU: (("gate", "up"), "down")}  # columns; rows


def split_heads_and_channels(subblock: Subblock, config: ModelConfig, mesh: DeviceMesh) -> None:
    """Tensor parallelism of one subblock (Megatron): columns in, rows out, one sum.

    What does not divide (`splits`) stays whole on every process.
    """
    if splits(config, subblock.variant, mesh.size()):
        columns, rows = PROJECTIONS[type(subblock.variant)]
        plan: dict[str, Any] = {f"{name}_proj": ColwiseParallel() for name in columns}
        plan[f"{rows}_proj"] = RowwiseParallel()
        parallelize_module(subblock.op, mesh, plan, src_data_rank=None)  # each has all of it


def splits(config: ModelConfig, variant: Variant, ways: int) -> bool:
    """Whether a subblock's KV heads or channels divide, and no norm stands inside each head."""
    match variant:
        case GQA(num_key_value_heads=heads):
            return heads % ways == 0 and not config.qk_norm
        case SwiGLU(intermediate_size=width):
            return width % ways == 0
        case _:
            return False


@contextmanager
def gathered(*modules: nn.Module) -> Iterator[None]:
    """While the body runs, the modules' own sharded parameters are whole; others are as they are.

    What FSDP does around a call, for code that reads weights or calls a part of a module.
    """
    sharded = [module for module in modules if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """The grid that a tensor is spread over, None for a plain one."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def clip(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients to a norm of at most `limit` together; returns the norm they had."""
    by_mesh: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh.setdefault(mesh_of(parameter.grad), []).append(parameter)
    norms = [
        whole(nn.utils.get_total_norm([p.grad for p in of_mesh if p.grad is not None]))
        for of_mesh in by_mesh.values()
    ]
    total = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    for of_mesh in by_mesh.values():
        nn.utils.clip_grads_with_norm_(of_mesh, limit, total)
    return total
