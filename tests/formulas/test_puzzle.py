"""Costs, first weights, local distillation, scores and fusion, by hand (Puzzle, FFN Fusion).

A section an equation; nothing here calls what it checks to say what is right.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tessera.data.batch import Batch
from tessera.devices import Device
from tessera.model.checkpoint import save_model
from tessera.model.config import GQA, Linear, NoOp, SwiGLU
from tessera.model.context import Context
from tessera.model.layers import Subblock
from tessera.model.transformer import Transformer
from tessera.puzzle import roofline
from tessera.puzzle.bld import BLD
from tessera.puzzle.cost import base_row, count
from tessera.puzzle.cost_table import CostTable, Scenario
from tessera.puzzle.fuse import dependency_matrix, fusable_runs, fuse_ffns
from tessera.puzzle.library import BlockLibrary, save_library
from tessera.puzzle.roofline import Serving, base_seconds, probe_cpu, word_seconds
from tessera.puzzle.score import (
    Answers,
    ConditionalConfig,
    Rescorer,
    Target,
    pack_problems,
    score_given,
)
from tessera.puzzle.space import Space, Unit
from tessera.puzzle.surgery import (
    collect_statistics,
    cut,
    removal_order,
    schedule,
)
from tessera.runs.run import Run
from tests import tiny

Array = NDArray[np.float64]


def array(tensor: torch.Tensor) -> Array:
    return tensor.detach().double().numpy()


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def softmax(logits: Array) -> Array:
    exps = np.exp(logits)
    return exps / exps.sum(-1, keepdims=True)


def cosine(x: Array, y: Array) -> Array:
    return (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)


def rms_norm(x: Array, gain: Array, eps: float = 1e-5) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain


# Counted costs (Puzzle §2.5): weights, the KV cache, and what is outside of all blocks.

SHAPE = tiny.config(
    [("gqa-2", "swiglu-12")],
    vocab_size=10, hidden_size=8, num_attention_heads=4, head_dim=2)  # fmt: skip
WORK = Scenario(batch=3, prompt=5, new=4)


def test_weights_and_the_cache_are_counted_in_their_own_sizes():
    """Attention: norm, Q and O of 4·2 columns, K and V of 2·2; a token caches 2·2·2 numbers."""
    attention = count(SHAPE, "attention", GQA(2), WORK, (2.0, 1.0))
    parameters = 8 + 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8
    assert attention == {
        "parameters": parameters,
        "kv_bytes_per_token": 2 * 2 * 2 * 1.0,
        "bytes": parameters * 2.0 + 3 * (5 + 4) * 8.0,
    }
    ffn = count(SHAPE, "ffn", SwiGLU(12), WORK, (2.0, 1.0))
    assert ffn["parameters"] == 8 + 3 * 8 * 12 and ffn["kv_bytes_per_token"] == 0.0
    assert ffn["bytes"] == 2.0 * (8 + 3 * 8 * 12)
    assert count(SHAPE, "ffn", Linear(), WORK, (2.0, 1.0))["parameters"] == 8 + 8 * 8
    assert set(count(SHAPE, "ffn", NoOp(), WORK, (2.0, 1.0)).values()) == {0}
    outside = 2 * 10 * 8 + 8  # both tables and the last norm
    assert base_row(SHAPE, 2.0)["parameters"] == outside
    assert base_row(SHAPE, 2.0)["bytes"] == 2.0 * outside
    assert SHAPE.num_params() == outside + parameters + 8 + 3 * 8 * 12


def test_throughput_is_new_tokens_over_a_prefill_and_the_other_steps():
    rows = [
        {"kind": "base", "word": "", "parameters": 3, "prefill_seconds": 1, "decode_seconds": 0.5},
        {"kind": "attention", "word": "a", "parameters": 4, "prefill_seconds": 2,
         "decode_seconds": 0.25},
        {"kind": "ffn", "word": "f", "parameters": 5, "prefill_seconds": 3, "decode_seconds": 1},
    ]  # fmt: skip
    total = CostTable.from_rows(rows, WORK).total([("a", "f"), ("a", "f")])
    prefill, step = 1 + 2 * (2 + 3), 0.5 + 2 * (0.25 + 1)
    assert total["parameters"] == 3 + 2 * (4 + 5)
    assert total["latency"] == total["seconds"] == prefill + (4 - 1) * step
    assert total["throughput"] == 3 * 4 / (prefill + (4 - 1) * step)


# The roofline: operations, bytes, kernels, and the slower of the first two.


def device(rate: float = math.inf, bandwidth: float = math.inf, kernel: float = 0.0) -> Device:
    peak = {"fp32": rate, "bf16": rate, "fp8": rate}
    return Device("toy", 1e9, bandwidth, peak, math.inf, 1.0, 1.0, kernel=kernel, hop=0.0)


def pairs_of(length: int, window: int | None = None) -> int:
    """(query, key) pairs of a causal sequence, one by one."""
    return sum(
        1
        for query in range(length)
        for key in range(query + 1)
        if window is None or query - key < window
    )


@pytest.mark.parametrize("window", [None, 3])
def test_a_multiply_and_an_add_are_two_operations(window: int | None):
    """Products: 2·rows·inputs·outputs; attention: QK and PV, 2·pairs·heads·head_dim each."""
    config, serving = replace(SHAPE, sliding_window=window), Serving(device(rate=1.0), "fp32")
    prefill, decode = word_seconds(config, GQA(2), WORK, serving)
    weights = 8 * (4 * 2) + 8 * (2 * 2) + 8 * (2 * 2) + (4 * 2) * 8
    products = 2 * (3 * 5) * weights
    assert prefill == products + 2 * (2 * 3 * pairs_of(5, window) * 4 * 2)
    seen = 5 + 4 / 2 if window is None else window  # the cache at the middle of what is new
    assert decode == 2 * 3 * weights + 2 * (2 * 3 * seen * 4 * 2)
    assert word_seconds(config, SwiGLU(12), WORK, serving) == (
        2 * 15 * 3 * 8 * 12,
        2 * 3 * 3 * 8 * 12,
    )
    assert word_seconds(config, Linear(), WORK, serving) == (2 * 15 * 64, 2 * 3 * 64)
    assert base_seconds(config, WORK, serving) == (2 * 3 * 8 * 10, 2 * 3 * 8 * 10)


@pytest.mark.parametrize("window", [None, 3])
def test_weights_are_read_once_and_activations_written_and_read(window: int | None):
    """FP8 weights of 1 byte, a cache of 0.5, activations of bf16's 2."""
    config = replace(SHAPE, sliding_window=window)
    serving = Serving(device(bandwidth=1.0), "fp8", bytes_per_kv=0.5)
    norm = 4 * 8  # residual and delta in, their sum and the norm out

    def attention(rows: int, cached: float) -> float:
        qkv = 8 * 16 + 2 * rows * (8 + 16)  # Q of 8, K and V of 4 columns each
        output = 8 * 8 + 2 * rows * (8 + 8)
        cache = cached * (4 + 4) * 0.5
        return qkv + output + cache + 2 * rows * norm + 2 * rows * 2 * 16  # RoPE: in and out

    def ffn(rows: int) -> float:
        wide = 8 * 24 + 2 * rows * (8 + 24)
        down = 12 * 8 + 2 * rows * (12 + 8)
        return wide + down + 2 * rows * norm + 2 * rows * 3 * 12  # gate, up, and their product

    seen = 3 * (7 if window is None else 3)
    assert word_seconds(config, GQA(2), WORK, serving) == (attention(15, 15), attention(3, seen))
    assert word_seconds(config, SwiGLU(12), WORK, serving) == (ffn(15), ffn(3))
    linear = [8 * 8 + 2 * rows * (8 + 8) + 2 * rows * norm for rows in (15, 3)]
    assert word_seconds(config, Linear(), WORK, serving) == tuple(linear)
    head = 8 * 10 + 2 * 3 * (8 + 10)  # of the last token of each prompt
    assert base_seconds(config, WORK, serving) == (head + 2 * 2 * 8 * 15, head + 2 * 2 * 8 * 3)
    plain = Serving(device(bandwidth=1.0), "bf16")
    assert (plain.bytes_per_parameter, plain.bytes_per_kv, plain.wide) == (2.0, 2.0, "bf16")


