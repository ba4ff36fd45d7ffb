"""All tuning for CPUs: which library multiplies, and operations that keep less for backward.

torch multiplies float32 matrices with MKL, which limits other vendors' AVX-512 chips to AVX2;
oneDNN, in the same wheel, does not: 240 against 107 GFLOP/s on one core of an EPYC.
`prefers_onednn` is a rule and no trial, so that equal machines give equal bits. Everything here is
differentiable once.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

ONEDNN_FROM = 2**21  # multiply-adds; below, oneDNN's longer call is not repaid
# The same for a weight that oneDNN has reordered once: 8 us more than MKL a call, but it reads such
# a weight from memory 1.1 to 1.5 times as fast.
REORDERED_FROM = 2**18
TILE = 2**18  # elements that stay in a core's L2 while several operations go over them
SHORTEST = 32  # queries of a tile of attention


def keep_freed_memory() -> None:
    """Have glibc hand out again what was freed, up to its limit of 32 MiB an allocation.

    It would return it to the kernel, which clears every page of it at the next use: a tenth of a
    step's time. Other C libraries do as they do.
    """
    with suppress(AttributeError, OSError, TypeError):
        tune = ctypes.CDLL(None).mallopt
        tune(-1, -1)  # M_TRIM_THRESHOLD: never
        tune(-3, 2**25)  # M_MMAP_THRESHOLD


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
    return max(1, TILE // width) if device.type == "cpu" else rows


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


class _RMSNormByTiles(torch.autograd.Function):
    """That of half precision: in float32, some rows at a time, which stay in a core's cache."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float):  # type: ignore[override]
        out, rows = torch.empty_like(x), x.reshape(-1, x.shape[-1])
        inverse, scale = torch.empty(len(rows), 1, device=x.device), weight.float()
        for at in row_tiles(rows):
            own = rows[at].float()
            torch.rsqrt(own.square().mean(-1, keepdim=True).add_(eps), out=inverse[at])
            out.view_as(rows)[at] = own.mul_(inverse[at]).mul_(scale)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        """As `_RMSNorm.backward`."""
        x, weight, inverse = ctx.saved_tensors
        rows, slopes = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        scale = weight.float()
        d_rows, dw = torch.empty_like(rows), torch.zeros_like(scale)
        for at in row_tiles(rows):
            normed, slope = rows[at].float().mul_(inverse[at]), slopes[at].float()
            along = slope * normed
            dw += along.sum(0)
            slope.mul_(scale).sub_(normed.mul_(along.mul_(scale).mean(-1, keepdim=True)))
            d_rows[at] = slope.mul_(inverse[at])
        return d_rows.view_as(x), dw.to(weight.dtype), None


class _RoPE(torch.autograd.Function):
    """x `(N, heads, D)` rotated by `(N, 1, D)` angles, in float32, some rows at a time."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor):  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out, half = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.shape[-1] // 2
    for at in row_tiles(x):
        own = x[at].float()
        turned = torch.cat((-own[..., half:], own[..., :half]), -1)
        out[at] = own.mul_(cos[at]).addcmul_(turned, sin[at])
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x `(B, T, heads, D)` rotated by the angles of cos and sin `(B, T, 1, D)`."""
    cos, sin = (one.expand(*x.shape[:2], 1, -1).flatten(0, 1) for one in (cos, sin))
    return _RoPE.apply(x.flatten(0, 1), cos, sin).view_as(x)  # type: ignore[union-attr]


