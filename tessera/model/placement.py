"""Where a model lives, in what precision it computes, how it is spread: decided here alone.

device   of the job, or of the stage (`device` in its table): `dist.device()`
dtype    a stage's `dtype`; "auto" is bfloat16 on an accelerator and float32 on a CPU
spread   world = pipeline · replicate · shard · tensor
         rank = ((p · replicate + r) · shard + s) · tensor + t

Ranks that differ in r or s read different rows (data parallelism), or with `context` different
parts of a row: each `context` neighbours among them share their rows (context parallelism). Ranks
that differ in s hold different parts of every parameter, gradient and moment of what is trained;
those that differ in t hold different heads and channels of the same tokens, and between subblocks
different tokens; those that differ in p different layers.

A layout changes no result beyond rounding, so it is no part of a run's fingerprint; a dtype is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp import share_comm_ctx as share_streams

from tessera import dist
from tessera.model.checkpoint import Checkpoint, load_model
from tessera.model.config import ModelConfig
from tessera.model.parallel import held_params, split_model
from tessera.model.pipelining import Stage, keep_stage, split_layers
from tessera.model.placed import DtypeName
from tessera.model.placed import PlacedConfig as PlacedConfig
from tessera.model.source import load_config
from tessera.model.transformer import Checkpointing, Transformer
from tessera.runs.files import RunError

K = TypeVar("K")
T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LayoutError(RunError):
    """A layout that these processes or this model cannot have; the text says which can."""


PIPELINED = (
    "parallel.pipeline applies to stages that train on documents (parent, cpt, sft, kd); leave it "
    "at 1 here"
)


class ParallelConfig(BaseModel):
    """Where the parts of a model are. The defaults shard everything over all processes.

    tensor: processes that split each layer's heads and channels; neighbours on one machine.
    shard: processes that split the state; all that are left, unless given. Fewer of them (the
        GPUs of one machine) gather faster and hold copies of it.
    context: processes that share each row, a part of its tokens each, for rows whose activations
        do not fit one; every layer gathers the keys and values of the whole row.
    pipeline: stages of as many layers each as balance their parameters, for models that exceed a
        machine; `parent`, `cpt`, `sft` and `kd` train so.
    gradient_checkpointing: blocks run again in the backward pass, for less memory; "selective"
        keeps what attention and every second product gave.
    offload: parameters, gradients and moments stay in the machine's memory; the accelerator holds
        what is gathered for a block, and the CPU makes the update.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensor: int = Field(default=1, ge=1)
    shard: int | None = Field(default=None, ge=1)
    context: int = Field(default=1, ge=1)
    pipeline: int = Field(default=1, ge=1)
    gradient_checkpointing: Checkpointing = False
    offload: bool = False
    compile: bool = False  # torch.compile each block; for GPUs, a minute of compilation here


@dataclass(frozen=True)
class Layout:
    """Sizes of the dimensions, and where this process stands. context: see `ParallelConfig`."""

    replicate: int
    shard: int
    tensor: int
    rank: int
    context: int = 1
    pipeline: int = 1

    @classmethod
    def of(cls, config: ParallelConfig) -> Layout:
        """The layout of this job's processes. Raises LayoutError where they do not divide."""
        data = dist.world()
        for name in ("pipeline", "tensor"):
            if data % (size := getattr(config, name)):
                raise LayoutError(
                    f"parallel.{name} = {size} does not divide the {data} processes of "
                    f"{'a stage' if data < dist.world() else 'this job'}; it may be "
                    f"{_divisors(data)}"
                )
            data //= size
        shard = config.shard or data
        for name, size in (("shard", shard), ("context", config.context)):
            if data % size:
                raise LayoutError(
                    f"parallel.{name} = {size} does not divide the {data} processes that are left "
                    f"with tensor = {config.tensor}; it may be {_divisors(data)}"
                )
        return cls(
            data // shard, shard, config.tensor, dist.rank(), config.context, config.pipeline
        )

    @property
    def data_world(self) -> int:
        """How many processes read different rows."""
        return self.replicate * self.shard // self.context

    @property
    def data_rank(self) -> int:
        """Which of them this one is."""
        return self.rank // self.sharing % self.data_world

    @property
    def stage_world(self) -> int:
        """How many processes hold parts of one stage of a pipeline."""
        return self.replicate * self.shard * self.tensor

    def stage(self, config: ModelConfig, dtype: torch.dtype) -> Stage:
        """That of this process; dtype: of hidden states."""
        number = self.rank // self.stage_world
        layers = split_layers(config, self.pipeline)[number]
        around = self.rank - self.stage_world, self.rank + self.stage_world
        return Stage(number, self.pipeline, layers, *around, dtype)

    @property
    def leads(self) -> bool:
        """Whether it is the first of those with its rows, which writes for all of them."""
        return self.rank % self.sharing == 0

    @property
    def sharing(self) -> int:
        """How many processes have the same rows, one behind the other."""
        return self.tensor * self.context

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of work that any process may do; all of a tensor group have it."""
        return items[self.data_rank :: self.data_world]

    def title(self, label: str) -> str:
        """A label of the progress of this process's share."""
        return label if self.data_world == 1 else f"{label}, 1 of {self.data_world} shares"

    def share(self, count: int, compute: Callable[[int], T]) -> list[T]:
        """What `compute` returns of each index below `count`, in every process; each is computed by
        one tensor group."""
        found = self.joined({index: compute(index) for index in self.mine(range(count))})
        return [found[index] for index in range(count)]

    def joined(self, rows: dict[K, T]) -> dict[K, T]:
        """The entries of every process's dictionary, in every process."""
        if self.data_world == 1:
            return rows
        dist.barrier()  # which waits longer than a gathering does
        return {key: row for one in dist.gather(rows) for key, row in one.items()}

    def sum(self, value: Tensor, every_stage: bool = False) -> Tensor:
        """The sum over the data of all processes; those of a tensor group say the same thing, and
        of a pipeline the last stage is asked, or every one."""
        asked = every_stage or self.rank // self.stage_world == self.pipeline - 1
        total = dist.sum(value if asked else torch.zeros_like(value))
        return total if self.tensor == 1 else total / self.tensor

    def mesh(self) -> DeviceMesh:
        """The processes as a grid."""
        shape = self.pipeline, self.replicate, self.shard, self.tensor
        return dist.mesh(shape, ("pipeline", "replicate", "shard", "tensor"))

    def context_mesh(self) -> DeviceMesh:
        """The processes that share this one's rows."""
        shape = dist.world() // self.sharing, self.context, self.tensor
        return dist.mesh(shape, ("rows", "context", "tensor"))["context"]

    def data_mesh(self) -> DeviceMesh:
        """The part of the grid that FSDP shards over; two-dimensional where there are replicas."""
        mesh = self.mesh()
        return mesh["shard"] if self.replicate == 1 else mesh["replicate", "shard"]