def test_each_kernel_waits_once():
    serving = Serving(device(kernel=1.0), "fp32")
    for variant, kernels in ((GQA(2), 5), (SwiGLU(12), 4), (Linear(), 2), (NoOp(), 0)):
        assert word_seconds(SHAPE, variant, WORK, serving) == (kernels, kernels)
    assert base_seconds(SHAPE, WORK, serving) == (4, 4)


def test_a_product_takes_the_longer_of_its_operations_and_its_bytes():
    half = replace(device(rate=100.0, bandwidth=10.0), compute=0.5, memory_share=0.2)
    serving = Serving(half, "fp32")
    assert half.flops("fp32") == 50.0 and half.rate() == 2.0
    moved = (4 * 6 + 3 * (4 + 6)) * 4 / 2.0
    assert serving.product(3, 4, 6) == moved > 2 * 3 * 4 * 6 / 50.0
    slow = Serving(replace(half, compute=0.001), "fp32")
    assert slow.product(3, 4, 6) == 2 * 3 * 4 * 6 / 0.1 > moved


def test_three_devices_share_heads_widths_and_words_in_whole_numbers():
    """4 query heads are 2 at most on a device, 2 KV heads 1, 12 channels 4, 10 tokens 4."""
    serving = Serving(device(rate=1.0), "fp32", tensor_parallel=3)
    prefill, _ = word_seconds(SHAPE, GQA(2), WORK, serving)
    products = 2 * 15 * (8 * (2 + 2 * 1) * 2 + 2 * 2 * 8)
    assert prefill == products + 4 * 3 * pairs_of(5) * 2 * 2
    assert word_seconds(SHAPE, SwiGLU(12), WORK, serving)[1] == 2 * 3 * 3 * 8 * 4
    assert base_seconds(SHAPE, WORK, serving)[1] == 2 * 3 * 8 * 4
    assert serving.exchange(3, 8) == serving.gather(3, 8) == 0.0  # an endless link, no hop
    linked = Serving(replace(device(), link=10.0, hop=0.5), "bf16", tensor_parallel=3)
    size = 2 * 3 * 8
    ways = (0.5 + 2 * size / 10, 2 * 0.5 + 2 * 2 / 3 * size / 10)
    assert linked.exchange(3, 8) == pytest.approx(min(ways))
    assert linked.gather(3, 8) == pytest.approx(0.5 + 2 * size / 10)
    assert word_seconds(SHAPE, Linear(), WORK, linked) == (0.0, 0.0)
    assert word_seconds(SHAPE, SwiGLU(12), WORK, linked)[1] == pytest.approx(min(ways))
    assert word_seconds(SHAPE, GQA(2), WORK, linked)[1] == pytest.approx(min(ways))
    gathered = 0.5 + 2 * (2 * 3 * 4) / 10  # a third of the vocabulary, rounded up
    embedded = [min(0.5 + 2 * s / 10, 1.0 + 4 / 3 * s / 10) for s in (2 * 15 * 8, 2 * 3 * 8)]
    assert base_seconds(SHAPE, WORK, linked) == pytest.approx([gathered + e for e in embedded])


