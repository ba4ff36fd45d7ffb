"""Products and hand-written gradients are torch's own, whichever library multiplies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.model import cpu
from tessera.model.cpu import ONEDNN_FROM, Projection, linear, prefers_onednn, rms_norm


def gated_down(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`cpu.gated_down` through these weights."""
    down = nn.Linear(1, 1, device="meta")
    del down.weight, down.bias
    down.weight, down.bias = weight, bias  # type: ignore[assignment]
    return cpu.gated_down(gate, up, down)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [3, 300])  # on either side of the threshold
def test_a_projection_is_torchs_linear(rows: int, bias: bool):
    torch.manual_seed(0)
    module = Projection(96, 80, bias=bias)
    assert (rows == 300) == (2 * rows * 96 * 80 >= ONEDNN_FROM)
    x = torch.randn(2, rows, 96, requires_grad=True)
    upstream = torch.randn(2, rows, 80)
    ours = torch.autograd.grad(module(x), [x, *module.parameters()], upstream)
    plain = F.linear(x, module.weight, module.bias)
    theirs = torch.autograd.grad(plain, [x, *module.parameters()], upstream)
    torch.testing.assert_close(module(x), plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(module(x), plain, rtol=1e-5, atol=1e-5)


def test_only_wanted_gradients_are_made():
    x, weight = torch.randn(2048, 64), torch.randn(64, 64)
    assert linear(x.requires_grad_(), weight).sum().backward() is None and weight.grad is None
    assert linear(x.detach(), weight.requires_grad_()).requires_grad


def test_other_types_are_torchs_own(monkeypatch):
    monkeypatch.setattr(cpu, "ONEDNN_FROM", 0)
    x, weight = torch.randn(4, 8), torch.randn(5, 8)
    assert not prefers_onednn(weight.double()) and not prefers_onednn(weight.to("meta"))
    assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))


@pytest.mark.parametrize("rows", [3, 3000])
def test_a_product_is_a_view_of_nothing(rows: int):
    """FSDP2 warns of a module that returns a view, and torch's own product is none."""
    x, weight = torch.randn(2, rows, 64, requires_grad=True), torch.randn(64, 64)
    assert linear(x, weight)._base is None
    assert gated_down(x, x, weight)._base is None
    with torch.no_grad():
        assert linear(x, weight)._base is None


def assert_same(ours, plain, inputs: dict[str, torch.Tensor]) -> None:
    upstream = torch.randn_like(plain)
    torch.testing.assert_close(ours, plain)
    trained = [x for x in inputs.values() if x.requires_grad]
    found = torch.autograd.grad(ours, trained, upstream)
    for mine, theirs in zip(found, torch.autograd.grad(plain, trained, upstream), strict=True):
        torch.testing.assert_close(mine, theirs)


def tensors(trained: str, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    wanted = trained.split()
    return {k: torch.randn(shape, requires_grad=k in wanted) for k, shape in shapes.items()}


@pytest.mark.parametrize("trained", ["x weight", "x", "weight"])
def test_rms_norm(trained):
    inputs = tensors(trained, x=(2, 5, 12), weight=(12,))
    plain = F.rms_norm(inputs["x"], (12,), inputs["weight"], 1e-5)
    assert_same(rms_norm(**inputs, eps=1e-5), plain, inputs)


@pytest.mark.parametrize("trained", ["gate up weight bias", "gate", "up weight", "weight", "bias"])
def test_gated_down(trained):
    inputs = tensors(trained, gate=(2, 5, 7), up=(2, 5, 7), weight=(6, 7), bias=(6,))
    plain = F.linear(F.silu(inputs["gate"]) * inputs["up"], inputs["weight"], inputs["bias"])
    assert_same(gated_down(**inputs), plain, inputs)


def test_without_gradients_the_values_are_theassert_same():
    inputs = tensors("", gate=(3, 7), up=(3, 7), weight=(6, 7))
    trained = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    with torch.no_grad():
        assert torch.equal(gated_down(**inputs), gated_down(**trained))
    assert torch.equal(gated_down(**inputs), gated_down(**trained).detach())


def test_a_layer_keeps_x_gate_and_up_alone():
    inputs = tensors("x gate", x=(4, 6), gate=(4, 6), up=(4, 6))
    ones = torch.ones(6)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        gated_down(inputs["gate"], inputs["up"], torch.eye(6))
        rms_norm(inputs["x"], ones, 1e-5)
    assert sorted(kept) == [4, 6, 24, 24, 24, 36]  # 1/rms, weights; x, gate, up


@pytest.mark.parametrize("tile", [64, 2**18])  # many tiles, one
def test_tiles_in_bfloat16_are_the_operations_in_float32(monkeypatch, tile: int):
    monkeypatch.setattr(cpu, "TILE", tile)
    monkeypatch.setattr(cpu, "SHORTEST", 3)
    mask = torch.rand(2, 1, 7, 9, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[..., -1] = True
    angles = torch.randn(2, 7, 1, 4).repeat(1, 1, 1, 2)
    cos, sin = angles.cos(), angles.sin()

    def sdpa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        heads = (one.transpose(1, 2) for one in (q, k, v))
        mask = torch.ones(7, 9, dtype=torch.bool).tril(2) if seen is None else seen
        found = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
        return found.transpose(1, 2)

    def turned(x: Tensor) -> Tensor:
        return x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin

    heads = {"q": (2, 7, 6, 8), "k": (2, 9, 3, 8), "v": (2, 9, 3, 8)}
    for shapes, ours, theirs in (
        (heads, lambda *x: cpu.attention(*x, None, None), lambda *x: sdpa(*x, None)),
        (heads, lambda *x: cpu.attention(*x, mask, None), lambda *x: sdpa(*x, mask)),
        ({"x": (2, 7, 6, 8)}, lambda x: cpu.rope(x, cos, sin), turned),
        (
            {"x": (2, 50, 12), "weight": (12,)},
            lambda *x: rms_norm(*x, 1e-5),
            lambda x, weight: F.rms_norm(x, (12,), weight, 1e-5),
        ),
    ):
        rounded = [x.bfloat16() for x in tensors("", **shapes).values()]
        half = [x.clone().requires_grad_() for x in rounded]
        full = [x.float().requires_grad_() for x in rounded]
        found, wanted = ours(*half), theirs(*full)
        upstream = torch.randn(wanted.shape).bfloat16()
        gradients = torch.autograd.grad(found, half, upstream)
        others = torch.autograd.grad(wanted, full, upstream.float())
        for a, b in zip((found, *gradients), (wanted, *others), strict=True):
            assert a.dtype == torch.bfloat16
            assert (a - b).norm() <= 0.01 * b.norm()
