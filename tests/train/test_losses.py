"""The chunked losses are the plain ones, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tessera.train import losses


@pytest.fixture(
    autouse=True,
    params=[
        losses.Portions(chunk=7 * 11, tile=3 * 11, slab=10),
        losses.Portions(chunk=7 * 11, tile=7 * 11, slab=1),
    ],
    ids=["slabs of several chunks", "slabs of one"],
)
def small_portions(request, monkeypatch):
    monkeypatch.setitem(losses.PORTIONS, "cpu", request.param)


def _inputs(seed: int = 0):
    torch.manual_seed(seed)
    hidden = torch.randn(23, 5, requires_grad=True)
    head = torch.randn(11, 5, requires_grad=True)
    return hidden, head, torch.randint(0, 11, (23,)), torch.rand(23)


def _same(ours: torch.Tensor, plain: torch.Tensor, *inputs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, plain)
    found = torch.autograd.grad(ours, inputs)
    for ours_grad, plain_grad in zip(found, torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(ours_grad, plain_grad)


def test_cross_entropy_is_the_plain_one():
    hidden, head, labels, weight = _inputs()
    plain = (F.cross_entropy(hidden @ head.T, labels, reduction="none") * weight).sum()
    _same(losses.cross_entropy(hidden, head, labels, weight), plain, hidden, head)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergences_are_the_plain_ones(beta: float):
    """GKD (arXiv 2306.13649): β = 0 is KL(p ‖ q), 1 KL(q ‖ p), between is Jensen-Shannon's."""
    hidden, head, _, weight = _inputs()
    parent, parent_head, *_ = _inputs(1)
    log_p = F.log_softmax((parent.detach() @ parent_head.detach().T).double(), -1)
    log_q = F.log_softmax((hidden @ head.T).double(), -1)
    mixed = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    of_p = F.kl_div(log_q if beta in (0, 1) else mixed, log_p, reduction="none", log_target=True)
    of_q = F.kl_div(log_p if beta in (0, 1) else mixed, log_q, reduction="none", log_target=True)
    one = 1 - beta if beta in (0, 1) else beta
    plain = (((one * of_p + (1 - one) * of_q).sum(-1)) * weight).sum().float()
    ours = losses.kl_divergence(hidden, head, parent, parent_head, weight, beta)
    _same(ours, plain, hidden, head)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_divergence_of_self_is_zero_with_zero_gradient(beta: float):
    hidden, head, _, weight = _inputs()
    loss = losses.kl_divergence(hidden, head, hidden, head, weight, beta)
    assert abs(loss.item()) < (1e-6 if beta == 0.3 else 1e-30)
    for gradient in torch.autograd.grad(loss, (hidden, head)):
        assert gradient.abs().max() < (1e-6 if beta == 0.3 else 1e-30)


def test_token_statistics_agree_with_the_losses():
    hidden, head, labels, weight = _inputs()
    parent, parent_head, *_ = _inputs(1)
    logits = parent.detach() @ parent_head.detach().T
    found = losses.token_statistics(hidden, head, logits.__getitem__, labels)
    ce = losses.cross_entropy(hidden, head, labels, weight)
    kl = losses.kl_divergence(hidden, head, parent, parent_head, weight)
    torch.testing.assert_close(found["lm_loss"] @ weight, ce.detach())
    torch.testing.assert_close(found["kl"] @ weight, kl.detach())
    agree = ((hidden @ head.T).argmax(-1) == logits.argmax(-1)).float()
    assert torch.equal(found["agreement"], agree)


def test_hidden_cosine_is_the_plain_one():
    torch.manual_seed(2)
    child, parent = torch.randn(3, 7, 5, requires_grad=True), torch.randn(3, 7, 5)
    weight = torch.rand(3, 7)
    plain = ((1 - F.cosine_similarity(child, parent, dim=-1)) * weight).sum()
    _same(losses.hidden_cosine(child, parent, weight), plain, child)


def test_hidden_cosine_of_bfloat16_states_tells_small_distances():
    # 1 - cos is of bfloat16's own resolution, 0.004, where a layer hardly changed.
    torch.manual_seed(0)
    child = torch.randn(64, 512).bfloat16().requires_grad_()
    parent = (child.detach().float() + 0.03 * torch.randn(64, 512)).bfloat16()
    exact = child.detach().double().requires_grad_()
    plain = (1 - F.cosine_similarity(exact, parent.double(), dim=-1)).sum()
    (slope,) = torch.autograd.grad(plain, exact)
    ours = losses.hidden_cosine(child, parent, torch.ones(64))
    (found,) = torch.autograd.grad(ours, child)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-3)
    assert (found.double() - slope).norm() < 0.01 * slope.norm()
