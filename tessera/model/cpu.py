"""All tuning for CPUs: which library multiplies, and operations that keep less for backward.

torch multiplies float32 matrices with MKL, which limits other vendors' AVX-512 chips to AVX2;
oneDNN, in the same wheel, does not: 240 against 107 GFLOP/s on one core of an EPYC.
`prefers_onednn` is a rule and no trial, so that equal machines give equal bits. Everything here is
differentiable once.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

ONEDNN_FROM = 2**21  # multiply-adds; below, oneDNN's longer call is not repaid
# The same for a weight that oneDNN has reordered once: 8 us more than MKL a call, but it reads such
# a weight from memory 1.1 to 1.5 times as fast.
REORDERED_FROM = 2**18
CACHED = 2**19  # float32 numbers that a core's cache holds, with some copies of them


def prefers_onednn(weight: Tensor) -> bool:
    """Whether oneDNN multiplies this weight faster than MKL, given rows enough."""
    plain = type(weight) in (Tensor, nn.Parameter)
    plain = plain and weight.device.type == "cpu" and weight.dtype == torch.float32
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return plain and wide and torch.backends.mkldnn.is_available()


def onednn_rows(weight: Tensor) -> int:
    """From how many rows on `onednn_product` of the reordered weight beats `torch.mm`.

    In bfloat16 always, as there `torch.mm` calls oneDNN too, and reorders the weight each time.
    """
    half = weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    if half and torch.backends.mkldnn.is_available():
        return 1 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else sys.maxsize
    if not prefers_onednn(weight):
        return sys.maxsize
    return -(-REORDERED_FROM // weight.numel())


def rows_together(rows: int, width: int, device: torch.device) -> int:
    """How many of so many float32 rows are to be worked on at once: on a CPU what its caches hold,
    as several passes over more of them take up to eight times as long."""
    return max(1, CACHED // width) if device.type == "cpu" else rows


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` of x `(N, I)`, weight `(O, I)` or what `reordered` returns for it."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def reordered(weight: Tensor) -> Tensor:
    """The weight in oneDNN's own order, for `onednn_product` alone."""
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def _enough(x: Tensor, weight: Tensor) -> bool:
    return x.numel() * weight.shape[0] >= ONEDNN_FROM and x.dtype == weight.dtype


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` of x `(…, I)`, weight `(O, I)`, without a gradient."""
    if not (_enough(x, weight) and prefers_onednn(weight)):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    found = onednn_product(rows, weight, bias)
    # A plain view would make FSDP warn of a module that returns a view; nobody else holds `found`.
    return torch.ops.aten._unsafe_view(found, (*x.shape[:-1], len(weight)))


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None):  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return multiply(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            multiply(grad, weight.t()) if needs_x else None,
            multiply(rows.t(), x.reshape(-1, x.shape[-1]).t()) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` of x `(…, I)`, weight `(O, I)`, differentiable once."""
    if torch.is_grad_enabled() and _enough(x, weight) and prefers_onednn(weight):
        return _Multiply.apply(x, weight, bias)  # type: ignore[return-value]
    return F.linear(x, weight, bias) if torch.is_grad_enabled() else multiply(x, weight, bias)


class Projection(nn.Linear):
    """`nn.Linear` that multiplies with the faster library."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _RMSNorm(torch.autograd.Function):
    """Keeps x and 1/rms; autograd on a CPU composes the norm and keeps x/rms too."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float):  # type: ignore[override]
        inverse = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        """dx = (g - n mean(g n)) / rms with n = x / rms and g = grad·weight; dw = Σ grad·n."""
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        needs_x, needs_weight, _ = ctx.needs_input_grad
        slope = grad * normed
        dw = slope.flatten(0, -2).sum(0) if needs_weight else None
        if not needs_x:
            return None, dw, None
        along = slope.mul_(weight).mean(-1, keepdim=True)
        return (grad * weight).sub_(normed.mul_(along)).mul_(inverse), dw, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x²) + eps) * weight` of x `(…, C)`; a GPU has one kernel for it."""
    plain = not isinstance(x, DTensor) and not isinstance(weight, DTensor)
    if plain and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32:
        return _RMSNorm.apply(x, weight, eps)  # type: ignore[return-value]
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


class _GatedDown(torch.autograd.Function):
    """Keeps gate and up; autograd also silu(gate) and its product with up, made again here."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None):  # type: ignore[override]
        ctx.save_for_backward(gate, up, weight)
        return multiply(F.silu(gate).mul_(up), weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        gate, up, weight = ctx.saved_tensors
        needs_gate, needs_up, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        silu = F.silu(gate)
        inner = (silu * up).flatten(0, -2) if needs_weight else None
        dw = None if inner is None else multiply(rows.t(), inner.t())
        d_gate = d_up = None
        if needs_gate or needs_up:
            d_inner = multiply(grad, weight.t())
            d_up = silu.mul_(d_inner)
            d_gate = torch.ops.aten.silu_backward(d_inner.mul_(up), gate)
        return d_gate, d_up, dw, rows.sum(0) if needs_bias else None


def gated_down(gate: Tensor, up: Tensor, down: nn.Linear) -> Tensor:
    """`down(silu(gate)·up)` of gate and up `(…, F)`; of a process's channels, where they are split,
    its part of the sum, without the bias."""
    weight, bias = down.weight, down.bias
    if isinstance(weight, DTensor):
        weight, bias = weight.to_local(), None
    if torch.is_grad_enabled():
        return _GatedDown.apply(gate, up, weight, bias)  # type: ignore[return-value]
    return multiply(F.silu(gate).mul_(up), weight, bias)