def row_tiles(rows: Tensor) -> Iterator[slice]:
    """Slices along the first dimension, of some `TILE` elements."""
    size = max(1, TILE * len(rows) // max(1, rows.numel()))
    return (slice(at, at + size) for at in range(0, len(rows), size))


def by_tiles(x: Tensor) -> bool:
    """Whether x is of half precision on a CPU, where operations over tiles that are float32 are
    fewer and faster than torch's."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not isinstance(x, DTensor)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x²) + eps) * weight` of x `(…, C)`; a GPU has one kernel for it."""
    plain = not isinstance(x, DTensor) and not isinstance(weight, DTensor)
    if plain and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32:
        return _RMSNorm.apply(x, weight, eps)  # type: ignore[return-value]
    if plain and by_tiles(x):
        return _RMSNormByTiles.apply(x, weight, eps)  # type: ignore[return-value]
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


class _TiledAttention(torch.autograd.Function):
    """Attention of q `(N, T·G, D)`, scaled, over k and v `(N, S, D)`: a tile of scores at a time.

    G queries share a KV head. Without `seen` `(N, T, S)` a query sees the keys up to its own, which
    stand at the end. torch's flash kernel takes bfloat16 at 34 GFLOP/s, less than float32; these
    products run at ten times that, and their scores, rounded to bfloat16, never leave the cache.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, queries: int, seen: Tensor | None):  # type: ignore[override]
        ctx.save_for_backward(q, k, v, seen)
        ctx.queries, out = queries, torch.empty_like(q)
        for own, rows, keys, scores in _score_tiles(q, k, queries, seen):
            torch.bmm(scores, v[own, keys], out=out[own, rows])
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        q, k, v, seen = ctx.saved_tensors
        grad, d_q = grad.contiguous(), torch.empty_like(q)
        d_k, d_v = torch.zeros_like(k), torch.zeros_like(v)
        for own, rows, keys, scores in _score_tiles(q, k, ctx.queries, seen):
            slope = torch.bmm(grad[own, rows], v[own, keys].transpose(1, 2))
            d_v[own, keys].baddbmm_(scores.transpose(1, 2), grad[own, rows])
            slope = torch.ops.aten._softmax_backward_data(slope, scores, -1, slope.dtype)
            torch.bmm(slope, k[own, keys], out=d_q[own, rows])
            d_k[own, keys].baddbmm_(slope.transpose(1, 2), q[own, rows])
        return d_q, d_k, d_v, None, None


def _score_tiles(
    q: Tensor, k: Tensor, queries: int, seen: Tensor | None
) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Softmaxes of scores, at most about `TILE` of them: of which heads, rows of q, and keys."""
    length, group = k.shape[1], q.shape[1] // queries
    at_once = max(1, TILE // (q.shape[1] * length))
    size = min(queries, max(SHORTEST, TILE // (group * length)))
    # -inf above the diagonal, of queries that share a KV head side by side
    future = q.new_full((size, size), -torch.inf).triu_(1)[:, None]
    for first in range(0, len(q), at_once):
        own = slice(first, min(first + at_once, len(q)))
        for start in range(0, queries, size):
            stop = min(start + size, queries)
            last = length if seen is not None else length - queries + stop
            rows, keys = slice(start * group, stop * group), slice(0, last)
            scores = torch.bmm(q[own, rows], k[own, keys].transpose(1, 2))
            tile = scores.view(-1, stop - start, group, last)
            if seen is None:
                tile[..., last - (stop - start) :] += future[: stop - start, :, : stop - start]
            else:
                tile.masked_fill_(~seen[own, start:stop, None], -torch.inf)
            yield own, rows, keys, torch.softmax(scores, -1)


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float | None) -> Tensor:
    """SDPA of q `(B,T,H,D)`, k and v `(B,S,K,D)`, seen `(B or 1, 1, T, S)` or `(T, S)` -> as q.
    None: causal, the queries last."""
    (rows, count, heads, dim), (length, shared) = q.shape, k.shape[1:3]
    q = q * (dim**-0.5 if scale is None else scale)
    q = q.view(rows, count, shared, -1, dim).transpose(1, 2).reshape(rows * shared, -1, dim)
    k, v = (x.transpose(1, 2).reshape(rows * shared, length, dim) for x in (k, v))
    if seen is not None:
        seen = seen.expand(rows, shared, count, length).reshape(-1, count, length)
    out = _TiledAttention.apply(q, k, v, count, seen)
    out = out.view(rows, shared, count, heads // shared, dim).transpose(1, 2)  # type: ignore[union-attr]
    return out.reshape(rows, count, heads, dim)


def gated_down(gate: Tensor, up: Tensor, down: nn.Linear) -> Tensor:
    """`down(silu(gate)·up)` of gate and up `(…, F)`; of a process's channels, where they are split,
    its part of the sum, without the bias."""
    weight, bias = down.weight, down.bias
    if isinstance(weight, DTensor):
        weight, bias = weight.to_local(), None
    if torch.is_grad_enabled():
        return _GatedDown.apply(gate, up, weight, bias)  # type: ignore[return-value]
    return multiply(F.silu(gate).mul_(up), weight, bias)
