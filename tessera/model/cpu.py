"""Products of a weight and many rows, by the faster of the CPU's two libraries.

    y = x Wᵀ + b;   dx = dy W;   dW = dyᵀ x;   db = Σ dy

torch multiplies float32 matrices with MKL, which keeps other vendors' AVX-512 chips to AVX2;
oneDNN, in the same wheel, does not: 240 against 107 GFLOP/s on one core of an EPYC. Everything
else (few rows, other types and devices, DTensors) is torch's own product. The choice is a rule
and no trial, so that equal machines give equal bits.

Operations with hand-written gradients that keep less for the backward pass than autograd does.

    rms_norm      keeps x and 1/rms    autograd, on a CPU, also x/rms: torch composes the norm there
    gated_down    keeps gate and up    autograd also silu(gate), and its product with up

What is not kept is an elementwise function of what is, and is made again. Together that is a third
of what a layer holds. Both are differentiable once; DTensors go autograd's way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

ONEDNN_FROM = 2**21  # multiply-adds; below, the longer call is not repaid


def prefers_onednn(weight: Tensor) -> bool:
    """Whether oneDNN multiplies this weight faster than MKL, given rows enough."""
    plain = type(weight) in (Tensor, nn.Parameter)
    plain = plain and weight.device.type == "cpu" and weight.dtype == torch.float32
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return plain and wide and torch.backends.mkldnn.is_available()


def _enough(x: Tensor, weight: Tensor) -> bool:
    return x.numel() * weight.shape[0] >= ONEDNN_FROM and x.dtype == weight.dtype


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` of x `(…, I)`, weight `(O, I)`, without a gradient."""
    if not (_enough(x, weight) and prefers_onednn(weight)):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    found = torch.ops.mkldnn._linear_pointwise.default(rows, weight, bias, "none", [], "")
    # As torch's own product does: nobody else holds `found`, and a view would be taken for one of
    # a tensor that lives on (FSDP warns of modules that return views).
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


def gated_down(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`(silu(gate)·up) @ weight.T + bias` of gate and up `(…, F)`, weight `(C, F)`."""
    if torch.is_grad_enabled():
        return _GatedDown.apply(gate, up, weight, bias)  # type: ignore[return-value]
    return multiply(F.silu(gate).mul_(up), weight, bias)
