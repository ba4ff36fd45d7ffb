"""Requests an engine cannot serve are refused with what to change."""

from __future__ import annotations

import math

import pytest
import torch

from tessera.generate.engine import GenerationError, SamplingParams, Thinking
from tessera.generate.torch_engine import TorchEngine
from tests import tiny


@pytest.mark.parametrize(
    "field, value, hint",
    [
        ("temperature", -0.5, "0 for greedy"),
        ("temperature", math.nan, "0 for greedy"),
        ("temperature", math.inf, "0 for greedy"),
        ("top_p", 0.0, r"\(0, 1\]"),
        ("top_p", 1.5, r"\(0, 1\]"),
        ("top_k", -1, "0 for no limit"),
        ("max_tokens", 0, "at least 1"),
        ("n", 0, "at least 1"),
        ("seed", -1, r"\[0, 2\*\*64\)"),
        ("min_p", 1.5, r"\[0, 1\]"),
        ("repetition_penalty", 0.0, "1 for none"),
        ("logprobs", -1, "0 for no report"),
    ],
)
def test_parameters_out_of_range_are_refused(field, value, hint):
    with pytest.raises(GenerationError, match=f"{field} is .*{hint}"):
        SamplingParams(**{field: value})


def test_a_thinking_budget_needs_an_end_and_one_the_model_knows():
    with pytest.raises(GenerationError, match="thinking budget is -1"):
        Thinking(-1, ((3,),))
    for ends, starts in (((), ()), (((),), ()), (((3,),), ((),))):
        with pytest.raises(GenerationError, match="sequence in ends"):
            Thinking(5, ends, starts)
    params = SamplingParams(thinking=Thinking(5, ((3, 29),)))
    with pytest.raises(GenerationError, match="end of thought 0 holds token id 29"):
        TorchEngine(tiny.model()).generate([[1]], params)


@pytest.mark.parametrize(
    "prompts, reason",
    [
        ([[1], []], "prompt 1 is empty"),
        ([[1] * 64], "prompt 0 has 64 tokens.*room for 63"),
        ([[1, 29]], "prompt 0 holds token id 29, but the vocabulary has 29"),
        ([[-1]], "token id -1"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompts, reason):
    with pytest.raises(GenerationError, match=reason):
        TorchEngine(tiny.model()).generate(prompts, SamplingParams())


def test_greedy_is_told_beside_the_score_and_the_last_token_is_not_read():
    engine = TorchEngine(tiny.model())
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [3]]
    written = engine.generate(prompts, SamplingParams(max_tokens=70, temperature=0))
    rows = [prompt + one.token_ids for prompt, (one,) in zip(prompts, written, strict=True)]
    assert {len(row) for row in rows} == {64}
    nexts = engine.generate([row[:-1] for row in rows], SamplingParams(max_tokens=1, temperature=0))
    assert [one.token_ids[-1] for (one,) in nexts] == [row[-1] for row in rows]
    for row, prompt, (values, greedy) in zip(rows, prompts, engine.score_greedy(rows), strict=True):
        assert values == engine.score([row])[0] and all(greedy[len(prompt) - 1 :])
    changed = [[*row[:40], (row[40] + 1) % 29, *row[41:], 7] for row in rows]
    for row, (values, greedy) in zip(changed, engine.score_greedy(changed), strict=True):
        assert len(row) == 65 == len(values) + 1 and not greedy[39]
        assert values[:-1] == pytest.approx(engine.score([row[:-1]])[0], abs=1e-5)
    assert engine.score_greedy([[5], [1, 2]])[0] == ([], [])


def test_sequences_that_cannot_be_scored_are_refused():
    engine = TorchEngine(tiny.model())
    assert len(engine.score([[1] * 64])[0]) == 63
    with pytest.raises(GenerationError, match="sequence 0 has 65 tokens"):
        engine.score([[1] * 65])


def test_one_key_a_prompt_is_demanded():
    with pytest.raises(GenerationError, match="2 prompts, but 1 keys"):
        TorchEngine(tiny.model()).generate([[1], [2]], SamplingParams(), keys=[7])


def test_an_engine_without_rows_is_refused():
    with pytest.raises(GenerationError, match="max_batch_size is 0"):
        TorchEngine(tiny.model(), max_batch_size=0)


def test_no_prompts_no_completions():
    engine = TorchEngine(tiny.model())
    assert engine.generate([], SamplingParams()) == [] and engine.score([]) == []


def test_scores_in_chunks_are_those_of_one_pass_with_the_likeliest():
    module = tiny.model()
    engine = TorchEngine(module, chunk_tokens=7)
    rows = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [1, 2], [3, 3, 3, 4, 4, 4, 4], [9]]
    for (logprobs, top), row, whole in zip(
        engine.score_top(rows, 2), rows, engine.score(rows), strict=True
    ):
        assert logprobs == pytest.approx(whole, abs=1e-5)
        with torch.no_grad():
            wanted = module.logits(module(torch.tensor([row])))[0, :-1].log_softmax(-1).topk(2)
        assert [[token for token, _ in pairs] for pairs in top] == wanted.indices.tolist()
        for pairs, values in zip(top, wanted.values.tolist(), strict=True):
            assert [value for _, value in pairs] == pytest.approx(values, abs=1e-5)


def test_penalties_look_at_the_completion_alone_whatever_the_batch():
    """Against a loop that asks the model for the logits of each whole sequence."""
    module = tiny.model()
    given = [
        SamplingParams(max_tokens=12, temperature=0, frequency_penalty=1.3),
        SamplingParams(max_tokens=9, temperature=0, presence_penalty=2.0, logit_bias=((3, 1.0),)),
        SamplingParams(max_tokens=12, temperature=0),
    ]
    prompts, engine = [[5, 6, 6, 6], [7, 8], [5, 6, 6, 6]], TorchEngine(module)
    handles = [engine.submit(*pair) for pair in zip(prompts, given, strict=True)]
    while engine.step():
        pass
    for prompt, params, handle in zip(prompts, given, handles, strict=True):
        said: list[int] = []
        for _ in range(params.max_tokens):
            tokens = torch.tensor([[*prompt, *said]])
            with torch.no_grad():
                logits = module.logits(module(tokens))[0, -1]
            for token, bias in params.logit_bias:
                logits[token] += bias
            for token in set(said):
                logits[token] -= params.frequency_penalty * said.count(token)
                logits[token] -= params.presence_penalty
            said.append(int(logits.argmax()))
        assert handle.completions[0].token_ids == said
