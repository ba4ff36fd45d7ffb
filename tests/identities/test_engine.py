"""Torch engine = trainer: the same tokens, the same log-probs, whoever shares the batch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tessera.generate import torch_engine
from tessera.generate.engine import GenerationError, GenerationRequest, SamplingParams
from tessera.generate.torch_engine import TorchEngine
from tessera.model.checkpoint import load_model
from tessera.model.transformer import Transformer
from tests import tiny

LENGTHS = (5, 2, 9, 1, 6, 6, 3, 8)
GREEDY = SamplingParams(max_tokens=12, temperature=0)
SAMPLED = SamplingParams(max_tokens=12, temperature=0.9, top_k=20, top_p=0.95, n=3, seed=5)

mixes = [
    (("gqa-2", "swiglu-16"), mix, ("gqa-4", "swiglu-8"))
    for mix in itertools.product(
        ("gqa-1", "gqa-2", "gqa-4", "linear", "noop"), ("swiglu-8", "swiglu-40", "linear", "noop")
    )
]


def prompts(lengths=LENGTHS) -> list[list[int]]:
    return [tiny.tokens(29, n, seed=i).tolist() for i, n in enumerate(lengths)]


@torch.no_grad()
def trainer_logprobs(module: Transformer, tokens: list[int]) -> torch.Tensor:
    """`(T-1, V)`: what the module says of each next token."""
    return module.logits(module(torch.tensor([tokens])))[0, :-1].log_softmax(-1)


def assert_engine_is_trainer(module: Transformer, slots: int, params: SamplingParams = GREEDY):
    """More requests than slots; every token is the module's argmax, every log-prob its own."""
    given = prompts()
    for prompt, samples in zip(
        given, TorchEngine(module, max_batch_size=slots).generate(given, params), strict=True
    ):
        for done in samples:
            table = trainer_logprobs(module, prompt + done.token_ids)[len(prompt) - 1 :]
            chosen = table.gather(-1, torch.tensor(done.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(done.logprobs), chosen, atol=1e-5, rtol=0)
            if params.temperature == 0:
                assert done.token_ids == table.argmax(-1).tolist()
            assert (len(done.token_ids), done.finish_reason) == (params.max_tokens, "length")


@pytest.mark.parametrize("words", mixes, ids=lambda words: "+".join(words[1]))
def test_greedy_is_the_argmax_of_the_trainers_forward(words):
    assert_engine_is_trainer(tiny.model(words), slots=3)


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
@pytest.mark.parametrize("slots", [1, 3, 64])
def test_greedy_is_the_argmax_in_every_family(changes, slots):
    assert_engine_is_trainer(tiny.model(**changes), slots)


def test_without_any_attention():
    assert_engine_is_trainer(tiny.model([("noop", "swiglu-8"), ("linear", "noop")]), slots=3)


def test_sampled_logprobs_are_the_trainers():
    assert_engine_is_trainer(tiny.model(), slots=5, params=SAMPLED)


def tokens_of(found) -> list[list[list[int]]]:
    return [[done.token_ids for done in samples] for samples in found]


@pytest.mark.parametrize("slots", [1, 2, 5, 24])
def test_a_completion_does_not_depend_on_its_batch_mates(slots):
    module, given = tiny.model(), prompts()
    expected = tokens_of(TorchEngine(module, max_batch_size=64).generate(given, SAMPLED))
    engine = TorchEngine(module, max_batch_size=slots)
    assert tokens_of(engine.generate(given, SAMPLED)) == expected
    order = [3, 0, 7, 5, 1, 6, 2, 4]
    shuffled = engine.generate([given[i] for i in order], SAMPLED, keys=order)
    assert tokens_of(shuffled) == [expected[i] for i in order]
    assert len({str(samples) for prompt in expected for samples in prompt}) == 24


def test_samples_share_a_prefill_and_equal_separate_requests():
    module, given = tiny.model(), prompts()
    params = SamplingParams(max_tokens=6, n=4, seed=3)
    for slots in (3, 4, 7, 64):
        engine = TorchEngine(module, max_batch_size=slots)
        together = tokens_of(engine.generate(given, params))
        assert engine.stats.prefill_tokens == sum(LENGTHS)
    for i, prompt in enumerate(given):
        alone = TorchEngine(module).generate([prompt], params, keys=[i])
        assert tokens_of(alone) == [together[i]]
        fewer = SamplingParams(max_tokens=6, n=2, seed=3)
        assert (
            tokens_of(TorchEngine(module).generate([prompt], fewer, keys=[i]))[0] == together[i][:2]
        )


def test_first_tokens_follow_the_models_distribution():
    module, count = tiny.model(), 4000
    expected = trainer_logprobs(module, [1, 2, 3, 0])[-1].exp() * count
    params = SamplingParams(max_tokens=1, n=count, seed=11)
    found = TorchEngine(module).generate([[1, 2, 3]], params)[0]
    drawn = torch.bincount(torch.tensor([c.token_ids[0] for c in found]), minlength=29)
    common = expected >= 5  # the rare tokens are one class, as chi-square asks
    pooled = [torch.cat((x[common], x[~common].sum()[None])) for x in (drawn.float(), expected)]
    statistic = ((pooled[0] - pooled[1]) ** 2 / pooled[1]).sum()
    assert statistic < 56.9  # the 99.9 % quantile for 28 degrees of freedom, the most there can be


def test_a_stop_token_ends_a_completion_and_is_its_last_token():
    module, given = tiny.model(), prompts()
    free = TorchEngine(module).generate(given, SAMPLED)
    stop = (4, 11)
    params = replace(SAMPLED, stop_token_ids=stop)
    for slots in (2, 64):
        found = TorchEngine(module, max_batch_size=slots).generate(given, params)
        for whole, cut in zip(sum(free, []), sum(found, []), strict=True):
            where = [i for i, token in enumerate(whole.token_ids) if token in stop]
            end = where[0] + 1 if where else len(whole.token_ids)
            assert cut.token_ids == whole.token_ids[:end]
            assert len(cut.logprobs) == end
            assert cut.finish_reason == ("stop" if where else "length")


def test_scores_are_the_trainers_logprobs():
    module, given = tiny.model(sliding_window=5), prompts((7, 1, 2, 30, 29, 12))
    for tokens, scores in zip(given, TorchEngine(module).score(given), strict=True):
        assert len(scores) == len(tokens) - 1
        table = trainer_logprobs(module, tokens)
        expected = table.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scores), expected, atol=1e-5, rtol=0)


