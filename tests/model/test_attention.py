"""Every kernel computes the same attention: that of a dense mask over the whole rows."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tessera import dist
from tessera.model import attention
from tessera.model.attention import attend, attend_last
from tessera.model.context import Context, Part, zigzag
from tests.test_placement import fresh

HEADS, KV_HEADS, DIM = 4, 2, 8


def rows(seed: int, length: int = 48, count: int = 2) -> Context:
    """Rows of documents, half of which go on from an earlier one of their row, and padding."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))  # noqa: E731
    positions = torch.zeros(count, length, dtype=torch.long)
    segments, prefix = torch.full((2, count, length), -1)
    for row in range(count):
        at, number, root, first = 0, 0, 0, 0
        while at < length - 3:
            part = slice(at, min(at + draw(1, 20), length - 3))
            at = part.stop
            goes_on = number > 0 and draw(0, 2) == 1
            if not goes_on:
                root, first = number, 0
            segments[row, part], prefix[row, part] = number, root if goes_on else -1
            positions[row, part] = torch.arange(first, first + at - part.start)
            first = first if goes_on else at - part.start
            number += 1
    return Context(positions, segments, prefix=prefix)


def dense(context: Context) -> Tensor:
    """`(B, T, T)` which tokens see which, by definition."""
    assert context.segments is not None
    mine, theirs = context.segments[:, :, None], context.segments[:, None]
    order = torch.arange(mine.shape[1])
    seen = (mine == theirs) & (order[:, None] >= order)
    if context.prefix is not None:
        seen |= (context.prefix[:, :, None] == theirs) & (context.prefix[:, :, None] >= 0)
    if context.sliding_window is not None:
        distance = context.positions[:, :, None] - context.positions[:, None]
        seen &= distance < context.sliding_window
    return seen


def tensors(*shape: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [torch.randn(*shape, h, DIM, generator=generator, requires_grad=True) for h in heads]


def by_sdpa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)


def varlen(q: Tensor, k: Tensor, v: Tensor, *sizes: Any, **settings: Any) -> Tensor:
    """What torch says of `varlen_attn`, by products: its kernel needs a GPU."""
    query_ends, key_ends, most_queries, most_keys = sizes
    assert query_ends.dtype == key_ends.dtype == torch.int32
    left, right = settings["window_size"]
    found, sizes = [], (query_ends.diff().max(), key_ends.diff().max())
    assert sizes == (most_queries, most_keys) and right == 0
    if settings["scale"] is not None:
        q = q * settings["scale"] * q.shape[-1] ** 0.5
    spans = zip(query_ends.unfold(0, 2, 1), key_ends.unfold(0, 2, 1), strict=True)
    for (a, b), (c, d) in spans:
        distance = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        seen = (distance >= 0) & ((distance <= left) | (left < 0))
        found.append(by_sdpa(q[None, a:b], k[None, c:d], v[None, c:d], seen)[0])
    return torch.cat(found)