def test_the_peak_of_this_cpu_is_operations_over_their_least_seconds(monkeypatch):
    times = iter(range(0, 3000, 2))

    class Product:
        def __init__(self, weight: torch.Tensor) -> None:
            self.weight = weight

        def __call__(self, x: torch.Tensor) -> None:
            seen.append((*x.shape, *self.weight.shape))

    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(roofline, "Matrix", Product)
    monkeypatch.setattr(roofline, "clock", lambda device: float(next(times)))
    found = probe_cpu(0.0)
    (rows, inputs, outputs, _), (one, wide, tall, _), _ = seen
    assert found.peak == {"fp32": 2 * rows * inputs * outputs / 2}  # the clock says 2 s
    assert one == 1 and found.bandwidth == 4 * wide * tall / 2
    assert found.kernel == 2.0 and found.hop == 0.0 and found.link == math.inf
    assert (found.compute, found.memory_share) == (1.0, 1.0) and found.memory > 1e8


# First weights (Puzzle App. A).


@torch.no_grad()
def filled(kv_heads: int = 4, **changes: bool) -> Subblock:
    """Attention with K's head h full of the h-th number, V's of a hundred more."""
    config = tiny.config([("gqa-4", "swiglu-24")], **changes)
    attention = tiny.randomise(Subblock(config, GQA(kv_heads)))
    for number, projection in enumerate((attention.op.k_proj, attention.op.v_proj)):
        for head, value in enumerate([1.0, 3.0, 10.0, 20.0]):
            here = slice(4 * head, 4 * head + 4)
            projection.weight[here] = 100 * number + value
            if projection.bias is not None:
                projection.bias[here] = 100 * number + 2 * value
    return attention