def test_sync_takes_the_new_weights_and_their_version():
    module, given = tiny.model(), prompts()
    engine = TorchEngine(module)
    before = engine.generate(given, GREEDY)
    tiny.randomise(module, seed=1)
    assert engine.generate(given, GREEDY) == before
    engine.sync(module, 7)
    after = engine.generate(given, GREEDY)
    assert tokens_of(after) == tokens_of(TorchEngine(module).generate(given, GREEDY))
    assert tokens_of(after) != tokens_of(before)
    assert {done.version for samples in after for done in samples} == {7}


def test_half_precision_decodes_what_it_scores():
    module = tiny.model(qk_norm=True, sliding_window=5).to(torch.bfloat16)
    engine, given = TorchEngine(module, max_batch_size=3), prompts()
    found = [samples[0] for samples in engine.generate(given, GREEDY)]
    scores = engine.score([p + done.token_ids for p, done in zip(given, found, strict=True)])
    for prompt, done, values in zip(given, found, scores, strict=True):
        expected = torch.tensor(values[len(prompt) - 1 :])
        torch.testing.assert_close(torch.tensor(done.logprobs), expected, atol=0.05, rtol=0)


def test_generation_ends_at_the_last_position():
    found = TorchEngine(tiny.model()).generate(
        [[1] * 60, [1] * 63, [1]], SamplingParams(max_tokens=99)
    )
    assert [len(samples[0].token_ids) for samples in found] == [4, 1, 63]


