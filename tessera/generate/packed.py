"""The decode-time form of a Transformer: the same function in the fewest kernels.

    h = x / |x|;   q k v = rotate(h Wqkv);   x += attend(q, k, v) Wo
    h = x / |x|;   g u = h Wgu;              x += (silu(g) u) Wd

A small batch is bound by kernel launches, so whatever does not depend on the tokens is folded into
the weights. A snapshot: it shares no memory with its module.

The processes of a tensor group hold some heads and channels each, and sum what Wo and Wd return;
the embedding, the head and words that do not divide are whole in each of them. A module whose
parameters are spread otherwise is read one parameter at a time.
"""

from __future__ import annotations

import functools
import sys
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tessera.generate.engine import GenerationError
from tessera.generate.sampling import Chosen
from tessera.model.checkpoint import whole
from tessera.model.config import NoOp
from tessera.model.cpu import keep_freed_memory, onednn_product, onednn_rows, reordered
from tessera.model.layers import Attention, FeedForward, LinearMap, Subblock
from tessera.model.parallel import splits, tensor_group
from tessera.model.placement import Placement
from tessera.model.transformer import Transformer

# Below this many weights, quantising the activations takes what the product saves: at 2**20 a
# single row takes 1.16 times as long as in float32 and 8 rows 0.66, at 2**22 0.45 and 0.30.
INT8_FROM = 2**20


class Matrix:
    """`x @ weight.T + bias`: x `(N,I)`, weight `(O,I)`."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        self.transposed = weight.t()
        self.onednn_rows = onednn_rows(weight)
        if self.onednn_rows < sys.maxsize:
            self.blocked = reordered(weight)
            # Left for few rows, if any; for those, (I, O) order streams faster than (O, I).
            few = self.transposed[:, : weight.shape[0] if self.onednn_rows > 1 else 0]
            self.transposed = few.clone(memory_format=torch.contiguous_format)  # never a view

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] >= self.onednn_rows:
            return onednn_product(x, self.blocked, self.bias)
        if self.bias is None:
            return torch.mm(x, self.transposed)
        return torch.addmm(self.bias, x, self.transposed)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """`residual += x @ weight.T + bias`, in place."""
        if x.shape[0] >= self.onednn_rows:
            residual.add_(onednn_product(x, self.blocked, self.bias))
            return
        residual.addmm_(x, self.transposed)
        if self.bias is not None:
            residual.add_(self.bias)


class Int8Matrix:
    """`Matrix` with the product in int8, on a CPU whose int8 dot products are exact (VNNI).

        W ≈ diag(s) Q, s a row;   x ≈ a X, a an input row;   y = a s (X Qᵀ), X Qᵀ in int32

    Symmetric; activations are rounded by row, so that a row's product is its own. Outliers in them
    cost precision (Dettmers et al. 2022, LLM.int8()). torch's weight-only `_weight_int8pack_mm`
    took 4 to 27 times as long as float32 (AVX-512, one thread).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias, weight = bias, weight.float()
        largest = weight.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
        quantised = (weight * (127 / largest)).round_().to(torch.int8)
        self.scale = (largest[:, 0] / 127).contiguous()
        self.zero = torch.zeros(len(weight), dtype=torch.int32)
        self.packed = torch.ops.onednn.qlinear_prepack(quantised.contiguous(), None)

    def __call__(self, x: Tensor) -> Tensor:
        dtype, x = x.dtype, x.float()
        largest = x.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
        # oneDNN wants unsigned activations, and takes 128 off again.
        rows = (x * (127 / largest)).round_().add_(128).to(torch.uint8)
        y = _product(rows, self.packed, self.scale, self.zero).mul_(largest / 127)
        return (y if self.bias is None else y.add_(self.bias)).to(dtype)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        residual.add_(self(x))