ALONE = Layout(1, 1, 1, 0)


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


@dataclass(frozen=True)
class Placement:
    """A layout and the arithmetic that is wanted of it: all that placing a module takes.

    dtype: of the arithmetic. Parameters that are trained stay float32 between steps, and their
    gradients are reduced in float32, whatever it is; frozen ones are kept in it. shards: False
    keeps a whole model in every tensor group, which then computes without the others.
    """

    config: ParallelConfig = ParallelConfig()
    dtype: torch.dtype = torch.float32
    shards: bool = True

    @property
    def layout(self) -> Layout:
        return Layout.of(self.config)

    @property
    def tensor_mesh(self) -> DeviceMesh | None:
        """The processes that split heads and channels with this one, if there are others."""
        return self.layout.mesh()["tensor"] if self.config.tensor > 1 else None

    def needed(self, module: nn.Module) -> bool:
        """Whether FSDP is: not in one process that computes with the weights as it holds them."""
        frozen = not any(weight.requires_grad for weight in module.parameters())
        plain = (frozen or self.dtype == torch.float32) and not self.config.offload
        return self.shards and (dist.world() > 1 or not plain)

    def load(
        self,
        source: str | Path | Checkpoint,
        *,
        frozen: bool = False,
        beside: Transformer | None = None,
    ) -> Transformer:
        """A model from disk, placed; each process reads the parts that are its own.

        beside: a model of as many layers, of which the same are here.
        """
        dtype = self.dtype if frozen else torch.float32
        prepare = partial(self.transformer, beside=beside)
        device = dist.HOST if self.config.offload else dist.device()
        return load_model(source, frozen=frozen, dtype=dtype, device=device, prepare=prepare)

    def transformer(self, module: Transformer, beside: Transformer | None = None) -> Transformer:
        """The same module with its parameters spread over the processes."""
        if self.config.pipeline > 1:
            self._keep_stage(module, beside)
        for block in module.blocks:
            block.gradient_checkpointing = self.config.gradient_checkpointing
        self.split(module, module.config)
        if self.config.compile:
            for block in module.blocks:
                block.compile()
        if self.needed(module):
            for block in module.blocks:
                # Where nothing is sharded, to gather means to round: once a forward pass is enough.
                self._shard(block, reshard_after_forward=self.layout.shard > 1)
            self._shard(module, reshard_after_forward=False)
        return module

    def _keep_stage(self, module: Transformer, beside: Transformer | None) -> None:
        count, config = self.config.pipeline, module.config
        if config.tie_word_embeddings:
            raise LayoutError("parallel.pipeline needs a head of its own; this model's is tied")
        full = sum(any(config.subblock_params(*one) for one in block) for block in config.blocks)
        if count > full:
            raise LayoutError(
                f"parallel.pipeline = {count} is more than the {full} layers that have parameters"
            )
        stage = self.layout.stage(module.config, self.dtype) if beside is None else beside.stage
        assert stage is not None
        keep_stage(module, stage)

    def split(self, module: nn.Module, config: ModelConfig) -> None:
        """Gives each process of a tensor group its heads and channels of every subblock there."""
        if (mesh := self.tensor_mesh) is not None:
            split_model(module, config, mesh)

    def units(self, units: Iterable[nn.Module]) -> None:
        """Independent modules, each called on its own, spread over the data; processes of a tensor
        group have modules of their own."""
        plain = self.dtype == torch.float32 and not self.config.offload
        if self.layout.data_world > 1 or not plain:
            sharded = [self._shard(unit) for unit in units if any(True for _ in unit.parameters())]
            share_streams(sharded)

    def _shard(self, module: nn.Module, **settings: Any) -> FSDPModule:
        policy = MixedPrecisionPolicy(
            param_dtype=None if self.dtype == torch.float32 else self.dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # RoPE's frequencies stay float32
        )
        if self.config.offload:
            settings["offload_policy"] = CPUOffloadPolicy(
                pin_memory=dist.device().type != dist.HOST
            )
        sharded = fully_shard(module, mesh=self.layout.data_mesh(), mp_policy=policy, **settings)
        sharded.set_gradient_divide_factor(1.0)  # sums: the trainer divides
        sharded.set_force_sum_reduction_for_comms(True)
        return sharded


