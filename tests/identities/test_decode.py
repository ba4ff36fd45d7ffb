"""decode = prefill, for every mix of words: the engine's log-probs against the module's forward."""

from __future__ import annotations

import itertools

import pytest
import torch

from tessera.generate.engine import SamplingParams
from tessera.generate.torch_engine import TorchEngine
from tessera.model.transformer import Transformer
from tests import tiny

ATTENTION = ("gqa-1", "gqa-2", "gqa-4", "linear", "noop")
FFN = ("swiglu-8", "swiglu-40", "linear", "noop")
VOCABULARY = 29
SAMPLED = SamplingParams(max_tokens=7, temperature=1.0, seed=1, logprobs=VOCABULARY)

mixes = [
    (("gqa-2", "swiglu-16"), mix, ("gqa-4", "swiglu-8"))
    for mix in itertools.product(ATTENTION, FFN)
]


@torch.no_grad()
def assert_decode_is_prefill(module: Transformer, lengths=(3, 7, 5), **engine: int) -> None:
    """Prompts of different lengths in one batch; all log-probs of every step, first token to last.

    The first new token's come from the engine's prefill, the others' from its decode steps.
    """
    prompts = [tiny.tokens(VOCABULARY, n, seed=i).tolist() for i, n in enumerate(lengths)]
    found = TorchEngine(module, **engine).generate(prompts, SAMPLED)
    for prompt, (completion,) in zip(prompts, found, strict=True):
        tokens = torch.tensor([prompt + completion.token_ids])
        expected = module.logits(module(tokens))[0, len(prompt) - 1 : -1].log_softmax(-1)
        rows = [[value for _, value in sorted(top)] for top in completion.top_logprobs]
        assert len(rows) == SAMPLED.max_tokens
        torch.testing.assert_close(torch.tensor(rows), expected, atol=1e-5, rtol=0)


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


@pytest.mark.parametrize("chunk", [1, 5, 6])
def test_prefill_in_chunks_is_prefill(chunk):
    assert_decode_is_prefill(tiny.model(sliding_window=5), (12, 12), chunk_tokens=chunk)
