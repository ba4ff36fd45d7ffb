"""How a model's parts are spread over processes: heads and channels, gathering, clipping.

Parameters that FSDP2 shards are gathered a block at a time, and the embedding, the last norm and
the head from the forward pass to the end of the backward. Blocks of any word shard alike: FSDP
splits dimension 0 of whatever parameters there are, `noop` has none.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from tessera.model.checkpoint import whole
from tessera.model.config import GQA, BlockConfig, ModelConfig, NoOp, SwiGLU, Variant
from tessera.model.context import Context
from tessera.model.layers import Attention, FeedForward, Subblock
from tessera.model.sequence import all_tokens, own_tokens
from tessera.model.transformer import Transformer


def split_model(module: nn.Module, config: ModelConfig, mesh: DeviceMesh) -> None:
    """Tensor parallelism (Megatron) of a model, or of parts that are put into one: columns in,
    rows out, an exchange before and after each subblock. What is split already stays as it is.

    A model that is trained is sequence-parallel too: between subblocks, a process holds the
    residual stream of its own part of the tokens, and norms see that part alone.
    """
    model = module if isinstance(module, Transformer) else None
    trained = model is not None and any(one.requires_grad for one in model.parameters())
    for part in module.modules():
        if isinstance(part, Subblock) and not isinstance(part.variant, NoOp):
            _split_heads_and_channels(part, config, mesh, trained)
    if model is not None and trained:
        model.tokens_mesh = mesh
        if model.stage is None or model.stage.last:
            model.norm.mesh = mesh


def _split_heads_and_channels(
    subblock: Subblock, config: ModelConfig, mesh: DeviceMesh, by_tokens: bool
) -> None:
    """What does not divide (`splits`) stays whole on every process, which then sees all tokens."""
    op, split = subblock.op, splits(config, subblock.variant, mesh.size())
    out = Shard(1) if by_tokens else Replicate()
    if any(isinstance(one, DTensor) for one in op.parameters()):
        return  # before, when it was part of another model
    if split:
        columns, row = ("qkv", "o") if isinstance(op, Attention) else (("gate", "up"), "down")
        plan: dict[str, ParallelStyle] = {f"{name}_proj": ColwiseParallel() for name in columns}
        plan[f"{row}_proj"] = RowwiseParallel(output_layouts=out)
        parallelize_module(op, mesh, plan, src_data_rank=None)  # each process has all of it
        if config.qk_norm and isinstance(op, Attention):  # every process has some of the heads
            op.q_norm.mesh = op.k_norm.mesh = mesh
    if by_tokens:
        subblock.norm.mesh = mesh

    def before(_: nn.Module, args: tuple[Tensor, Context]) -> tuple[Tensor, Context]:
        x, context = args
        if by_tokens:
            x = all_tokens(x, context.positions.shape[1], mesh)
        else:
            x = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
        # A product takes the DTensor, so that its gradients are summed once for all projections.
        return x if split else x.to_local(), context

    def after(_: nn.Module, args: object, x: Tensor) -> Tensor:
        if isinstance(op, FeedForward) and split:
            return _summed(x, op.down_proj, mesh, out)
        return own_tokens(x, mesh)

    if split or by_tokens:
        op.register_forward_pre_hook(before)
    if isinstance(op, FeedForward) if split else by_tokens:
        op.register_forward_hook(after)


def _summed(x: Tensor, down: nn.Linear, mesh: DeviceMesh, out: Placement) -> Tensor:
    """What the processes' channels give together (`gated_down`), with the bias."""
    parts = DTensor.from_local(x, mesh, [Partial()], run_check=False)
    whole = parts.redistribute(placements=[out]).to_local()
    if down.bias is None:
        return whole
    assert isinstance(down.bias, DTensor)
    return whole + down.bias.to_local(grad_placements=[Partial() if out.is_shard() else out])


def splits(config: ModelConfig, variant: Variant, ways: int) -> bool:
    """Whether a subblock's KV heads or channels divide."""
    match variant:
        case GQA(num_key_value_heads=heads):
            return heads % ways == 0
        case SwiGLU(intermediate_size=width):
            return width % ways == 0
        case _:
            return False


def split_params(config: ModelConfig, block: BlockConfig, ways: int) -> int:
    """Parameters of a block on one of `ways` tensor-parallel processes."""
    total, norm = 0, config.hidden_size
    for kind, variant in (("attention", block.attention), ("ffn", block.ffn)):
        whole = config.subblock_params(kind, variant)
        split = splits(config, variant, ways)
        total += norm + -(-(whole - norm) // ways) if split else whole
    return total


@functools.cache
def root_params(config: ModelConfig) -> int:
    """Embedding, last norm and head."""
    return config.num_params() - sum(
        config.subblock_params(kind, variant)
        for block in config.blocks
        for kind, variant in (("attention", block.attention), ("ffn", block.ffn))
    )


@functools.cache
def held_params(config: ModelConfig, tensor: int) -> int:
    """Parameters of a model on one tensor-parallel process, before shards."""
    return root_params(config) + sum(split_params(config, b, tensor) for b in config.blocks)


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


def sync_gradients(module: nn.Module, now: bool) -> None:
    """Whether the next backward pass reduces gradients and lets go of what was gathered; else both
    stay, summed in float32 and rounded, for the next microbatch. For modules that FSDP holds."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(now, recurse=False)
            part.set_reshard_after_backward(now, recurse=False)


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """The grid that a tensor is spread over, None for a plain one."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def tensor_group(module: Transformer) -> DeviceMesh | None:
    """The processes that hold a module together, as `Placement` splits it with `shards` off."""
    meshes = {mesh for one in module.parameters() if (mesh := mesh_of(one)) is not None}
    return next((mesh for mesh in meshes if mesh.mesh_dim_names == ("tensor",)), None)


def clip(
    parameters: Sequence[nn.Parameter], limit: float, stages: DeviceMesh | None = None
) -> Tensor:
    """Scale gradients to a norm of at most `limit` together; returns the norm they had.

    stages: the processes that hold a pipeline's other layers.
    """
    by_mesh: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh.setdefault(mesh_of(parameter.grad), []).append(parameter)
    norms = [
        whole(nn.utils.get_total_norm([p.grad for p in of_mesh if p.grad is not None]))
        for of_mesh in by_mesh.values()
    ]
    total = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    if stages is not None:
        squares = total.square()
        torch.distributed.all_reduce(squares, group=stages.get_group())
        total = squares.sqrt()
    for of_mesh in by_mesh.values():
        nn.utils.clip_grads_with_norm_(of_mesh, limit, total)
    return total
