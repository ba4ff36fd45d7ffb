"""Weights in int8: the rounding is bounded, and a row's product is its own."""

from __future__ import annotations

import pytest
import torch

from tessera.generate import packed as packing
from tessera.generate.engine import GenerationError, SamplingParams
from tessera.generate.packed import Int8Matrix, check_int8
from tessera.generate.torch_engine import TorchEngine
from tessera.model.checkpoint import load_model
from tessera.model.placement import Placement
from tests import tiny


@pytest.fixture
def everywhere(monkeypatch):
    """Every weight in int8, however small; skips where the CPU cannot."""
    try:
        check_int8(torch.device("cpu"), torch.float32)
    except GenerationError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(packing, "INT8_FROM", 0)


@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_a_product_is_that_of_the_rounded_rows(everywhere, bias):
    weight, x = (
        torch.randn(40, 24),
        torch.randn(5, 24) * torch.tensor([[1.0], [9], [0], [1e-3], [1]]),
    )
    offset = torch.randn(40) if bias else None
    matrix = Int8Matrix(weight, offset)
    steps = [t.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127 for t in (x, weight)]
    rows, columns = ((t / s).round() * s for t, s in zip((x, weight), steps, strict=True))
    expected = torch.nn.functional.linear(rows, columns, offset)
    torch.testing.assert_close(matrix(x), expected, atol=1e-4, rtol=1e-4)
    residual = torch.randn(5, 40)
    total = residual + expected
    matrix.add_to(residual, x)
    torch.testing.assert_close(residual, total, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_row_does_not_see_the_others(everywhere):
    matrix, x = Int8Matrix(torch.randn(64, 32)), torch.randn(9, 32)
    x[3] *= 1000
    together = matrix(x)
    for i in range(9):
        assert torch.equal(matrix(x[i : i + 1])[0], together[i])


def test_a_completion_in_int8_does_not_depend_on_its_batch_mates(everywhere):
    module = tiny.model()
    prompts = [tiny.tokens(29, n, seed=n).tolist() for n in (5, 2, 9, 6)]
    params = SamplingParams(max_tokens=10, n=2)
    expected = TorchEngine(module, int8=True).generate(prompts, params)
    engine = TorchEngine(module, int8=True, max_batch_size=3)
    found = engine.generate(prompts, params)
    assert [[c.token_ids for c in samples] for samples in found] == [
        [c.token_ids for c in samples] for samples in expected
    ]
    engine.sync(tiny.model(seed=1), 1)
    fresh = TorchEngine(tiny.model(seed=1), int8=True).score(prompts)
    assert engine.score(prompts) == fresh != TorchEngine(tiny.model(seed=1)).score(prompts)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 0.02), (torch.bfloat16, 0.04)])
def test_a_real_model_in_int8_says_nearly_the_same(everywhere, shared, dtype, most):
    module = load_model(shared / "models" / "stories260k", frozen=True)
    rounded = TorchEngine(module, int8=True, placement=Placement(dtype=dtype))
    exact = TorchEngine(module)
    greedy = SamplingParams(max_tokens=200, temperature=0)
    (done,) = exact.generate([[1]], greedy)[0]
    tokens = [1, *done.token_ids]
    before, after = (torch.tensor(engine.score([tokens])[0]) for engine in (exact, rounded))
    assert (before - after).abs().mean() < most


def test_what_cannot_be_rounded_is_refused():
    with pytest.raises(GenerationError, match="for a CPU, and this model is torch.float16 on cpu"):
        TorchEngine(tiny.model().to(torch.float16), int8=True)