@pytest.fixture(params=["rows", "portions", "sequences"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "sequences":
        monkeypatch.setattr(attention, "has_flash", lambda q: True)
        monkeypatch.setattr(attention, "varlen_attn", varlen)
    elif request.param == "portions":
        monkeypatch.setattr(attention, "MASK", 8)
        monkeypatch.setattr(attention, "FEWEST", 3)
    return request.param


def assert_same(out: Tensor, expected: Tensor, inputs: list[Tensor], real: Tensor) -> None:
    """Outputs and gradients of tokens that are no padding."""
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((out * slope)[real].sum(), inputs)
    wanted = torch.autograd.grad((expected * slope)[real].sum(), inputs)
    torch.testing.assert_close(out[real], expected[real], atol=1e-5, rtol=1e-5)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


WINDOWS = pytest.mark.parametrize("window", [None, 1, 5])


@WINDOWS
@pytest.mark.parametrize("prefix", [True, False])
def test_packed_rows_are_a_dense_mask(kernel: str, window: int | None, prefix: bool):
    for seed in range(4):
        context = replace(rows(seed), sliding_window=window)
        context.prefix = context.prefix if prefix else None
        inputs = tensors(*context.positions.shape)
        expected = by_sdpa(*inputs, dense(context)[:, None])
        assert_same(attend(*inputs, context), expected, inputs, context.segments >= 0)


@WINDOWS
@pytest.mark.parametrize("ahead", [0, 9])
def test_the_last_tokens_of_rows_are_a_dense_mask(kernel: str, window: int | None, ahead: int):
    q, k, v = tensors(2, 30)
    own = q[:, ahead:]
    distance = torch.arange(30)[ahead:, None] - torch.arange(30)
    seen = (distance >= 0) & (distance < (window or 30))
    expected = by_sdpa(own * 3, k, v, seen)
    out = attend_last(own, k, v, window, scale=3 * DIM**-0.5)
    assert_same(out, expected, [q, k, v], torch.ones(2, 30 - ahead, dtype=torch.bool))


@WINDOWS
@pytest.mark.parametrize("world", [2, 3])
def test_parts_of_rows_are_the_whole(
    kernel: str, window: int | None, world: int, monkeypatch: pytest.MonkeyPatch
):
    """Documents and prompts before answers cross the cuts; each part is computed alone."""
    context = replace(rows(0), sliding_window=window)
    q, k, v = inputs = tensors(*context.positions.shape)
    columns = [
        torch.cat([torch.arange(*span) for span in zigzag(48, rank, world)])
        for rank in range(world)
    ]
    order = torch.cat(columns)
    out = torch.empty_like(q)
    for rank, own in enumerate(columns):
        mesh: Any = SimpleNamespace(size=lambda: world, get_local_rank=lambda r=rank: r)
        part = Part(mesh, context.positions, context.segments, context.prefix)
        positions, segments = context.positions[:, own], context.segments[:, own]
        gathered = [x[:, order].transpose(0, 1).flatten(0, 1) for x in (k, v)]
        monkeypatch.setattr(attention, "_all_parts", lambda *_, found=gathered: found)
        here = Context(positions, segments, sliding_window=window, part=part)
        out = out.index_copy(1, own, attend(q[:, own], k[:, own], v[:, own], here))
    expected = by_sdpa(*inputs, dense(context)[:, None])
    assert_same(out, expected, inputs, context.segments >= 0)


@pytest.mark.parametrize("what", ["window", "prefix"])
def test_no_mask_grows_with_the_square_of_a_row(what: str, monkeypatch: pytest.MonkeyPatch):
    length, sizes, sdpa = 8192, [], F.scaled_dot_product_attention

    def noted(*inputs: Tensor, attn_mask: Tensor | None, **settings: Any) -> Tensor:
        sizes.append(0 if attn_mask is None else attn_mask.numel())
        return sdpa(*inputs, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    context = Context(torch.arange(length)[None], sliding_window=64)
    if what == "prefix":  # one answer to a short prompt
        segments = (context.positions >= 8).long()
        context = Context(context.positions, segments, prefix=segments - 1)
    with torch.no_grad():
        attend(*(torch.randn(1, length, 1, 4) for _ in range(3)), context)
    assert len(sizes) > 8 and max(sizes) <= attention.MASK


def test_flash_attention_is_given_tensors_of_its_device():
    done = fresh(
        "-c",
        "from tests.pretend import device, pretended; device()\n"
        "from tessera.model import attention\n"
        "from tests.model.test_attention import Context, rows, tensors\n"
        "attention.has_flash = lambda q: True\n"
        "attention.varlen_attn = lambda q, k, v, a, b, *_, **__: q * a.sum() * b.sum()\n"
        "with pretended():\n"
        "    q, k, v = (x.detach().to(device()) for x in tensors(2, 48))\n"
        "    on = [getattr(rows(0), x).to(device()) for x in ('positions', 'segments', 'prefix')]\n"
        "    for context in (Context(*on[:2], prefix=on[2]), Context(*on[:2]), Context(on[0])):\n"
        "        assert attention.attend(q, k, v, context).device == device()",
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@WINDOWS
@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 3e-2), (torch.float32, 1e-4)])
def test_a_gpus_kernels_are_a_dense_mask(window: int | None, dtype: torch.dtype, near: float):
    context = replace(rows(0, 512), sliding_window=window)
    q, k, v = (x.detach().to(dist.device(), dtype).requires_grad_() for x in tensors(2, 512))
    assert attention.has_flash(q) == (dtype == torch.bfloat16)
    assert context.segments is not None and context.prefix is not None
    moved = Context(context.positions.to(q.device), context.segments.to(q.device))
    moved = replace(moved, sliding_window=window, prefix=context.prefix.to(q.device))
    inputs = [x.detach().cpu().float().requires_grad_() for x in (q, k, v)]
    expected = by_sdpa(*inputs, dense(context)[:, None])
    slope, real = torch.randn_like(expected), context.segments >= 0
    out = attend(q, k, v, moved)
    found = [out.cpu()[real], *torch.autograd.grad((out.cpu() * slope)[real].sum(), (q, k, v))]
    wanted = [expected[real], *torch.autograd.grad((expected * slope)[real].sum(), inputs)]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.cpu().float(), other, atol=near, rtol=near)
