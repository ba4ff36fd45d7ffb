"""The cache's bytes, its growth and its moves: none of them shows in what is generated."""

from __future__ import annotations

import pytest
import torch

from tessera.generate.cache import Slots
from tessera.generate.engine import SamplingParams
from tessera.generate.packed import Packed
from tessera.generate.torch_engine import TorchEngine
from tests import tiny

GREEDY = SamplingParams(max_tokens=30, temperature=0)


def num_bytes(slots: Slots) -> int:
    return sum(cache.nbytes for pair in slots.caches.values() for cache in pair)


def test_absent_attention_costs_no_bytes():
    def held(words) -> int:
        slots = Slots(Packed(tiny.model(words)))
        slots.reserve(3, 10)
        return num_bytes(slots)

    token = tiny.config().kv_bytes_per_token()
    assert held(tiny.MOSAIC) == 3 * 10 * token
    assert held([("noop", "swiglu-8"), ("linear", "linear")]) == 0
    assert held([("gqa-1", "noop")]) * 4 == held([("gqa-4", "noop")])


def test_the_cache_grows_no_further_than_asked_and_stays_for_the_next_call():
    engine = TorchEngine(tiny.model())
    engine.generate([[1, 2, 3]] * 4, GREEDY)
    first = num_bytes(engine.slots)
    assert first == 4 * 33 * tiny.config().kv_bytes_per_token()
    engine.generate([[1, 2]] * 2, GREEDY)
    assert num_bytes(engine.slots) == first
    engine.sync(tiny.model(seed=1), 1)
    assert num_bytes(engine.slots) == first
    engine.sync(tiny.model(tiny.PARENT), 2)
    assert num_bytes(engine.slots) == 0
    before = engine.generate([[1, 2]], GREEDY)
    engine.sleep()
    assert num_bytes(engine.slots) == 0
    engine.sync(tiny.model(tiny.PARENT), 2)
    assert engine.generate([[1, 2]], GREEDY) == before


@pytest.mark.parametrize("columns", [9, 12, 20])
def test_growing_and_moving_change_nothing(columns, monkeypatch):
    """A cache made too short must grow; one that outlives its rows must move them left."""
    prompts = [tiny.tokens(29, n, seed=n).tolist() for n in (7, 9, 2, 5, 4, 8, 3)]
    module = tiny.model(sliding_window=6)
    expected = TorchEngine(module).generate(prompts, GREEDY)
    whole = Slots.reserve
    monkeypatch.setattr(Slots, "reserve", lambda self, rows, _: whole(self, rows, columns))
    engine = TorchEngine(module, max_batch_size=2)
    found = engine.generate(prompts, GREEDY)
    assert [c[0].token_ids for c in found] == [c[0].token_ids for c in expected]
    assert engine.slots.columns < sum(map(len, prompts)) + 4 * 30


def test_max_tokens_bounds_the_cache():
    engine = TorchEngine(tiny.model(), max_tokens=80)
    found = engine.generate([[1, 2, 3]] * 6, GREEDY)
    assert engine.slots.rows == 80 // 33
    assert {len(c[0].token_ids) for c in found} == {30}


def test_a_failed_call_leaves_the_engine_usable(monkeypatch):
    engine = TorchEngine(tiny.model())
    expected = engine.generate([[1, 2, 3]], GREEDY)

    def broken() -> None:
        raise KeyboardInterrupt

    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: step() and broken())
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[4, 5]], GREEDY)
    monkeypatch.undo()
    assert engine.idle
    assert engine.generate([[1, 2, 3]], GREEDY) == expected


def test_generation_needs_no_gradient_and_leaves_none():
    module = tiny.model()
    TorchEngine(module).generate([[1]], GREEDY)
    assert all(p.grad is None and not p.is_inference() for p in module.parameters())
    assert torch.is_grad_enabled()
