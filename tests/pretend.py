"""A device that computes on the CPU and, like a GPU, refuses tensors that are not its own.

It sees tensors and random generators left on the CPU, numpy views of the device's tensors, and
float64 where it pretends to have none, as MPS; in every thread that is started meanwhile. It
cannot see kernels and what they lack for a dtype or a shape, streams and waiting for them, memory,
several processes, nor indices on the CPU and numbers of no dimension, which GPUs take, too.
A process that uses it must not have run a backward before, so tests start one of its own.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
OPERATIONS = [0]  # on the device, so far
REFUSED: set[torch.dtype] = set()  # dtypes that it does not have
# Moves between devices, and places that a GPU takes from the CPU.
_TO_CPU = {"aten::_to_copy", "aten::copy_", "aten::_local_scalar_dense"}
_TO_CPU |= {"aten::index.Tensor", "aten::index_put_", "aten::index", "aten::_index_put_impl_"}


class PlacementError(RuntimeError):
    """An operation that a real device would refuse."""


class PretendTensor(torch.Tensor):
    """A tensor of the device; `held` is where its numbers are."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> PretendTensor:
        if held.dtype in REFUSED:
            raise PlacementError(f"{NAME} has no {held.dtype}")
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device(),
            requires_grad=False,
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PretendTensor({self.held!r})"

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()  # which FSDP frees and makes again

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return _run(function, args, kwargs or {})


def _indices(index: Any) -> Any:
    """Lists of numbers as tensors, which torch makes of them out of sight."""
    if isinstance(index, tuple):
        return tuple(map(_indices, index))
    return torch.tensor(index) if isinstance(index, list) else index


class _Mode(TorchDispatchMode):
    """Sees the calls that make tensors there, which have no tensor to dispatch on."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if any(issubclass(one, DTensor) for one in types):  # what it holds comes here again
            return function(*args, **kwargs or {})
        return _run(function, args, kwargs or {})


class _FromData(TorchFunctionMode):
    """Tensors made of Python's numbers are filled outside of the dispatcher."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.tolist and isinstance(args[0], PretendTensor):
            return args[0].held.tolist()
        if function is torch.Tensor.numpy and isinstance(args[0], PretendTensor):
            raise TypeError(f"numpy cannot see a tensor on {NAME}; call .cpu() first")
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            return function(args[0], _indices(args[1]), *args[2:])
        if function not in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            return function(*args, **kwargs)
        target = kwargs.pop("device", None)
        there = target is not None and torch.device(target).type == NAME
        if function is torch.Tensor.new_tensor:
            there = there or (target is None and isinstance(args[0], PretendTensor))
            kwargs.setdefault("dtype", args[0].dtype)
            function, args = torch.tensor, args[1:]
        if isinstance(args[0], torch.Tensor):
            return args[0].to(target or args[0].device, kwargs.get("dtype"))
        made = function(*args, **kwargs)
        return PretendTensor(made) if there else made


class _Stream:
    """Work is done when it is asked for: there is nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def synchronize(self, *_: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def record_event(self, *_: Any) -> _Stream:
        return self


@functools.cache
def device() -> torch.device:
    _setup_privateuseone_for_python_backend(NAME)
    module = getattr(torch, NAME)  # torch.cuda's part that saving, FSDP and checkpointing ask for
    module.Stream = module.Event = _Stream
    module.current_stream = _Stream
    module.stream = lambda _: nullcontext()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    return torch.device(NAME, 0)


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves, _ = tree_flatten((args, kwargs))
    tensors = [one for one in leaves if isinstance(one, torch.Tensor)]
    ours = [one for one in tensors if isinstance(one, PretendTensor)]
    target = kwargs.get("device")
    asked = target is not None and torch.device(target).type == NAME
    name = function._schema.name
    if ours and name not in _TO_CPU:
        for one in tensors:
            if not isinstance(one, PretendTensor) and one.dim():
                raise PlacementError(
                    f"{name} got a CPU tensor {tuple(one.shape)} beside one on {NAME}"
                )
    if (ours or asked) and any(isinstance(one, torch.Generator) for one in leaves):
        raise PlacementError(f"{name} got a generator of the CPU on {NAME}")
    if asked:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs.pop("pin_memory", None)
    leaves, shape = tree_flatten((args, kwargs))
    held = [one.held if isinstance(one, PretendTensor) else one for one in leaves]
    plain_args, plain_kwargs = tree_unflatten(held, shape)
    out = function(*plain_args, **plain_kwargs)
    there = asked if target is not None else bool(ours)
    OPERATIONS[0] += bool(ours)
    if name == "aten::copy_":
        return args[0]
    if not there:
        return out
    known = {id(one.held): one for one in ours}
    return tree_map(
        lambda one: (
            known.get(id(one), PretendTensor(one))
            if isinstance(one, torch.Tensor) and not isinstance(one, PretendTensor)
            else one
        ),
        out,
    )


@contextmanager
def pretended(float64: bool = True) -> Iterator[None]:
    """The device, for the block and threads started in it: `tessera.dist.device()` is it."""
    from tessera import dist

    before = dist.device, dist.widest_float, threading.Thread.start
    dist.device = device
    threading.Thread.start = _start  # type: ignore[assignment]
    if not float64:
        dist.widest_float = lambda of=None: (
            torch.float32 if (of or device()).type == NAME else torch.float64
        )
        REFUSED.update((torch.float64, torch.complex128))
    try:
        with _there():
            yield
    finally:
        dist.device, dist.widest_float, threading.Thread.start = before
        REFUSED.clear()


@contextmanager
def _there() -> Iterator[None]:
    """This thread's calls are seen: torch's modes are of one thread."""
    with sdpa_kernel(SDPBackend.MATH), _FromData(), _Mode():
        yield


_START = threading.Thread.start


def _start(thread: threading.Thread) -> None:
    run = thread.run

    def seen() -> None:
        with _there():
            run()

    thread.run = seen  # type: ignore[method-assign]
    _START(thread)
