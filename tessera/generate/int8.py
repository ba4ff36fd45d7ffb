"""Products with int8 weights, on a CPU whose int8 dot products are exact (VNNI).

    W ≈ diag(s) Q, s a row;   x ≈ a X, a an input row;   y = a s (X Qᵀ), X Qᵀ in int32

Symmetric, weights by output channel once, activations by row at each call, so that a row's
product does not depend on its batch mates. A quarter of the memory, and of the bytes a small batch
streams. Products of both in int8 beat weight-only ones: torch's `_weight_int8pack_mm` took 4 to 27
times as long as float32 (a float32 `mm`, AVX-512, one thread). Outliers in activations cost
precision that weight-only int8 keeps (Dettmers et al. 2022, LLM.int8()).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tessera.generate.engine import GenerationError

# Below this many weights, quantising the activations takes what the product saves: at 2**20 a
# single row takes 1.16 times as long as in float32 and 8 rows 0.66, at 2**22 0.45 and 0.30.
INT8_FROM = 2**20


class Int8Matrix:
    """`x @ weight.T + bias`: x `(N,I)`, weight `(O,I)`, the product in int8."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        largest = weight.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
        quantised = (weight * (127 / largest)).round_().to(torch.int8)
        self.scale = (largest[:, 0] / 127).contiguous()
        self.zero = torch.zeros(len(weight), dtype=torch.int32)
        self.packed = torch.ops.onednn.qlinear_prepack(quantised.contiguous(), None)

    def __call__(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
        # oneDNN wants unsigned activations, and takes 128 off again.
        rows = (x * (127 / largest)).round_().add_(128).to(torch.uint8)
        y = _product(rows, self.packed, self.scale, self.zero).mul_(largest / 127)
        return y if self.bias is None else y.add_(self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """`residual += x @ weight.T + bias`, in place."""
        residual.add_(self(x))


def _product(rows: Tensor, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """`(rows - 128) @ packed * scale` in float32; the sums are of integers."""
    pointwise = torch.ops.onednn.qlinear_pointwise.default
    return pointwise(
        rows, 1.0, 128, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )


@functools.cache
def _exact() -> bool:
    """Whether extreme values multiply exactly: without VNNI, sums of pairs saturate at 16 bits."""
    if not torch.backends.mkldnn.is_available():
        return False
    packed = torch.ops.onednn.qlinear_prepack(torch.full((16, 64), 127, dtype=torch.int8), None)
    rows = torch.full((2, 64), 255, dtype=torch.uint8)
    ones, zeros = torch.ones(16), torch.zeros(16, dtype=torch.int32)
    return bool((_product(rows, packed, ones, zeros) == 127 * 127 * 64).all())


def check_int8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise GenerationError where int8 weights cannot be used."""
    if device.type != "cpu" or dtype != torch.float32:
        raise GenerationError(
            f"int8 weights are for float32 on a CPU, and this model is {dtype} on {device}: "
            "leave int8 off, or export to a format that the serving engine quantises"
        )
    if not _exact():
        raise GenerationError(
            "int8 weights need a CPU with exact int8 dot products (AVX-512 VNNI or AVX-VNNI) and "
            "a torch with oneDNN; leave int8 off here"
        )
