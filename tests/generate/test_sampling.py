"""Drawing: frequencies are the softmax's, supports are the filters', noise is a pure function."""

from __future__ import annotations

import pytest
import torch

from tessera.generate.engine import GenerationError, SamplingParams
from tessera.generate.sampling import Sampler, draw, nucleus, uniforms

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -4.0])
DRAWS = 20_000
# The 99.9 % quantile of chi-square, by degrees of freedom.
CHI_SQUARE = {2: 13.82, 5: 20.52}


def sample(logits: torch.Tensor, params: SamplingParams, noise: torch.Tensor) -> torch.Tensor:
    return Sampler([params] * len(logits)).choose(logits, noise).tokens


def counts(params: SamplingParams) -> torch.Tensor:
    noise = torch.tensor(uniforms(0, 0, 0, DRAWS), dtype=torch.float64)
    drawn = sample(LOGITS.expand(DRAWS, -1), params, noise)
    return torch.bincount(drawn, minlength=len(LOGITS)).double()


@pytest.mark.parametrize(
    "params, kept",
    [
        (SamplingParams(temperature=1.0), 6),
        (SamplingParams(temperature=0.7), 6),
        (SamplingParams(temperature=2.0), 6),
        (SamplingParams(temperature=1.0, top_k=3), 3),
        (SamplingParams(temperature=1.3, top_p=0.8), 3),
        (SamplingParams(temperature=1.3, top_k=4, top_p=0.85), 3),
        (SamplingParams(temperature=1.0, min_p=0.2), 3),
        (SamplingParams(temperature=1.0, top_p=0.99, min_p=0.2), 3),
    ],
    ids=str,
)
def test_frequencies_are_those_of_the_filtered_softmax(params, kept):
    weights = (LOGITS.double() / params.temperature).softmax(-1)
    weights[kept:] = 0
    expected = weights / weights.sum() * DRAWS
    found = counts(params)
    assert found[kept:].sum() == 0
    statistic = ((found - expected)[:kept] ** 2 / expected[:kept]).sum()
    assert statistic < CHI_SQUARE[kept - 1]


def test_nucleus_keeps_the_smallest_set_that_reaches_the_mass():
    ranked = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.97, 0.01, 0.01, 0.01]])
    assert (nucleus(ranked, 0.75) > 0).tolist() == [
        [True, True, False, False],
        [True] + [False] * 3,
    ]
    assert (nucleus(ranked, 1e-9) > 0).sum(-1).tolist() == [1, 1]
    assert torch.equal(nucleus(ranked, 1.0), ranked)


def test_top_k_of_one_is_greedy():
    noise = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    drawn = sample(LOGITS.expand(3, -1), SamplingParams(top_k=1), noise)
    assert drawn.tolist() == [0, 0, 0]


def test_a_token_without_weight_is_never_drawn():
    weights = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    noise = torch.tensor([0.0, 0.25, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(weights.expand(4, -1), noise).tolist() == [1, 3, 3, 3]


def test_ties_in_top_k_keep_exactly_k():
    noise = torch.tensor(uniforms(0, 0, 0, 200), dtype=torch.float64)
    drawn = sample(torch.zeros(200, 9), SamplingParams(top_k=4), noise)
    assert drawn.unique().tolist() == [0, 1, 2, 3]


def test_logprobs_are_those_of_the_raw_logits():
    noise = torch.tensor([0.9], dtype=torch.float64)
    for params in (SamplingParams(temperature=0), SamplingParams(temperature=3.0, top_k=2)):
        found = Sampler([params]).choose(LOGITS[None], noise)
        assert found.logprobs[0] == LOGITS.log_softmax(-1)[found.tokens[0]]


MIXED = (
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=1.1, top_k=3),
    SamplingParams(temperature=1.2, top_p=0.7),
    SamplingParams(temperature=1.5, top_k=5, top_p=0.9, min_p=0.1),
    SamplingParams(temperature=2.0, min_p=0.3),
    SamplingParams(temperature=0, repetition_penalty=1.5),
    SamplingParams(temperature=1.0, repetition_penalty=0.5, top_k=2),
)


def test_a_row_is_drawn_as_if_it_were_alone():
    generator = torch.Generator().manual_seed(0)
    for trial in range(50):
        logits = torch.randn(len(MIXED), 40, generator=generator) * 2
        noise = torch.rand(len(MIXED), generator=generator, dtype=torch.float64)
        seen = torch.rand(len(MIXED), 40, generator=generator) < 0.5
        together = Sampler(MIXED).choose(logits, noise, seen=seen)
        for i, params in enumerate(MIXED):
            one = slice(i, i + 1)
            alone = Sampler([params]).choose(logits[one], noise[one], seen=seen[one])
            assert alone.tokens[0] == together.tokens[i], (trial, params)
            assert alone.logprobs[0] == together.logprobs[i]


def test_the_penalty_turns_the_choice_away_from_what_was_seen():
    sampler = Sampler([SamplingParams(temperature=0, repetition_penalty=3.0)])
    seen = torch.zeros(1, len(LOGITS), dtype=torch.bool)
    assert sampler.choose(LOGITS[None], seen=seen).tokens == 0
    seen[0, 0] = True  # 2 / 3 is below the second's 1
    found = sampler.choose(LOGITS[None], seen=seen)
    assert found.tokens == 1 and found.logprobs == LOGITS.log_softmax(-1)[1]


def test_the_likeliest_tokens_are_reported_with_their_raw_logprobs():
    sampler = Sampler([SamplingParams(temperature=0, logprobs=2), SamplingParams(temperature=0)])
    top = sampler.choose(LOGITS.expand(2, -1)).top
    assert top is not None
    ids, values = top
    assert ids[0].tolist() == [0, 1] and torch.equal(values[0], LOGITS.log_softmax(-1)[:2])
    assert Sampler([SamplingParams(logprobs=99, temperature=0)]).choose(LOGITS[None]).top


def test_a_forced_token_comes_with_the_models_logprob():
    sampler = Sampler([SamplingParams(temperature=0)] * 2)
    found = sampler.choose(LOGITS.expand(2, -1), forced=torch.tensor([-1, 4]))
    assert found.tokens.tolist() == [0, 4]
    assert found.logprobs[1] == LOGITS.log_softmax(-1)[4]


def test_noise_is_a_function_of_seed_key_sample_and_position():
    stream = uniforms(1, 2, 3, 100)
    assert uniforms(1, 2, 3, 10) == stream[:10]
    others = [uniforms(*who, 100) for who in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (1, -2, 3))]
    assert not set(stream).intersection(*others)
    assert 0 <= min(stream) and max(stream) < 1
    # Written down: no release of numpy may change a completion.
    assert uniforms(0, 0, 0, 2) == [0.011546754286331562, 0.24154919656271812]