HERE = Placement()  # in one process, in float32


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that an optimizer steps, by name.

    After a forward pass FSDP leaves in their place what it gathered, which no gradient reaches.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    return {key: one for key, one in module.named_parameters() if one.requires_grad}


def inference_dtype(name: DtypeName = "auto") -> torch.dtype:
    """What a model computes in that is not trained; "auto" follows the device."""
    auto = "float32" if dist.device().type == dist.HOST else "bfloat16"
    return DTYPES[auto if name == "auto" else name]


def for_inference(
    *models: str | Path, dtype: DtypeName = "auto", tensor: int | None = None
) -> Placement:
    """Where models that are run together live: whole in each tensor group.

    tensor: processes of a group; the fewest whose memory holds the models, unless given. Raises
    LayoutError where they fit none.
    """
    number = inference_dtype(dtype)
    ways = tensor or _fewest([load_config(model) for model in models], number)
    return Placement(ParallelConfig(tensor=ways), number, shards=False)


def beside_training(
    model: str | Path, training: Placement, dtype: DtypeName = "auto", tensor: int | None = None
) -> Placement:
    """Where a copy for generation lives of a model that these processes train.

    dtype: "auto" is what the training computes in. tensor: as in `for_inference`, a multiple or a
    divisor of the processes that train on the same rows; the fewest that have room for it beside
    the state of training, and no fewer than the training's, unless given. Raises LayoutError.
    """
    if training.config.pipeline > 1:
        raise LayoutError(PIPELINED)
    number = training.dtype if dtype == "auto" else DTYPES[dtype]
    config, layout = load_config(model), training.layout
    held = TRAINED_BYTES * config.num_params() / (layout.shard * layout.tensor)
    held = 0.0 if training.config.offload else held
    ways = tensor or _fewest([config], number, layout.tensor, held)
    same = layout.tensor * layout.context
    if ways % same and same % ways:
        raise LayoutError(
            f"tensor = {ways} is neither a multiple nor a divisor of the {same} processes that "
            "train on the same rows (parallel.tensor · parallel.context); give one of them"
        )
    return Placement(ParallelConfig(tensor=ways), number, shards=False)


# Share of a device's memory that weights may take: the rest is for caches and activations.
ROOM = 0.7
TRAINED_BYTES = 12  # of a parameter and two moments; gradients come when the engine sleeps


def fewest(
    configs: Sequence[ModelConfig], size: int, world: int, room: float, least: int = 1
) -> int | None:
    """The fewest of `world` processes that hold these models together with `room` bytes each; None
    where none do. size: bytes a number. least: a divisor of them."""
    for ways in range(least, world + 1, least):
        divides = all(config.num_attention_heads % ways == 0 for config in configs)
        held = size * sum(held_params(config, ways) for config in configs)
        if world % ways == 0 and divides and held <= room:
            return ways
    return None


def _fewest(
    configs: Sequence[ModelConfig], dtype: torch.dtype, least: int = 1, held: float = 0
) -> int:
    """least: of them, a divisor. held: bytes that each process needs for other things."""
    memory, world = dist.device_memory(), dist.world()
    if memory is None:
        return least
    if (found := fewest(configs, dtype.itemsize, world, ROOM * memory - held, least)) is not None:
        return found
    needed = dtype.itemsize * sum(config.num_params() for config in configs)
    raise LayoutError(
        f"{needed / 1e9:.0f} GB of weights do not fit {world} devices of "
        f"{memory / 1e9:.0f} GB, of which {ROOM:.0%} are for weights; start more processes"
        + ("" if dtype == torch.bfloat16 else ' or set dtype = "bfloat16"')
    )