def _product(rows: Tensor, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """`(rows - 128) @ packed * scale` in float32; the sums are of integers."""
    more = (None, 1.0, 0, torch.float32, "none", [], "")
    return torch.ops.onednn.qlinear_pointwise.default(rows, 1.0, 128, packed, scale, zero, *more)


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
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        raise GenerationError(
            f"int8 weights are for a CPU, and this model is {dtype} on {device.type}: say device "
            "cpu and dtype float32 or bfloat16, or leave int8 off"
        )
    if not _exact():
        raise GenerationError(
            "int8 weights need AVX-512 VNNI or AVX-VNNI and a torch with oneDNN: leave int8 off"
        )


class Pass(Protocol):
    """What attention needs of a forward pass over N rows: their positions and their past."""

    rotation: dict[tuple[int, int], Tensor]  # see `Packed.rotation`

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """q `(N,K,G,D)`, already scaled, and kv `(N,2,K,D)` -> `(N, H*D)`."""
        ...


class Summed:
    """A matrix of whose columns each process of a group holds some: their products are summed."""

    def __init__(self, part: Matrix | Int8Matrix, bias: Tensor | None, mesh: DeviceMesh) -> None:
        self.part, self.bias, self.group = part, bias, mesh.get_group()

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        y = self.part(x)
        distributed.all_reduce(y, group=self.group)
        residual.add_(y if self.bias is None else y.add_(self.bias))


class Parts:
    """Reads this process's parts of a module's parameters, and makes matrices of them.

    mesh: the tensor group, None for whole ones. dtype: of the matrices.
    """

    def __init__(self, mesh: DeviceMesh | None, dtype: torch.dtype, int8: bool) -> None:
        self.mesh, self.dtype, self.int8 = mesh, dtype, int8

    def __call__(self, tensor: Tensor, dim: int | None = None) -> Tensor:
        """All of a parameter, or its part along a dimension. Every process of the module calls."""
        split = dim is not None and self.mesh is not None
        if isinstance(tensor, DTensor):
            if split and tensor.device_mesh == self.mesh:
                return tensor.to_local()
            # From the machine's memory, where `offload` keeps it.
            tensor = whole(tensor.to(tensor.device_mesh.device_type))
        if not split:
            return tensor
        return tensor.chunk(self.mesh.size(), dim)[self.mesh.get_local_rank()]  # type: ignore

    def bias(self, *biases: Tensor | None, dim: int | None) -> Tensor | None:
        parts = [self(bias, dim) for bias in biases if bias is not None]
        return torch.cat(parts) if parts else None

    def matrix(self, weight: Tensor, bias: Tensor | None = None) -> Matrix | Int8Matrix:
        bias = None if bias is None else bias.to(self.dtype)
        if self.int8 and weight.numel() >= INT8_FROM:
            return Int8Matrix(weight, bias)
        return Matrix(weight.to(self.dtype), bias)

    def output(self, linear: torch.nn.Linear, split: bool) -> Matrix | Int8Matrix | Summed:
        """A matrix that writes into the residual stream."""
        weight = self(linear.weight, 1 if split else None).clone()
        bias = self.bias(linear.bias, dim=None)
        if split and self.mesh is not None:
            return Summed(self.matrix(weight), bias, self.mesh)
        return self.matrix(weight, bias)


class PackedAttention:
    """Grouped-query attention.

    Folded into one matrix of q, k and v: RMSNorm's gain and sqrt(C), and attention's 1/sqrt(D).
    Rows of q and k are permuted so that rotate-half RoPE is one complex product; their dot
    products are unchanged.
    """

    def __init__(self, op: Attention, gain: Tensor, layer: int, part: Parts, split: bool) -> None:
        self.layer, self.dim = layer, op.head_dim
        dim, rows = self.dim, 0 if split else None
        normed = hasattr(op, "q_norm")
        scale = 1.0 if normed else dim**-0.5
        q, k = (_interleave(part(p.weight, rows), dim) for p in (op.q_proj, op.k_proj))
        self.heads, self.kv = len(q) // dim, len(k) // dim
        weight = torch.cat((q.float() * scale, k, part(op.v_proj.weight, rows))) * gain
        bias = None
        if op.q_proj.bias is not None:
            q, k = (_interleave(part(p.bias, rows), dim) for p in (op.q_proj, op.k_proj))
            bias = torch.cat((q * scale, k, part(op.v_proj.bias, rows)))
        self.qkv = part.matrix(weight, bias)
        self.out = part.output(op.o_proj, split)
        self.norm_gain: Tensor | None = None  # of Qwen3's norms of q and k, (H + K, D)
        if normed:
            q = _interleave(part(op.q_norm.weight), dim) * dim**-0.5
            k = _interleave(part(op.k_norm.weight), dim)
            gains = (q.expand(self.heads, dim), k.expand(self.kv, dim))
            self.norm_gain, self.eps = torch.cat(gains), op.q_norm.eps

    def __call__(self, h: Tensor, x: Tensor, step: Pass) -> None:
        qkv = self.qkv(h)
        if self.norm_gain is not None:
            qk = qkv[:, : (self.heads + self.kv) * self.dim].unflatten(1, (-1, self.dim))
            qk.copy_(F.rms_norm(qk, (self.dim,), None, self.eps).mul_(self.norm_gain))
        rotated = rotate(qkv, step.rotation[self.heads, self.kv])
        heads = rotated.view(-1, self.heads + 2 * self.kv, self.dim)
        q = heads.narrow(1, 0, self.heads).view(-1, self.kv, self.heads // self.kv, self.dim)
        kv = heads.narrow(1, self.heads, 2 * self.kv).view(-1, 2, self.kv, self.dim)
        self.out.add_to(x, step.attend(self.layer, q, kv))


class PackedFFN:
    def __init__(self, op: FeedForward, gain: Tensor, part: Parts, split: bool) -> None:
        gate, up, rows = op.gate_proj, op.up_proj, 0 if split else None
        weight = torch.cat((part(gate.weight, rows), part(up.weight, rows)))
        self.width = len(weight) // 2
        self.gate_up = part.matrix(weight * gain, part.bias(gate.bias, up.bias, dim=rows))
        self.down = part.output(op.down_proj, split)

    def __call__(self, h: Tensor, x: Tensor, step: Pass) -> None:
        gate_up = self.gate_up(h)
        gate, up = gate_up.split(self.width, 1)
        self.down.add_to(x, F.silu(gate).mul_(up))


class PackedLinear:
    """A chain of matrices in a subblock's place."""

    def __init__(self, op: LinearMap, gain: Tensor, part: Parts) -> None:
        first, *others = op.weights
        self.inner = [part.matrix(part(first) * gain)]
        self.inner += [part.matrix(part(weight).clone()) for weight in others]
        self.last = self.inner.pop()

    def __call__(self, h: Tensor, x: Tensor, step: Pass) -> None:
        for matrix in self.inner:
            h = matrix(h)
        self.last.add_to(x, h)


class Packed:
    """A snapshot of `module`, laid out for generation. Absent subblocks leave no trace.

    int8: whether large weights are rounded to int8. placement: the tensor group that holds it
    together, and in what dtype, gains being folded in float32; as the module itself is placed
    unless given. Every process that holds a part of the module makes one at the same time. Raises
    GenerationError.
    """

    @torch.inference_mode()
    def __init__(
        self, module: Transformer, int8: bool = False, placement: Placement | None = None
    ) -> None:
        self.config = config = module.config
        self.mesh = tensor_group(module) if placement is None else placement.tensor_mesh
        self.dtype = placement.dtype if placement else module.embed_tokens.weight.dtype
        part = Parts(self.mesh, self.dtype, int8)
        table = part(module.embed_tokens.weight)
        self.device = table.device
        keep_freed_memory()
        if int8:
            check_int8(self.device, self.dtype)
        epsilon = (config.hidden_size * config.rms_norm_eps) ** 0.5
        self.embedding = F.pad(table.to(self.dtype), (0, 1), value=epsilon)
        self.root = config.hidden_size**0.5
        self.ops: list[PackedAttention | PackedFFN | PackedLinear] = []
        for layer, block in enumerate(module.blocks):
            for subblock in (block.attention, block.ffn):
                if not isinstance(subblock.variant, NoOp):
                    self.ops.append(self._pack(subblock, layer, part))
        self.head = part.matrix(part(module.head) * (part(module.norm.weight).float() * self.root))
        self.frequencies = module.inverse_frequencies(self.device)
        attention = [op for op in self.ops if isinstance(op, PackedAttention)]
        self.kv_heads = {op.layer: op.kv for op in attention}  # of this process
        self._heads = {(op.heads, op.kv) for op in attention}

    def _pack(
        self, subblock: Subblock, layer: int, part: Parts
    ) -> PackedAttention | PackedFFN | PackedLinear:
        op, gain = subblock.op, part(subblock.norm.weight).float() * self.root
        ways = 1 if self.mesh is None else self.mesh.size()
        split = ways > 1 and splits(self.config, subblock.variant, ways)
        if isinstance(op, Attention):
            return PackedAttention(op, gain, layer, part, split)
        if isinstance(op, FeedForward):
            return PackedFFN(op, gain, part, split)
        assert isinstance(op, LinearMap)
        return PackedLinear(op, gain, part)

    def agreed(self, chosen: Chosen) -> Chosen:
        """What the first process of a tensor group chose, in all of them."""
        if self.mesh is not None:
            for tensor in (chosen.tokens, chosen.logprobs, *(chosen.top or ())):
                distributed.broadcast(tensor, group=self.mesh.get_group(), group_src=0)
        return chosen

    def rotation(self, positions: Tensor) -> dict[tuple[int, int], Tensor]:
        """RoPE of rows at `positions` `(R,)`, by count of heads: complex `(R, (H + 2K) D/2)`.

        Queries and keys are rotated, values are multiplied by 1, so one product serves all three.
        """
        angles = positions[:, None] * self.frequencies
        factors, found = torch.polar(torch.ones_like(angles), angles), {}
        for heads, kv in self._heads:
            wide = factors.new_ones(len(factors), heads + 2 * kv, factors.shape[1])
            wide[:, : heads + kv] = factors[:, None]
            found[heads, kv] = wide.flatten(1)
        return found

    def forward(self, tokens: Tensor, step: Pass) -> Tensor:
        """Normalised hidden states `(N,C)` of tokens `(N,)`, for `logits`."""
        stream = F.embedding(tokens, self.embedding)
        x = stream.narrow(1, 0, self.config.hidden_size)
        for op in self.ops:
            op(unit(stream, x), x, step)
        return unit(stream, x)

    def logits(self, hidden: Tensor) -> Tensor:
        """`(N,V)` of hidden states `(N,C)`."""
        return self.head(hidden)


def unit(stream: Tensor, x: Tensor) -> Tensor:
    """RMSNorm but for gain and sqrt(C): x `(N,C)` over the length of stream `(N,C+1)`.

    The last column of the stream is sqrt(C eps), so |stream|^2 = C (mean(x^2) + eps).
    """
    if x.dtype == torch.float32:
        return x / torch.linalg.vector_norm(stream, 2, -1, True)
    return (x / torch.linalg.vector_norm(stream, 2, -1, True, dtype=torch.float32)).to(x.dtype)


def rotate(qkv: Tensor, factors: Tensor) -> Tensor:
    """qkv `(N, M)`, neighbours being one complex number, times factors `(R, M/2)`; R divides N."""
    real = qkv.float()  # no complex numbers below single precision
    real.view(torch.complex64).view(-1, *factors.shape).mul_(factors)
    return real.to(qkv.dtype)


def _interleave(rows: Tensor, dim: int) -> Tensor:
    """Each head's rows (0 … D/2 | D/2 … D) in the order 0, D/2, 1, D/2 + 1, …"""
    return rows.unflatten(0, (-1, 2, dim // 2)).transpose(1, 2).flatten(0, 2)