def test_a_temperature_near_zero_is_greedy():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 10
    for temperature in (1e-6, 1e-30, 1e-39, 5e-324):
        for more in ({}, {"top_p": 0.9}):
            sampler = Sampler([SamplingParams(temperature=temperature, **more)] * 4)
            found = sampler.choose(logits, torch.full((4,), 0.5, dtype=torch.float64))
            assert torch.equal(found.tokens, logits.argmax(-1))


def test_penalties_and_bias_are_openais_formula_row_by_row():
    """mu[j] += bias[j], then c[j] * frequency and (c[j] > 0) * presence are taken off."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 11, generator=generator)
    said = [[1, 1, 4], [2], [], [7, 7, 7, 7], [0, 3]]
    rows = [
        SamplingParams(temperature=0, frequency_penalty=0.7, presence_penalty=-0.4),
        SamplingParams(temperature=0, presence_penalty=1.5, logit_bias=((2, 4.0), (10, -3.0))),
        SamplingParams(temperature=0, logit_bias=((0, 100.0),)),
        SamplingParams(temperature=0, frequency_penalty=-2.0),
        SamplingParams(temperature=0),
    ]
    counts = torch.stack([torch.bincount(torch.tensor(s).long(), minlength=11) for s in said])
    expected = logits.clone()
    for row, (params, tokens) in enumerate(zip(rows, said, strict=True)):
        for token, bias in params.logit_bias:
            expected[row, token] += bias
        for token in set(tokens):
            expected[row, token] -= params.frequency_penalty * tokens.count(token)
            expected[row, token] -= params.presence_penalty
    sampler = Sampler(rows)
    assert torch.allclose(sampler._penalised(logits, None, counts.float()), expected)
    chosen = sampler.choose(logits, counts=counts.float())
    assert torch.equal(chosen.tokens, expected.argmax(-1))
    raw = logits.log_softmax(-1).gather(-1, chosen.tokens[:, None])[:, 0]
    assert torch.allclose(chosen.logprobs, raw)


def test_repetition_penalty_and_bias_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(1))
    held = torch.tensor([[1, 5, 5], [0, 8, 2]])
    params = SamplingParams(temperature=0, repetition_penalty=1.7, logit_bias=((4, 2.5), (8, -1.0)))
    seen = torch.zeros(2, 9, dtype=torch.bool).scatter(1, held, True)
    biased = transformers.SequenceBiasLogitsProcessor({(4,): 2.5, (8,): -1.0})(held, logits)
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.7)(held, biased)
    assert torch.allclose(Sampler([params] * 2)._penalised(logits, seen, None), expected)


def test_what_is_not_allowed_is_never_drawn():
    allowed = torch.tensor([False, True, False, False, True, False]).expand(DRAWS, -1)
    noise = torch.tensor(uniforms(1, 0, 0, DRAWS), dtype=torch.float64)
    for params in (SamplingParams(), SamplingParams(top_k=5), SamplingParams(top_p=0.999)):
        drawn = Sampler([params] * DRAWS).choose(LOGITS.expand(DRAWS, -1), noise, allowed=allowed)
        assert drawn.tokens.unique().tolist() == [1, 4]


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
def test_a_penalty_that_is_no_number_is_refused(name: str):
    with pytest.raises(GenerationError, match=name):
        SamplingParams(**{name: float("nan")})