@pytest.mark.parametrize(("heads", "means"), [(2, [2.0, 15.0]), (1, [8.5]), (4, [1, 3, 10, 20])])
def test_kv_heads_that_merge_are_averaged(heads: int, means: list[float]):
    parent = filled(qkv_bias=True, qk_norm=True, o_bias=True)
    config = tiny.config(qkv_bias=True, qk_norm=True, o_bias=True)
    child = cut(parent, config, GQA(heads))
    for number, projection in enumerate((child.op.k_proj, child.op.v_proj)):
        rows = np.repeat(np.array(means), 4) + 100 * number
        np.testing.assert_allclose(array(projection.weight), np.tile(rows[:, None], 16))
        np.testing.assert_allclose(array(projection.bias), 2 * np.repeat(means, 4) + 100 * number)
    for name in ("op.q_proj", "op.o_proj", "op.q_norm", "op.k_norm", "norm"):
        for key, own in child.get_submodule(name).named_parameters():
            assert torch.equal(own, parent.get_submodule(name).get_parameter(key)), (name, key)


def test_a_linear_map_of_attention_is_each_token_looking_at_itself():
    """W_o · W_v, V's rows repeated for the queries of its group."""
    attention = tiny.randomise(Subblock(tiny.config(), GQA(2)), 4)
    o, v = array(attention.op.o_proj.weight), array(attention.op.v_proj.weight)
    expected = np.zeros((16, 16))
    for query in range(4):  # two query heads to a KV head
        shared = v[4 * (query // 2) : 4 * (query // 2) + 4]
        expected += o[:, 4 * query : 4 * query + 4] @ shared
    child = cut(attention, tiny.config(), Linear(), linear_scale=0.5)
    np.testing.assert_allclose(array(child.op.weight), 0.5 * expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(child.norm.weight, attention.norm.weight)
    again = cut(child, tiny.config(), Linear(), linear_scale=0.5)  # of a parent with linear maps
    assert torch.equal(again.op.weight, child.op.weight)


def test_a_linear_map_of_an_ffn_leaves_out_the_gate():
    ffn = tiny.randomise(Subblock(tiny.config(), SwiGLU(24)), 5)
    child = cut(ffn, tiny.config(), Linear())
    expected = array(ffn.op.down_proj.weight) @ array(ffn.op.up_proj.weight)
    np.testing.assert_allclose(array(child.op.weight), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="gqa-2"):
        cut(ffn, tiny.config(), GQA(2))


@pytest.mark.parametrize("given", [True, False])
def test_the_channels_kept_are_the_most_important_in_their_order(given: bool):
    config = tiny.config(mlp_bias=True)
    ffn = tiny.randomise(Subblock(config, SwiGLU(5)), 6)
    kept = [1, 2, 4]
    with torch.no_grad():  # without importance, the norms of down_proj's columns decide
        ffn.op.down_proj.weight.mul_(torch.tensor([0.0, 9.0, 5.0, 0.0, 7.0]))
    importance = torch.tensor([0.0, 5.0, 9.0, 1.0, 7.0]) if given else None
    child = cut(ffn, config, SwiGLU(3), importance)
    for name in ("gate_proj", "up_proj"):
        own, old = getattr(child.op, name), getattr(ffn.op, name)
        assert torch.equal(own.weight, old.weight[kept]) and torch.equal(own.bias, old.bias[kept])
    assert torch.equal(child.op.down_proj.weight, ffn.op.down_proj.weight[:, kept])
    assert torch.equal(child.op.down_proj.bias, ffn.op.down_proj.bias)


def batch(seed: int = 0) -> Batch:
    """Two documents of 4 and 3 tokens in one row, and one with a padding in the other."""
    ids = tiny.tokens(29, 2, 8, seed=seed)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0]])
    segments = torch.tensor([[0] * 4 + [1] * 3, [0] * 6 + [-1]])
    weight = torch.tensor([[1.0, 0, 1, 2, 1, 1, 0], [0.5, 1, 1, 0, 1, 1, 0]])
    return Batch(ids[:, :-1], ids[:, 1:], weight, positions, segments)


def context_of(given: Batch) -> Context:
    return Context(given.positions, given.segments)


def streams(module: Transformer, given: Batch) -> list[Array]:
    """What enters each layer and leaves the last, `(tokens, C)` without padding."""
    real = given.segments >= 0
    return [array(x[real]) for x in module.hidden_states(given.tokens, context_of(given))]


def subblock_inputs(module: Transformer, given: Batch, layer: int) -> tuple[Array, Array]:
    """(what attention adds, what enters the FFN) of a layer, from hooks on a whole pass."""
    seen: dict[str, torch.Tensor] = {}
    block, real = module.blocks[layer], given.segments >= 0
    handles = [
        block.attention.register_forward_hook(lambda *a: seen.__setitem__("added", a[-1])),
        block.ffn.register_forward_pre_hook(lambda m, a: seen.__setitem__("middle", a[0])),
    ]
    module(given.tokens, context_of(given))
    for handle in handles:
        handle.remove()
    return array(seen["added"][real]), array(seen["middle"][real])


