"""Hand-written gradients are autograd's, for whatever is trained, and keep less."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tessera.model.cpu import gated_down, rms_norm


def _same(ours, plain, inputs: dict[str, torch.Tensor]) -> None:
    upstream = torch.randn_like(plain)
    torch.testing.assert_close(ours, plain)
    trained = [x for x in inputs.values() if x.requires_grad]
    found = torch.autograd.grad(ours, trained, upstream)
    for mine, theirs in zip(found, torch.autograd.grad(plain, trained, upstream), strict=True):
        torch.testing.assert_close(mine, theirs)


def _tensors(trained: str, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    wanted = trained.split()
    return {k: torch.randn(shape, requires_grad=k in wanted) for k, shape in shapes.items()}


@pytest.mark.parametrize("trained", ["x weight", "x", "weight"])
def test_rms_norm(trained):
    inputs = _tensors(trained, x=(2, 5, 12), weight=(12,))
    plain = F.rms_norm(inputs["x"], (12,), inputs["weight"], 1e-5)
    _same(rms_norm(**inputs, eps=1e-5), plain, inputs)


@pytest.mark.parametrize("trained", ["gate up weight bias", "gate", "up weight", "weight", "bias"])
def test_gated_down(trained):
    inputs = _tensors(trained, gate=(2, 5, 7), up=(2, 5, 7), weight=(6, 7), bias=(6,))
    plain = F.linear(F.silu(inputs["gate"]) * inputs["up"], inputs["weight"], inputs["bias"])
    _same(gated_down(**inputs), plain, inputs)


def test_without_gradients_the_values_are_the_same():
    inputs = _tensors("", gate=(3, 7), up=(3, 7), weight=(6, 7))
    trained = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    with torch.no_grad():
        assert torch.equal(gated_down(**inputs), gated_down(**trained))
    assert torch.equal(gated_down(**inputs), gated_down(**trained).detach())


def test_a_layer_keeps_x_gate_and_up_alone():
    inputs = _tensors("x gate", x=(4, 6), gate=(4, 6), up=(4, 6))
    ones = torch.ones(6)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        gated_down(inputs["gate"], inputs["up"], torch.eye(6))
        rms_norm(inputs["x"], ones, 1e-5)
    assert sorted(kept) == [4, 6, 24, 24, 24, 36]  # 1/rms, weights; x, gate, up
