"""Packing: a document's logits, and its gradients, do not depend on its neighbours."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.model.context import Context
from tests import tiny

MODELS = {
    "mosaic": {},
    "window": {"sliding_window": 3},
    "qk_norm": {"qk_norm": True, "qkv_bias": True},
}


def packed(lengths: list[list[int]], length: int) -> Context:
    """Rows of documents of these lengths, padding (-1) behind them up to `length`."""
    positions, segments = torch.zeros(2, len(lengths), length, dtype=torch.long)
    segments -= 1
    for row, sizes in enumerate(lengths):
        start = 0
        for document, size in enumerate(sizes):
            positions[row, start : start + size] = torch.arange(size)
            segments[row, start : start + size] = document
            start += size
    return Context(positions, segments)


def documents(lengths: list[list[int]]):
    """(row, slice) of each document."""
    for row, sizes in enumerate(lengths):
        ends = torch.tensor(sizes).cumsum(0).tolist()
        for size, end in zip(sizes, ends, strict=True):
            yield row, slice(end - size, end)


rows = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=3)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@settings(derandomize=True, deadline=None, max_examples=25)
@given(lengths=rows, padding=st.integers(0, 3))
@torch.no_grad()
def test_a_document_packed_is_the_document_alone(changes, lengths, padding):
    module = tiny.model(**changes)
    length = max(map(sum, lengths)) + padding
    tokens = tiny.tokens(29, len(lengths), length)
    together = module.logits(module(tokens, packed(lengths, length)))
    for row, part in documents(lengths):
        alone = module.logits(module(tokens[row : row + 1, part]))[0]
        torch.testing.assert_close(together[row, part], alone, atol=1e-5, rtol=0)


LENGTHS = [[5, 2, 4], [7], [1, 1, 6]]


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_gradients_stay_inside_a_document(changes):
    module, tokens = tiny.model(**changes), tiny.tokens(29, 3, 12)
    for row, part in documents(LENGTHS):
        module.zero_grad()
        first, *_, last = module.hidden_states(tokens, packed(LENGTHS, 12))
        first.retain_grad()
        module.logits(module.norm(last))[row, part].square().sum().backward()
        assert first.grad is not None
        reached = first.grad.abs().amax(-1) > 0
        inside = torch.zeros_like(reached)
        inside[row, part] = True
        assert torch.equal(reached, inside)
        together = {k: p.grad.clone() for k, p in module.named_parameters() if p.grad is not None}
        module.zero_grad()
        module.logits(module(tokens[row : row + 1, part])).square().sum().backward()
        for key, p in module.named_parameters():
            torch.testing.assert_close(together[key], p.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_other_tokens_next_door_change_no_bit(changes):
    module = tiny.model(**changes)
    one, other = tiny.tokens(29, 3, 12), tiny.tokens(29, 3, 12, seed=1)
    other[0, 5:7] = one[0, 5:7]
    logits = [module.logits(module(tokens, packed(LENGTHS, 12)))[0, 5:7] for tokens in (one, other)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("prompt", [1, 4])
def test_answers_that_share_a_prompt_are_each_the_whole_alone(changes, prompt: int):
    """Row 0: the prompt, an unrelated document, three answers to it; row 1: another prompt's."""
    module = tiny.model(**changes)
    answers, stray = [3, 1, 5], 4
    sizes = [prompt, stray, *answers]
    length = sum(sizes) + 2
    tokens = tiny.tokens(29, 2, length)
    segments, prefix = torch.full((2, 2, length), -1)
    positions = torch.zeros(2, length, dtype=torch.long)
    spans, start = [], 0
    for number, size in enumerate(sizes):
        part, begins = slice(start, start + size), prompt if number > 1 else 0
        segments[:, part], positions[:, part] = number, torch.arange(begins, begins + size)
        prefix[:, part] = 0 if number > 1 else -1
        spans, start = [*spans, part], start + size
    context = Context(positions, segments, prefix=prefix)
    together = module.logits(module(tokens, context))
    together[:, spans[4]].square().sum().backward()
    gradients = {k: p.grad.clone() for k, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    for row in range(2):
        for part in spans[2:]:
            whole = torch.cat((tokens[row, :prompt], tokens[row, part]))[None]
            alone = module.logits(module(whole))[0, prompt:]
            torch.testing.assert_close(together[row, part], alone, atol=1e-5, rtol=0)
            if part is spans[4]:
                alone.square().sum().backward()
        alone = module.logits(module(tokens[row : row + 1, spans[1]]))[0]
        torch.testing.assert_close(together[row, spans[1]], alone, atol=1e-5, rtol=0)
    for key, p in module.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[key], p.grad, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_padding_behind_a_row_changes_nothing():
    module, tokens = tiny.model(), tiny.tokens(29, 2, 9)
    padded = module(tokens, packed([[9], [4]], 9))
    torch.testing.assert_close(padded[0], module(tokens)[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(padded[1, :4], module(tokens[1:, :4])[0], atol=1e-5, rtol=0)