def channels_of(ffn: Subblock, middle: Array) -> Array:
    """x_i = silu(gate_i) · up_i, what enters down_proj `(tokens, F)`."""
    normed = rms_norm(middle, array(ffn.norm.weight))
    gate, up = (normed @ array(p.weight).T for p in (ffn.op.gate_proj, ffn.op.up_proj))
    return silu(gate) * up


@pytest.fixture(scope="module")
def parent() -> Transformer:
    return tiny.model([("gqa-2", "swiglu-6")] * 3, seed=1).requires_grad_(False)


def test_statistics_are_means_over_the_tokens_of_all_batches(parent: Transformer):
    batches = [batch(0), batch(1)]
    found = collect_statistics(parent, batches)
    for layer in range(3):
        entering, leaving, middles, added = [], [], [], []
        for one in batches:
            states = streams(parent, one)
            entering.append(states[layer])
            leaving.append(states[layer + 1])
            own, middle = subblock_inputs(parent, one, layer)
            added.append(own)
            middles.append(middle)
        x, out, middle, own = map(np.concatenate, (entering, leaving, middles, added))
        assert len(x) == 2 * 13
        # C_i = mean |x_i| · ‖W_down[:, i]‖, in Puzzle's appendix A.
        ffn = parent.blocks[layer].ffn
        down = array(ffn.op.down_proj.weight)
        importance = np.abs(channels_of(ffn, middle)).mean(0) * np.sqrt((down**2).sum(0))
        np.testing.assert_allclose(array(found.channel_importance[layer]), importance, rtol=1e-4)
        # The scale of BLD's loss, and block influence: 1 - cos(in, out).
        assert found.output_scale[layer] == pytest.approx((out**2).sum(-1).mean(), rel=1e-4)
        assert found.block_influence[layer] == pytest.approx((1 - cosine(x, out)).mean(), rel=1e-3)
        # The least squares factor of a linear map: Σ x·y / Σ x².
        matrix = down @ array(ffn.op.up_proj.weight)
        guess = rms_norm(middle, array(ffn.norm.weight)) @ matrix.T
        fit = (guess * (out - middle)).sum() / (guess**2).sum()
        assert found.linear_scale["ffn"][layer] == pytest.approx(fit, rel=1e-3)
        op = parent.blocks[layer].attention.op
        v = array(op.v_proj.weight).reshape(2, 4, 16).repeat(2, axis=0).reshape(16, 16)
        normed = rms_norm(x, array(parent.blocks[layer].attention.norm.weight))
        guess = normed @ (array(op.o_proj.weight) @ v).T
        fit = (guess * own).sum() / (guess**2).sum()
        assert found.linear_scale["attention"][layer] == pytest.approx(fit, rel=1e-3)


def test_a_layer_of_other_words_has_no_statistics_of_channels_and_a_scale_of_one():
    module = tiny.model([("noop", "linear"), ("gqa-2", "swiglu-6")])
    for importance in ("independent", "iterative"):
        found = collect_statistics(module, [batch()], importance)
        assert found.channel_importance[0] is None
        assert found.linear_scale["attention"][0] == found.linear_scale["ffn"][0] == 1.0
        assert found.channel_importance[1].shape == (6,)  # type: ignore[union-attr]


def test_rounds_take_the_most_first():
    """width·(1 - r/rounds)² are left after round r."""
    assert schedule(100, 4) == [56, 25, 6, 0]
    assert schedule(6, 3) == [3, 1, 0]
    assert schedule(2, 4) == [1, 0]  # rounds that take nothing are left out
    assert schedule(1, 1) == [0]


def test_iterative_importance_weighs_what_is_gone_already(parent: Transformer):
    """c_i = mean ‖s + x_i W_i‖, s what the channels removed gave (ModelOpt)."""
    ffn, x = parent.blocks[1].ffn, torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    inner, down = channels_of(ffn, array(x)), array(ffn.op.down_proj.weight)
    left, order = list(range(6)), []
    for stay in (3, 1, 0):
        gone = inner[:, order] @ down[:, order].T
        harm = {i: np.linalg.norm(gone + inner[:, [i]] * down[:, i], axis=-1).sum() for i in left}
        taken = sorted(left, key=harm.__getitem__)[: len(left) - stay]
        order += taken
        left = [i for i in left if i not in taken]
    assert removal_order(ffn, x, 3).argsort().tolist() == order


