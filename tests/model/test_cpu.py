"""Whichever library multiplies, the product and its gradients are torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tessera.model import cpu
from tessera.model.cpu import ONEDNN_FROM, Projection, gated_down, linear, prefers_onednn


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
