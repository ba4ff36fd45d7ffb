"""How a model is spread over processes: FSDP2 shards, tensor parallelism, recomputation.

    world = replicate · shard · tensor       rank = (r · shard + s) · tensor + t

Ranks that differ in r or s read different rows (data parallelism); those that differ in s hold
different parts of every parameter, gradient and moment; those that differ in t hold different
heads and channels of the same rows. Parameters are gathered a block at a time, and the embedding,
the last norm and the head from the forward pass to the end of the backward. Blocks of any word
shard alike: FSDP splits dimension 0 of whatever parameters there are, `noop` has none.

A layout changes no result beyond rounding, so it is no part of a run's fingerprint. Losses are
sums and so are the gradients over ranks; dividing by the global weight is the trainer's work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp import share_comm_ctx as share_streams
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from tessera import dist
from tessera.model.checkpoint import load_model, whole
from tessera.model.config import GQA, ModelConfig, SwiGLU, Variant
from tessera.model.transformer import Block, Transformer
from tessera.runs.files import RunError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LayoutError(RunError):
    """A layout that these processes or this model cannot have; the text says which can."""


class ParallelConfig(BaseModel):
    """Where the parts of a model are. The defaults shard everything over all processes.

    tensor: processes that split each layer's heads and channels; neighbours on one machine.
    shard: processes that split the state; all that are left, unless given. Fewer of them (the
        GPUs of one machine) gather faster and hold copies of it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensor: int = Field(default=1, ge=1)
    shard: int | None = Field(default=None, ge=1)
    gradient_checkpointing: bool = False  # blocks run again in the backward: less memory, 4/3 time
    compile: bool = False  # torch.compile each block; for GPUs, a minute of compilation here


@dataclass(frozen=True)
class Layout:
    """Sizes of the three dimensions, and where this process stands."""

    replicate: int
    shard: int
    tensor: int
    rank: int

    @classmethod
    def of(cls, config: ParallelConfig) -> Layout:
        """The layout of this job's processes. Raises LayoutError where they do not divide."""
        world = dist.world()
        if world % config.tensor:
            raise LayoutError(
                f"parallel.tensor = {config.tensor} does not divide the {world} processes of this "
                f"job; it may be {_divisors(world)}"
            )
        data = world // config.tensor
        shard = config.shard or data
        if data % shard:
            raise LayoutError(
                f"parallel.shard = {shard} does not divide the {data} processes that are left with "
                f"tensor = {config.tensor}; it may be {_divisors(data)}"
            )
        return cls(data // shard, shard, config.tensor, dist.rank())

    @property
    def data_world(self) -> int:
        """How many processes read different rows."""
        return self.replicate * self.shard

    @property
    def data_rank(self) -> int:
        """Which of them this one is."""
        return self.rank // self.tensor

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the data of all processes; those of a tensor group say the same thing."""
        total = dist.sum(value)
        return total if self.tensor == 1 else total / self.tensor

    def mesh(self) -> DeviceMesh:
        """The processes as a grid."""
        shape = self.replicate, self.shard, self.tensor
        return dist.mesh(shape, ("replicate", "shard", "tensor"))

    def data_mesh(self) -> DeviceMesh:
        """The part of the grid that FSDP shards over; two-dimensional where there are replicas."""
        mesh = self.mesh()
        return mesh["shard"] if self.replicate == 1 else mesh["replicate", "shard"]


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


@dataclass(frozen=True)
class Spread:
    """A layout and the arithmetic that is wanted of it: all that spreading a module takes.

    dtype: of the arithmetic. Parameters that are trained stay float32 between steps, and their
    gradients are reduced in float32, whatever it is; frozen ones are kept in it.
    """

    config: ParallelConfig = ParallelConfig()
    dtype: torch.dtype = torch.float32

    @property
    def layout(self) -> Layout:
        return Layout.of(self.config)

    @property
    def needed(self) -> bool:
        """False where a plain module will do: one process that computes in float32."""
        return dist.world() > 1 or self.dtype != torch.float32

    def load(self, source: str | Path, *, frozen: bool = False) -> Transformer:
        """A model from disk, spread; each process reads the parts that are its own."""
        dtype = self.dtype if frozen else torch.float32
        return load_model(
            source, frozen=frozen, dtype=dtype, device=dist.device(), prepare=self.transformer
        )

    def transformer(self, module: Transformer) -> Transformer:
        """The same module with its parameters spread over the processes."""
        for block in module.blocks:
            block.gradient_checkpointing = self.config.gradient_checkpointing
        if self.config.tensor > 1:
            for block in module.blocks:
                split_heads_and_channels(block, module.config, self.layout.mesh()["tensor"])
        if self.config.compile:
            for block in module.blocks:
                block.compile()
        if self.needed:
            for block in module.blocks:
                self._shard(block)
            self._shard(module, reshard_after_forward=False)
        return module

    def units(self, units: Iterable[nn.Module]) -> None:
        """Independent modules, each called on its own, spread over the processes.

        Raises LayoutError for tensor parallelism: they are split over the data alone.
        """
        if self.config.tensor > 1:
            raise LayoutError(
                "parallel.tensor does not apply to block-wise distillation, whose units are small; "
                "leave it at 1"
            )
        if self.needed:
            sharded = [self._shard(unit) for unit in units if any(True for _ in unit.parameters())]
            share_streams(sharded)

    def _shard(self, module: nn.Module, **settings: Any) -> FSDPModule:
        policy = MixedPrecisionPolicy(
            param_dtype=None if self.dtype == torch.float32 else self.dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # RoPE's frequencies stay float32
        )
        sharded = fully_shard(module, mesh=self.layout.data_mesh(), mp_policy=policy, **settings)
        sharded.set_gradient_divide_factor(1.0)  # sums: the trainer divides
        sharded.set_force_sum_reduction_for_comms(True)
        return sharded


def split_heads_and_channels(block: Block, config: ModelConfig, mesh: DeviceMesh) -> None:
    """Tensor parallelism of one block (Megatron): columns in, rows out, one sum a subblock.

    What does not divide (`splits`) stays whole on every process.
    """
    plan: dict[str, Any] = {}
    if splits(config, block.attention.variant, mesh.size()):
        plan |= {f"attention.op.{p}_proj": ColwiseParallel() for p in "qkv"}
        plan["attention.op.o_proj"] = RowwiseParallel()
    if splits(config, block.ffn.variant, mesh.size()):
        plan |= {f"ffn.op.{p}_proj": ColwiseParallel() for p in ("gate", "up")}
        plan["ffn.op.down_proj"] = RowwiseParallel()
    if plan:
        parallelize_module(block, mesh, plan)


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