# Block-wise local distillation (Puzzle §2.3): MSE(o_parent, o_child) / MSE(o_parent, 0).

UNITS = [Unit(0, "attention", "gqa-1"), Unit(0, "ffn", "swiglu-3"), Unit(2, "ffn", "linear")]


def swapped(parent: Transformer, unit: Unit, module: Subblock) -> Transformer:
    child = tiny.model([("gqa-2", "swiglu-6")] * 3, seed=1).requires_grad_(False)
    child.replace(unit.layer, unit.kind, module)
    return child


def test_a_units_loss_is_its_blocks_squared_error_over_the_parents_square(parent: Transformer):
    given = batch()
    given.weight = (given.segments >= 0).float()
    statistics = collect_statistics(parent, [given])
    space = Space(((("gqa-2", "gqa-1"), ("swiglu-6", "swiglu-3", "linear")),) * 3)
    library = BlockLibrary.from_parent(parent, space, statistics, UNITS)
    objective = BLD(parent, statistics)
    told: dict[str, float] = {}
    for loss, stats in objective.losses(library, given):
        assert loss.item() == pytest.approx(sum(float(one) for one in stats.values()), rel=1e-5)
        told |= {key: float(one) for key, one in stats.items()}
    assert list(told) == ["bld/00.attention.gqa-1", "bld/00.ffn.swiglu-3", "bld/02.ffn.linear"]
    measured = objective.measure(library, [given, given])
    for unit in UNITS:
        child = swapped(parent, unit, library[str(unit)])  # type: ignore[arg-type]
        own, theirs = (streams(module, given)[unit.layer + 1] for module in (child, parent))
        ratio = ((own - theirs) ** 2).mean() / (theirs**2).mean()
        mean = told[f"bld/{unit.layer:02d}.{unit.kind}.{unit.word}"] / 13
        assert mean == pytest.approx(ratio, rel=1e-3)
        assert measured[unit] == pytest.approx(ratio, rel=1e-3)
    given.weight[0] = 0.0  # what is not trained has no part in it
    before = sum(loss.item() for loss, _ in objective.losses(library, given))
    given.weight *= 2.0
    after = sum(loss.item() for loss, _ in objective.losses(library, given))
    assert after == pytest.approx(2 * before) and before < sum(told.values())


# Replace-one scores (Puzzle §2.4): means over held-out tokens, as changes to the parent's own.


def metrics(parent: Transformer, child: Transformer, batches: list[Batch]) -> dict[str, float]:
    sums, total = dict.fromkeys(("kl", "lm_loss", "cosine", "agreement"), 0.0), 0.0
    for one in batches:
        theirs, own = (array(m(one.tokens, context_of(one))) for m in (parent, child))
        p, q = softmax(theirs @ array(parent.head).T), softmax(own @ array(child.head).T)
        columns = {
            "kl": (p * np.log(p / q)).sum(-1),
            "lm_loss": -np.log(np.take_along_axis(q, one.labels.numpy()[..., None], -1))[..., 0],
            "cosine": 1 - cosine(theirs, own),
            "agreement": (p.argmax(-1) == q.argmax(-1)).astype(float),
        }
        weight = one.weight.numpy()
        total += weight.sum()
        for key, values in columns.items():
            sums[key] += (values * weight).sum()
    return {key: value / total for key, value in sums.items()}


def test_a_score_is_what_one_swap_alone_changes(parent: Transformer):
    given, batches = tiny.model([("gqa-2", "swiglu-6")] * 3, seed=1), [batch(3), batch(4)]
    statistics = collect_statistics(parent, [batch()])
    units = {
        Unit(1, "attention", "gqa-1"): cut(parent.blocks[1].attention, parent.config, GQA(1)),
        Unit(1, "ffn", "noop"): Subblock(parent.config, NoOp()),
        Unit(2, "ffn", "linear"): cut(parent.blocks[2].ffn, parent.config, Linear()),
    }
    assert statistics
    own, rows = score_given(given.requires_grad_(False), parent, units, batches)
    expected = metrics(parent, parent, batches)
    assert own == pytest.approx(expected, rel=1e-4, abs=1e-5) and own["agreement"] == 1.0
    assert [(row["layer"], row["kind"], row["word"]) for row in rows] == list(units)
    for row, (unit, module) in zip(rows, units.items(), strict=True):
        found = metrics(parent, swapped(parent, unit, module), batches)
        assert row["tokens"] == round(2 * sum(batch().weight.flatten().tolist()))
        assert row["kl"] == pytest.approx(found["kl"] - own["kl"], rel=1e-3)
        assert row["lm_loss"] == pytest.approx(found["lm_loss"] - own["lm_loss"], rel=1e-3)
        assert row["cosine"] == pytest.approx(found["cosine"], rel=1e-3)
        assert row["agreement"] == pytest.approx(found["agreement"])


