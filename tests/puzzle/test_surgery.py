"""What surgery keeps exactly: the functions that lose nothing, and the formulas of the paper."""

from __future__ import annotations

import torch

from tessera.model.config import GQA, Linear, NoOp, SwiGLU
from tessera.model.context import Context
from tessera.puzzle.surgery import collect_statistics, cut
from tests.toy import toy_batch, toy_model


def _x() -> tuple[torch.Tensor, Context]:
    torch.manual_seed(0)
    model = toy_model()
    tokens = torch.zeros(2, 7, dtype=torch.long)
    return torch.randn(2, 7, 32), model.prepare(Context.rows(tokens))


def test_dropping_dead_channels_changes_nothing():
    model, (x, context) = toy_model(), _x()
    ffn = model.layers[0].ffn
    with torch.no_grad():
        ffn.op.down_proj.weight[:, ::2] = 0
    child = cut(ffn, model.config, SwiGLU(24))
    torch.testing.assert_close(child(x, context), ffn(x, context))


def test_channels_are_kept_by_importance():
    model = toy_model()
    ffn = model.layers[0].ffn
    importance = torch.zeros(48)
    importance[[3, 40]] = 1
    child = cut(ffn, model.config, SwiGLU(2), importance)
    assert torch.equal(child.op.gate_proj.weight, ffn.op.gate_proj.weight[[3, 40]])
    assert torch.equal(child.op.down_proj.weight, ffn.op.down_proj.weight[:, [3, 40]])


def test_pooling_equal_kv_heads_changes_nothing():
    model, (x, context) = toy_model(), _x()
    attention = model.layers[1].attention
    with torch.no_grad():
        for proj in (attention.op.k_proj, attention.op.v_proj):
            heads = proj.weight.view(4, 8, 32)
            heads[1], heads[3] = heads[0], heads[2]
    child = cut(attention, model.config, GQA(2))
    torch.testing.assert_close(child(x, context), attention(x, context))


def test_linear_attention_is_attention_to_oneself():
    model = toy_model()
    attention = model.layers[1].attention
    child = cut(attention, model.config, Linear())
    one = torch.zeros(5, 1, dtype=torch.long)  # a row of one token can only see itself
    x = torch.randn(5, 1, 32)
    context = model.prepare(Context.rows(one))
    torch.testing.assert_close(child(x, context), attention(x, context))


def test_a_noop_has_nothing():
    model = toy_model()
    child = cut(model.layers[0].ffn, model.config, NoOp())
    assert not list(child.parameters()) and child(*_x()) == 0.0


def test_channel_importance_is_the_papers_formula():
    model, batch = toy_model(), toy_batch(3)
    found = collect_statistics(model, [batch]).channel_importance[0]
    seen = []
    ffn = model.layers[0].ffn
    for projection in (ffn.op.gate_proj, ffn.op.up_proj):
        projection.register_forward_hook(lambda *call: seen.append(call[-1]))
    model(batch.tokens, Context(batch.positions, batch.segments))
    real = batch.segments >= 0
    gate, up = seen
    inner = torch.nn.functional.silu(gate) * up
    expected = inner[real].abs().mean(0) * ffn.op.down_proj.weight.norm(dim=0)
    torch.testing.assert_close(found, expected)


def test_statistics_do_not_depend_on_the_batching():
    model, batches = toy_model(), [toy_batch(i) for i in range(3)]
    from tests.toy import split_rows

    whole = collect_statistics(model, batches)
    parts = collect_statistics(model, [row for b in batches for row in split_rows(b)])
    torch.testing.assert_close(whole.output_scale, parts.output_scale)
    torch.testing.assert_close(whole.block_influence, parts.block_influence)


def test_the_linear_scale_is_least_squares():
    model, batch = toy_model(), toy_batch(4)
    found = collect_statistics(model, [batch]).linear_scale["ffn"][0]
    context = model.prepare(Context(batch.positions, batch.segments))
    block, real = model.layers[0], batch.segments >= 0
    with torch.no_grad():
        x = model.embed_tokens(batch.tokens)
        x = x + block.attention(x, context)
        y = block.ffn(x, context)[real]
        guess = cut(block.ffn, model.config, Linear())(x, context)[real]

    def error(scale: float) -> float:
        return float((y - scale * guess).square().sum())

    assert error(found) < min(error(found * 0.99), error(found * 1.01), error(1.0))
