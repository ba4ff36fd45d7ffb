"""The packed decoder is the module: same hidden states, whatever the family and the mix."""

from __future__ import annotations

import pytest
import torch

from tessera.generate.cache import Prefill
from tessera.generate.packed import Matrix, Packed
from tessera.model.cpu import onednn_rows
from tessera.model.placement import Placement
from tests import tiny

FAMILIES = [
    {},
    {"qkv_bias": True},
    {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    {"qk_norm": True, "head_dim": 6},
    {"sliding_window": 4},
    {"tie_word_embeddings": True, "rope_theta": 100.0},
    {"rms_norm_eps": 0.5},
]


@pytest.mark.parametrize("changes", FAMILIES, ids=lambda changes: "+".join(changes) or "llama")
@torch.no_grad()
def test_packed_logits_are_the_modules(changes):
    module, tokens = tiny.model(**changes), tiny.tokens(29, 3, 11)
    packed = Packed(module)
    hidden = Prefill(packed, tokens.tolist(), keep=False).forward(11).flatten(0, 1)
    expected = module.logits(module(tokens)).flatten(0, 1)
    torch.testing.assert_close(packed.logits(hidden), expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_half_precision_is_as_near_as_its_rounding():
    rounded, tokens = tiny.model(qk_norm=True).to(torch.bfloat16), tiny.tokens(29, 2, 9)
    module = rounded.float()
    expected = module.logits(module(tokens)).flatten(0, 1)
    asked = Packed(module, placement=Placement(dtype=torch.bfloat16))
    for packed in (asked, Packed(module.to(torch.bfloat16))):
        hidden = Prefill(packed, tokens.tolist(), keep=False).forward(9).flatten(0, 1)
        assert hidden.dtype == torch.bfloat16
        found = packed.logits(hidden).float()
        assert (found - expected).abs().max() < 0.03 * expected.abs().max()


@torch.no_grad()
def test_a_snapshot_does_not_follow_its_module():
    module, tokens = tiny.model(), tiny.tokens(29, 1, 5)
    packed = Packed(module)

    def logits() -> torch.Tensor:
        return packed.logits(Prefill(packed, tokens.tolist(), keep=False).forward(5)[0])

    before = logits()
    tiny.randomise(module, seed=1)
    assert torch.equal(before, logits())


@pytest.mark.parametrize("size", [(640, 512), (2048, 600)], ids=["kept twice", "kept once"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@torch.inference_mode()
def test_every_count_of_rows_gives_the_same_product(size, bias):
    weight, offset = torch.randn(size) * size[1] ** -0.5, torch.randn(size[0])
    matrix = Matrix(weight, offset if bias else None)
    for rows in (1, 2, 3, 33):
        x = torch.randn(rows, size[1])
        expected = torch.nn.functional.linear(x, weight, offset if bias else None)
        torch.testing.assert_close(matrix(x), expected, atol=1e-5, rtol=1e-5)
        residual = torch.randn(rows, size[0] + 1)[:, :-1]
        total = residual + expected
        matrix.add_to(residual, x)
        torch.testing.assert_close(residual, total, atol=1e-5, rtol=1e-5)


def test_small_products_stay_with_mm():
    rows = [onednn_rows(torch.empty(size)) for size in (2**18, 2**18 - 1, 2**10)]
    assert rows == [1, 2, 2**8]