def test_finished_batches_are_read_again_and_not_computed(
    parent: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    units: dict[Unit, Any] = {Unit(1, "ffn", "noop"): Subblock(parent.config, NoOp())}
    batches = [batch(3), batch(4)]
    told: dict[str, Any] = {"stage": "score", "config": {}, "inputs": {}, "seed": 0}
    plain = score_given(parent, parent, units, batches)
    with Run.open(tmp_path / "run", quiet=True, **told) as run:
        assert score_given(parent, parent, units, batches, (), run) == plain
        monkeypatch.setattr(Target, "of", None)
        assert score_given(parent, parent, units, batches, (), run) == plain
        with pytest.raises(TypeError):  # the third is new
            score_given(parent, parent, units, [batch(3)] * 3, (), run)


def test_scores_of_an_architecture_are_changes_to_it_and_what_was_taken_may_come_back(
    parent: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    batches = [batch(3), batch(4)]
    space = Space(((("gqa-2", "gqa-1"), ("swiglu-6", "linear")),) * 3)
    statistics = collect_statistics(parent, [batch()])
    library = BlockLibrary.from_parent(parent, space, statistics)
    save_model(parent, tmp_path / "parent")
    save_library(library, tmp_path / "library")
    monkeypatch.setattr(ConditionalConfig, "heldout", lambda self, data: batches)
    made = ConditionalConfig(), tmp_path / "parent", tmp_path, tmp_path / "data", space
    rescorer = Rescorer(*made)
    words = [("gqa-2", "swiglu-6"), ("gqa-1", "swiglu-6"), ("gqa-2", "swiglu-6")]
    current = swapped(parent, taken := Unit(1, "attention", "gqa-1"), library[str(taken)])  # type: ignore[arg-type]
    expected = metrics(parent, current, batches)
    own, rows = rescorer.measure(words)
    assert own == pytest.approx(expected, rel=1e-3, abs=1e-6)
    table = {Unit(row["layer"], row["kind"], row["word"]): row for row in rows}
    assert len(table) == len(rows) == 3 * 4
    assert table[taken]["kl"] == 0.0 == table[Unit(0, "ffn", "swiglu-6")]["lm_loss"]
    back = table[Unit(1, "attention", "gqa-2")]  # the parent's own, in its place again
    whole = metrics(parent, parent, batches)
    for metric in ("kl", "lm_loss", "cosine"):
        change = whole[metric] - expected[metric]
        assert back[metric] == pytest.approx(change, rel=1e-2, abs=1e-5)
    assert back["agreement"] == 1.0
    current.replace(2, "ffn", library["02/ffn/linear"])  # type: ignore[arg-type]
    both = metrics(parent, current, batches)
    found = table[Unit(2, "ffn", "linear")]
    assert found["kl"] == pytest.approx(both["kl"] - expected["kl"], rel=1e-2)
    told: dict[str, Any] = {"stage": "search", "config": {}, "inputs": {}, "seed": 0}
    with Run.open(tmp_path / "run", quiet=True, **told) as run:
        assert Rescorer(*made, run).measure(words) == (own, rows)
        monkeypatch.setattr(Target, "of", None)  # a search that goes on measures nothing again
        assert Rescorer(*made, run).measure(words) == (own, rows)
    defaults = ConditionalConfig()
    assert (defaults.rounds, defaults.polish, defaults.changes) == (4, 4, 0.25)


def test_a_tasks_score_is_the_surprise_at_answers_and_the_share_of_whole_ones(parent: Transformer):
    """Problems of 2 + 2, 1 + 3 and 3 + 1 tokens; one of them is what the model would say."""
    problems = [([3, 5, 7, 2], 2), ([4, 6, 1, 8], 1), ([9, 9, 1, 0], 3)]
    with torch.no_grad():
        for at in (2, 3):
            ids = torch.tensor([problems[0][0][:at]])
            problems[0][0][at] = int(parent.logits(parent(ids))[0, -1].argmax())
    packed = pack_problems("t", problems, 6, 0)
    assert [one.count for one in packed] == [2, 1] and all(isinstance(p, Answers) for p in packed)
    surprise, whole, tokens = 0.0, 0, 0
    for ids, start in problems:
        hidden = array(parent(torch.tensor([ids[:-1]])))[0]
        log_q = np.log(softmax(hidden @ array(parent.head).T))
        said = [(at, ids[at + 1]) for at in range(start - 1, 3)]
        surprise -= sum(log_q[at, label] for at, label in said)
        whole += all(log_q[at].argmax() == label for at, label in said)
        tokens += len(said)
    own, _ = score_given(parent, parent, {}, [batch()], packed)
    assert own["task.t"] == pytest.approx(surprise / tokens, rel=1e-4)
    assert own["task.t.accuracy"] == pytest.approx(whole / 3) and whole >= 1


# FFN Fusion (§3.1, §3.2).


@pytest.mark.parametrize("bias", [False, True])
def test_a_fused_ffn_is_the_sum_of_the_ffns_each_with_its_norm(bias: bool):
    words = [("noop", "swiglu-3"), ("noop", "swiglu-5"), ("noop", "swiglu-2")]
    module = tiny.model(words, seed=2, mlp_bias=bias)
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    expected = np.zeros((2, 3, 16))
    for block in module.blocks:
        op, normed = block.ffn.op, rms_norm(array(x), array(block.ffn.norm.weight))
        parts = [
            normed @ array(p.weight).T + (array(p.bias) if bias else 0)
            for p in (op.gate_proj, op.up_proj)
        ]
        expected += (silu(parts[0]) * parts[1]) @ array(op.down_proj.weight).T
        expected += array(op.down_proj.bias) if bias else 0
    fused = fuse_ffns([block.ffn for block in module.blocks], module.config)
    assert fused.variant == SwiGLU(10) and torch.equal(fused.norm.weight, torch.ones(16))
    context = Context.rows(torch.zeros(2, 3, dtype=torch.long))
    np.testing.assert_allclose(array(fused(x, context)), expected, rtol=1e-4, atol=1e-5)


def test_dependency_is_how_much_a_blocks_share_turns_without_another():
    """M_ij = 1 - cos(h_j, h_j without block i), a mean over the tokens of all batches."""
    words = [("gqa-2", "swiglu-6"), ("noop", "swiglu-3"), ("noop", "noop"), ("linear", "noop")]
    module = tiny.model(words, seed=3).requires_grad_(False)
    batches = [batch(5), batch(6)]
    steps: list[int] = []
    found = dependency_matrix(module, batches, lambda: steps.append(1))
    assert len(steps) == 2 * 4
    expected = np.zeros((4, 4))
    for i in (0, 1):  # block 2 is empty, and nothing comes behind block 3
        for one in batches:
            real, whole = one.segments >= 0, streams(module, one)
            context = module.prepare(context_of(one))
            x = next(iter(module.hidden_states(one.tokens, context)))
            for j, block in enumerate(module.blocks):
                if j == i:
                    continue
                out = block(x, context)
                if j > i and j != 2:
                    own, without = whole[j + 1] - whole[j], array((out - x)[real])
                    expected[i, j] += (1 - cosine(own, without)).sum() / 26
                x = out
    np.testing.assert_allclose(array(found), expected, rtol=1e-3, atol=1e-6)
    assert expected[0, 1] > 1e-3 and expected[1, 3] > 1e-4


def test_a_run_is_fused_where_no_two_of_it_depend_on_each_other():
    words = [("gqa-2", "swiglu-6"), *[("noop", "swiglu-4")] * 4, ("gqa-2", "noop")]
    config = tiny.config(words)
    assert fusable_runs(config) == [[1, 2, 3]]  # the last of a run is sensitive
    assert fusable_runs(config, keep_last=False) == [[1, 2, 3, 4]]
    assert fusable_runs(config, max_width=12) == [[1, 2, 3]]
    assert fusable_runs(config, max_width=11) == [[1, 2]]
    assert fusable_runs(config, max_width=8, keep_last=False) == [[1, 2], [3, 4]]
    dependency = torch.zeros(6, 6)
    dependency[1, 3] = 0.25  # the third may not read the first, though it may the second
    assert fusable_runs(config, None, dependency, 0.25, False) == [[1, 2, 3, 4]]
    assert fusable_runs(config, None, dependency, 0.2, False) == [[1, 2], [3, 4]]
    assert fusable_runs(config, None, dependency.T, 0.2, False) == [[1, 2, 3, 4]]
    broken = tiny.config([("noop", "swiglu-4"), ("noop", "linear"), *[("noop", "swiglu-4")] * 3])
    assert fusable_runs(broken) == [[2, 3]]
    assert fusable_runs(tiny.config([("linear", "swiglu-4")] * 3), keep_last=False) == []
