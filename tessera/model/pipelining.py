"""Pipeline parallelism: each process holds some layers, and hidden states travel between them.

The first stage has the embedding, the last one the norm and the head. Every process reads its rows
itself, so that positions and documents need not travel.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed import P2POp, batch_isend_irecv, irecv, isend

from tessera.model.config import ModelConfig
from tessera.model.transformer import Transformer


@dataclass(frozen=True)
class Stage:
    """One of `count`; before, after: the processes that hold the layers around it, of its rows."""

    number: int
    count: int
    layers: range
    before: int
    after: int
    dtype: torch.dtype  # of hidden states

    @property
    def first(self) -> bool:
        return self.number == 0

    @property
    def last(self) -> bool:
        return self.number == self.count - 1


def split_layers(config: ModelConfig, stages: int) -> list[range]:
    """The layers of each stage, in order: the largest stage has as few parameters as can be, and
    none has none."""
    sizes = [sum(config.subblock_params(*one) for one in block) for block in config.blocks]
    for end in (0, -1):  # embedding and head
        sizes[end] += config.vocab_size * config.hidden_size
    until = [0, *itertools.accumulate(sizes)]

    @functools.cache
    def best(start: int, left: int) -> tuple[int, tuple[int, ...]]:
        """The size of the largest of the stages that are left, and where they begin."""
        if left == 1:
            return until[-1] - until[start], (start,)
        options = []
        for cut in range(start + 1, len(sizes) - left + 2):
            largest, begins = best(cut, left - 1)
            if until[cut] > until[start]:
                options.append((max(largest, until[cut] - until[start]), (start, *begins)))
        return min(options, default=(until[-1], (start,)))

    begins = best(0, stages)[1]
    return [range(*pair) for pair in itertools.pairwise((*begins, len(sizes)))]


def keep_stage(module: Transformer, stage: Stage) -> None:
    """Leave a module what belongs to a stage; names of parameters stay those of the whole model."""
    for layer in set(range(len(module.layers))) - set(stage.layers):
        module.layers[layer] = nn.Identity()
    if not stage.first:
        del module.embed_tokens
    if not stage.last:
        del module.norm, module.lm_head
    module.stage = stage


def receive(modules: Sequence[Transformer], tokens: Tensor) -> None:
    """Take in the hidden states of tokens `(B,T)` from the stage before."""
    _trade(_receiving([_room(module, tokens) for module in modules], modules))


def send(modules: Sequence[Transformer], states: Sequence[Tensor]) -> None:
    """Hand each model's hidden states to the stage after."""
    _trade(_sending(modules, states))


# What a stage that is not the last makes of a microbatch: each model's hidden states, and its part
# of the loss, if it has one.
Forward = Callable[[int], tuple[Sequence[Tensor], Tensor | None]]


def one_forward_one_backward(
    modules: Sequence[Transformer], tokens: Sequence[Tensor], forward: Forward
) -> None:
    """The first model's gradients of microbatches, of which at most as many are held as stages
    follow (1F1B). modules: that one, and frozen ones whose states it is compared with.

    forward: in the last stage it runs backward itself and gives no states.
    """
    stage = _stage(modules[0])
    held = deque[tuple[Tensor | None, Sequence[Tensor], Tensor | None]]()
    ahead = min(len(tokens), stage.count - stage.number - 1)
    into = [_room(module, tokens[0]) for module in modules]
    _trade(_receiving(into, modules))
    for number in range(len(tokens) + ahead):
        upwards: list[P2POp] = []
        downwards: list[P2POp] = []
        slope = None
        if number < len(tokens):
            states, loss = forward(number)
            held.append((into[0], states[:1], loss))
            upwards += _sending(modules, states)
        if number >= ahead and not stage.last:
            slope = torch.empty_like(held[0][1][0], memory_format=torch.contiguous_format)
            upwards.append(P2POp(irecv, slope, stage.after))
        _trade(upwards)
        if number >= ahead:
            before, states, loss = held.popleft()
            roots = [*states, *([] if loss is None else [loss])]
            torch.autograd.backward(roots, [slope, None][: len(roots)])
            if before is not None:
                assert before.grad is not None
                downwards.append(P2POp(isend, before.grad.contiguous(), stage.before))
        if number + 1 < len(tokens):
            into = [_room(module, tokens[number + 1]) for module in modules]
            downwards += _receiving(into, modules)
        _trade(downwards)


def _stage(module: Transformer) -> Stage:
    assert module.stage is not None
    return module.stage


def _room(module: Transformer, tokens: Tensor) -> Tensor | None:
    """Where hidden states of tokens `(B,T)` will be; None in the first stage."""
    stage, (rows, length) = _stage(module), tokens.shape
    if stage.first:
        return None
    if (mesh := module.tokens_mesh) is not None:  # as DTensor cuts a dimension
        part = -(-length // mesh.size())
        length = max(0, min(part, length - part * mesh.get_local_rank()))
    shape = rows, length, module.config.hidden_size
    return torch.empty(shape, dtype=stage.dtype, device=tokens.device)


def _receiving(into: Sequence[Tensor | None], modules: Sequence[Transformer]) -> list[P2POp]:
    """Each module reads what it gets next, and gradients reach that of the first."""
    operations = []
    for number, (module, state) in enumerate(zip(modules, into, strict=True)):
        if state is not None:
            operations.append(P2POp(irecv, state, _stage(module).before))
            module.incoming = state.requires_grad_(number == 0 and torch.is_grad_enabled())
    return operations


def _sending(modules: Sequence[Transformer], states: Sequence[Tensor]) -> list[P2POp]:
    after = _stage(modules[0]).after
    return [P2POp(isend, state.detach().contiguous(), after) for state in states]


def _trade(operations: list[P2POp]) -> None:
    """Both directions of a neighbour at once, so that neither waits for the other to be sent."""
    for work in batch_isend_irecv(operations) if operations else ():
        work.wait()