def test_completions_come_as_they_end_and_are_those_of_generate():
    given, params = prompts(), replace(SAMPLED, n=3, max_tokens=40, stop_token_ids=(3, 5, 7))
    expected = tokens_of(TorchEngine(tiny.model()).generate(given, params))
    for batch in (2, 64):
        read: list[int] = []

        def requests() -> Iterator[GenerationRequest]:
            for key, prompt in enumerate(given):
                read.append(key)  # noqa: B023
                yield GenerationRequest(prompt, params, key, owner=key)

        engine = TorchEngine(tiny.model(), max_batch_size=batch)
        found, lengths = {}, []
        for request, sample, completion in engine.as_completed(requests()):
            found[request.owner, sample] = completion.token_ids
            lengths.append(len(completion.token_ids))
        assert found == {(i, n): ids for i, row in enumerate(expected) for n, ids in enumerate(row)}
        assert batch == 2 or lengths == sorted(lengths)  # one that is done waits for no other
        assert read == list(range(len(given)))


def test_some_samples_of_a_prompt_are_those_of_all():
    params = replace(SAMPLED, n=5)
    (expected,) = tokens_of(TorchEngine(tiny.model()).generate([[1, 2, 3]], params, keys=[9]))
    request = GenerationRequest([1, 2, 3], params, 9, samples=(4, 1))
    made = TorchEngine(tiny.model()).as_completed([request])
    found = {number: completion.token_ids for _, number, completion in made}
    assert found == {4: expected[4], 1: expected[1]}


def test_what_is_left_unread_is_cancelled(monkeypatch):
    engine = TorchEngine(tiny.model(), max_batch_size=2)
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(torch_engine, "WORKING_SECONDS", 0.0)
    long = GenerationRequest([1, 2], replace(GREEDY, max_tokens=30))
    short = GenerationRequest([1, 2], replace(GREEDY, max_tokens=2))
    completed = engine.as_completed([long, short], lambda *state: told.append(state))
    assert next(completed)[0] is short
    completed.close()
    assert engine.idle and not engine.running
    with pytest.raises(GenerationError, match="99999"):
        list(engine.as_completed([GenerationRequest([99999], GREEDY)]))
    with pytest.raises(GenerationError, match="99999"):
        engine.check([GenerationRequest([99999], GREEDY)])
    list(engine.as_completed([long, long], lambda *state: told.append(state)))
    assert max(told)[1] == 2 and all(tokens <= 60 for tokens, _ in told)


def test_stats_count_prompts_once_and_tokens_as_decoded():
    engine = TorchEngine(tiny.model(), max_batch_size=64)
    engine.generate(prompts(), GREEDY)
    stats = engine.stats
    assert (stats.prefill_tokens, stats.decode_steps) == (sum(LENGTHS), 11)
    assert stats.decode_tokens == 11 * len(LENGTHS)  # the first token comes out of the prefill
    assert stats.prefill_seconds > 0 and stats.decode_seconds > 0
    engine.reset_stats()
    assert engine.stats.decode_tokens == 0


@pytest.mark.parametrize("name", ["stories260k", "tinystories-char-940k"])
@pytest.mark.parametrize("slots", [1, 64])
def test_real_checkpoints_give_their_known_tokens(shared, name, slots):
    directory = shared / "models" / name
    cases = json.loads((directory / "expected_outputs.json").read_text())["greedy"]
    engine = TorchEngine(load_model(directory, frozen=True), max_batch_size=slots)
    new = [len(case["greedy_ids"]) - len(case["prompt_ids"]) for case in cases]
    params = SamplingParams(max_tokens=max(new), temperature=0)
    found = engine.generate([case["prompt_ids"] for case in cases], params)
    for case, samples, count in zip(cases, found, new, strict=True):
        assert case["prompt_ids"] + samples[0].token_ids[:count] == case["greedy_ids"]
