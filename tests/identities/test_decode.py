"""decode = prefill, for every mix of words, rows of different lengths in one cache."""

from __future__ import annotations

import itertools

import pytest
import torch

from tessera.model.cache import KVCache
from tessera.model.context import Context
from tests import tiny

ATTENTION = ("gqa-1", "gqa-2", "gqa-4", "linear", "noop")
FFN = ("swiglu-8", "swiglu-40", "linear", "noop")
PROMPTS = (3, 7, 5)
NEW = 6

mixes = [
    (("gqa-2", "swiglu-16"), mix, ("gqa-4", "swiglu-8"))
    for mix in itertools.product(ATTENTION, FFN)
]


@torch.no_grad()
def assert_decode_is_prefill(module, prompts=PROMPTS, new=NEW):
    """Ragged prefill (padded behind), then one token a row a step, against whole rows."""
    rows = [
        tiny.tokens(module.config.vocab_size, length + new, seed=i)
        for i, length in enumerate(prompts)
    ]
    expected = [module(row[None])[0] for row in rows]
    cache = KVCache(module.config, len(rows), max(prompts) + new)
    batch = torch.zeros(len(rows), max(prompts), dtype=torch.long)
    for i, length in enumerate(prompts):
        batch[i, :length] = rows[i][:length]
    hidden = module(batch, Context.rows(batch), cache)
    for i, length in enumerate(prompts):
        torch.testing.assert_close(hidden[i, :length], expected[i][:length], atol=1e-5, rtol=0)
    for step in range(new):
        positions = torch.tensor(prompts)[:, None] + step
        token = torch.stack([row[p] for row, p in zip(rows, positions, strict=True)])
        hidden = module(token, Context(positions), cache)
        wanted = torch.stack([e[p] for e, p in zip(expected, positions, strict=True)])
        torch.testing.assert_close(hidden, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("words", mixes, ids=lambda words: "+".join(words[1]))
def test_decode_is_prefill(words):
    assert_decode_is_prefill(tiny.model(words))


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
        {"qk_norm": True, "head_dim": 6},
        {"sliding_window": 4},
        {"tie_word_embeddings": True, "rope_theta": 100.0},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_decode_is_prefill_in_every_family(changes):
    assert_decode_is_prefill(tiny.model(**changes))


def test_decode_is_prefill_without_any_attention():
    assert_decode_is_prefill(tiny.model([("noop", "swiglu-8"), ("linear", "noop")]))


@torch.no_grad()
def test_chunked_prefill_is_prefill():
    module, tokens = tiny.model(sliding_window=5), tiny.tokens(29, 2, 12)
    cache = KVCache(module.config, 2, 12)
    expected, positions = module(tokens), torch.arange(12).expand(2, -1)
    for chunk in (slice(0, 5), slice(5, 6), slice(6, 12)):
        hidden = module(tokens[:, chunk], Context(positions[:, chunk]), cache)
        torch.testing.assert_close(hidden, expected[:, chunk], atol=1e-5, rtol=0)
