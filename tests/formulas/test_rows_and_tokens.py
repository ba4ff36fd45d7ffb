"""Sampling's filters, the packed row and the rule of thoughts, by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tessera.data.batch import OFF, ON, PLAIN, TEXT, Sample, best_fit, chunks, collate, fill, pack
from tessera.data.batch import shift as shifted
from tessera.data.thought import Splitter, Thought, begun, opens, split, split_message
from tessera.generate.engine import Completion, SamplingParams
from tessera.generate.sampling import Sampler, uniforms
from tessera.rl.experience import Answer, Group
from tessera.rl.experience import rows as rows_of
from tessera.rl.pool import Judged
from tessera.rl.preference import Pair
from tessera.rl.preference import rows as pair_rows
from tessera.rl.profile import Prompt
from tessera.rl.rollouts import RolloutConfig, Rollouts
from tessera.rl.verifiers.outcome import Outcome

# Sampling: p = softmax(filtered(logits / temperature)), the token where the CDF passes u.

LOGITS = [0.0, 1.5, -1.0, 2.0, 1.0]


def probabilities(params: SamplingParams, seen: tuple[int, ...] = ()) -> dict[int, float]:
    """What is left and how likely it is, one filter after the other."""
    logits = list(LOGITS)
    for token in seen:
        penalty = params.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    scaled = {token: value / params.temperature for token, value in enumerate(logits)}
    ranked = sorted(scaled, key=lambda token: -scaled[token])
    if params.top_k:
        ranked = ranked[: params.top_k]
    total = sum(math.exp(scaled[token]) for token in ranked)
    kept, before = {}, 0.0
    for token in ranked:
        share = math.exp(scaled[token]) / total
        if before >= params.top_p:
            break
        kept[token], before = share, before + share
    most = max(kept.values())
    kept = {token: share for token, share in kept.items() if share >= params.min_p * most}
    return {token: share / sum(kept.values()) for token, share in kept.items()}


PARAMS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=2.0),
    SamplingParams(temperature=1.0, top_k=2),
    SamplingParams(temperature=1.0, top_k=4, top_p=0.7),
    SamplingParams(temperature=1.0, top_p=0.5),
    SamplingParams(temperature=1.5, top_p=0.9),
    SamplingParams(temperature=1.0, min_p=0.3),
    SamplingParams(temperature=0.7, min_p=0.1, top_p=0.95),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=1.0, top_k=99),
    SamplingParams(temperature=1.0, repetition_penalty=2.0),
    SamplingParams(temperature=0.8, repetition_penalty=0.5, top_k=3),
]


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_a_token_is_drawn_as_often_as_its_share(params: SamplingParams):
    """Over an even grid of noise each token comes in proportion, and no other ever."""
    count, seen = 4000, torch.tensor([[True, False, True, True, False]])
    noise = torch.arange(count, dtype=torch.float64) / count
    drawn = Sampler([params] * count).choose(
        torch.tensor([LOGITS]).expand(count, -1), noise, seen=seen.expand(count, -1)
    )
    shares = torch.bincount(drawn.tokens, minlength=5) / count
    expected = probabilities(params, (0, 2, 3))
    assert shares.tolist() == pytest.approx([expected.get(t, 0.0) for t in range(5)], abs=1e-3)
    raw = np.array(LOGITS) - math.log(sum(map(math.exp, LOGITS)))
    np.testing.assert_allclose(drawn.logprobs.numpy(), raw[drawn.tokens.numpy()], rtol=1e-5)


def test_the_draw_goes_by_id_without_ranks_and_by_rank_with_them():
    noise = torch.tensor([0.0, 0.07, 0.999], dtype=torch.float64)
    logits = torch.tensor([LOGITS]).expand(3, -1)
    by_id = Sampler([SamplingParams(temperature=1.0)] * 3).choose(logits, noise)
    assert by_id.tokens.tolist() == [0, 1, 4]  # token 0 has 0.063 of the mass
    by_rank = Sampler([SamplingParams(temperature=1.0, top_k=5)] * 3).choose(logits, noise)
    assert by_rank.tokens.tolist() == [3, 3, 2]


def test_a_penalty_divides_what_is_above_zero_and_multiplies_what_is_not():
    """Keskar et al., 1909.05858: 2 / 1.5 falls below 1.5; -0.5 · 3 falls below -1."""
    logits = torch.tensor([[2.0, 1.5, -9.0], [-0.5, -1.0, -9.0]])
    seen = torch.tensor([[True, False, True], [True, False, True]])
    rows = [SamplingParams(temperature=0, repetition_penalty=p) for p in (1.5, 3.0)]
    found = Sampler(rows).choose(logits, seen=seen)
    assert found.tokens.tolist() == [1, 1]
    assert Sampler(rows).choose(logits, seen=~seen).tokens.tolist() == [0, 0]


def test_what_was_said_is_penalised_by_its_count_and_once_and_biases_are_added():
    """OpenAI's: logit + bias - count · frequency_penalty - (count > 0) · presence_penalty."""
    counts, seen = torch.tensor([[2, 0, 1, 3, 0]]), torch.zeros(1, 5, dtype=torch.bool)
    for frequency, presence, bias in [
        (0.5, 0.0, ()),
        (0.0, 0.75, ()),
        (0.5, 0.25, ((1, 1.5), (2, -2.0))),
        (-1.0, 0.0, ((0, 9.0),)),
    ]:
        params = SamplingParams(
            temperature=1.0, frequency_penalty=frequency, presence_penalty=presence, logit_bias=bias
        )
        shaped = [
            logit + dict(bias).get(token, 0.0) - frequency * count - presence * (count > 0)
            for token, (logit, count) in enumerate(zip(LOGITS, counts[0].tolist(), strict=True))
        ]
        mass = np.exp(shaped) / np.exp(shaped).sum()
        count = 4000
        drawn = Sampler([params] * count).choose(
            torch.tensor([LOGITS]).expand(count, -1),
            torch.arange(count, dtype=torch.float64) / count,
            seen=seen.expand(count, -1),
            counts=counts.expand(count, -1),
        )
        shares = torch.bincount(drawn.tokens, minlength=5) / count
        assert shares.tolist() == pytest.approx(mass.tolist(), abs=1e-3)
        raw = np.array(LOGITS) - math.log(sum(map(math.exp, LOGITS)))
        np.testing.assert_allclose(drawn.logprobs.numpy(), raw[drawn.tokens.numpy()], rtol=1e-5)


def test_what_is_not_allowed_never_comes():
    """A grammar's mask; rows of one batch have penalties of their own."""
    rows = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, frequency_penalty=1.0),
        SamplingParams(temperature=0, logit_bias=((0, 5.0),)),
    ]
    logits, counts = torch.tensor([LOGITS] * 3), torch.tensor([[0, 0, 0, 2, 0]] * 3)
    assert Sampler(rows).choose(logits, counts=counts).tokens.tolist() == [3, 1, 0]
    allowed = torch.tensor([[False, True, True, False, True]] * 3)
    found = Sampler(rows).choose(logits, counts=counts, allowed=allowed)
    assert found.tokens.tolist() == [1, 1, 1]


def test_forced_tokens_come_and_the_likeliest_are_told():
    rows = [SamplingParams(temperature=0, logprobs=2), SamplingParams(temperature=1.0)]
    found = Sampler(rows).choose(
        torch.tensor([LOGITS] * 2), torch.tensor([0.5, 0.5]).double(), forced=torch.tensor([2, -1])
    )
    raw = np.array(LOGITS) - math.log(sum(map(math.exp, LOGITS)))
    assert found.tokens.tolist() == [2, 3]  # the mass before token 3 is 0.41, with it 0.79
    zero = Sampler(rows[:1]).choose(torch.tensor([LOGITS]), forced=torch.tensor([0]))
    assert zero.tokens.tolist() == [0] and zero.logprobs[0] == pytest.approx(raw[0])
    assert found.top is not None and found.top[0].tolist() == [[3, 1]] * 2
    np.testing.assert_allclose(found.top[1][0].numpy(), raw[[3, 1]], rtol=1e-5)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x64 of ten rounds (Salmon et al. 2011, figure 2)."""
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [
            (b >> 64) ^ counter[1] ^ key[0], b % 2**64, (a >> 64) ^ counter[3] ^ key[1], a % 2**64
        ]  # fmt: skip
        key = [(key[0] + 0x9E3779B97F4A7C15) % 2**64, (key[1] + 0xBB67AE8584CAA73B) % 2**64]
    return counter


@pytest.mark.parametrize(
    ("seed", "key", "sample"), [(0, 0, 0), (7, 5, 3), (1, 2**40 + 1, 2), (3, -2, 1)]
)
def test_noise_is_philox_of_the_seed_the_prompt_the_sample_and_the_position(seed, key, sample):
    """The identity is the high half of the counter; 53 of 64 bits make a number below 1."""
    blocks = [philox([block, 0, sample, key % 2**64], [seed, 0]) for block in (1, 2)]
    expected = [(word >> 11) / 2**53 for block in blocks for word in block]
    assert uniforms(seed, key, sample, 7) == expected[:7]


# Batches: tokens, labels one further, weights of labels, positions and segments by document.


def test_a_documents_rows_are_written_out():
    first = shifted([5, 6, 7, 8], [9, 0, 1, 2], ON)
    second = shifted(np.array([1, 2]), mode=OFF)
    batch = collate([[first, second], [second]], 6, pad_id=3)
    assert batch.tokens.tolist() == [[5, 6, 7, 1, 3, 3], [1, 3, 3, 3, 3, 3]]
    assert batch.labels.tolist() == [[6, 7, 8, 2, 3, 3], [2, 3, 3, 3, 3, 3]]
    assert batch.weight.tolist() == [[0, 1, 2, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 3, 4]]
    assert batch.segments.tolist() == [[0, 0, 0, 1, -1, -1], [0, -1, -1, -1, -1, -1]]
    assert batch.positions.dtype == batch.labels.dtype == torch.int64
    assert batch.mode is not None
    assert batch.mode.tolist() == [[ON] * 3 + [OFF, TEXT, TEXT], [OFF] + [TEXT] * 5]
    assert len({TEXT, OFF, ON, PLAIN}) == 4 and TEXT == 0
    assert batch.num_tokens == 5 and len(first) == 3
    assert shifted([1, 2]).weight.dtype == first.weight.dtype == np.float32
    assert Sample(first.tokens, first.labels, first.weight).mode == TEXT


def test_documents_are_cut_and_packed():
    batch = pack([[1, 2, 3, 4, 5, 6], [7, 8, 9], [4]], 4, pad_id=2)
    # [1 2 3 4] and [5] of the first, [7 8] of the second; one id alone predicts nothing.
    assert batch.tokens.tolist() == [[1, 2, 3, 4], [7, 8, 5, 2]]
    assert batch.labels.tolist() == [[2, 3, 4, 5], [8, 9, 6, 2]]
    assert batch.segments.tolist() == [[0] * 4, [0, 0, 1, -1]]
    assert pack([[1, 2]], 2).tokens.tolist() == [[1, 0]]
    assert chunks(9, 4) == [(0, 5), (4, 9)] and chunks(2, 4) == [(0, 2)] and chunks(0, 4) == []


def test_each_sample_goes_where_it_leaves_the_least_space():
    lengths = [2, 7, 5, 3, 3]  # 7; 5 beside it does not fit; 3 in the row of 7; 3 and 2 by the 5
    assert best_fit(lengths, 10) == [[1, 3], [2, 4, 0]]
    assert best_fit(lengths, 10, longest_first=False) == [[0, 1], [2, 3], [4]]
    assert best_fit([4, 6], 10) == [[1, 0]] and best_fit([10], 10) == [[0]]
    assert fill(lengths, 10) == pytest.approx(20 / 20) and fill([7, 4], 10) == 11 / 20
    assert fill([], 10) == 0.0
    for length in (0, 11):
        with pytest.raises(ValueError, match=f"{length} tokens .* row of 10"):
            best_fit([length], 10)


def said(ids: list[int], advantage: float, old: list[float] | None = None) -> Answer:
    logprobs = [-1.0 - number for number in range(len(ids))]
    return Answer(ids, logprobs, "stop", "", 0.0, {}, True, advantage, old)


def test_a_row_holds_a_prompt_once_and_its_answers_behind_it():
    group = Group(0, "on", [4, 5, 6], [said([7, 8], 1.0), said([9], -2.0)])
    other = Group(1, "on", [3], [said([1, 2], 0.5)])
    (batch,) = rows_of([group, other], 12, "sequence", 0.5)
    # The longest first: the group of two answers, then the other.
    assert batch.tokens.tolist() == [[4, 5, 6, 7, 6, 3, 1]]
    assert batch.labels.tolist() == [[5, 6, 7, 8, 9, 1, 2]]
    assert batch.weight.tolist() == [[0, 0, 0.5, 0.5, 1, 0.5, 0.5]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 2, 3, 3]]
    assert batch.prefix is not None and batch.prefix.tolist() == [[-1, -1, 0, 0, 0, -1, -1]]
    assert batch.streams["advantage"].tolist() == [[0, 0, 0.5, 0.5, -1, 0.25, 0.25]]
    assert batch.streams["behaviour"].tolist() == [[0, 0, -1, -2, -1, -1, -2]]
    assert "old" not in batch.streams
    (batch,) = rows_of([Group(0, "on", [4], [said([7], 1.0, [-3.0])])], 12, "token")
    assert batch.streams["old"].tolist() == [[-3.0, 0.0]]  # a row has two places at least


def test_a_row_of_pairs_says_which_answer_each_token_is_of():
    first, second = Pair([4, 5], [6, 7], [8], 1.5), Pair([3], [1], [2], 0.25)
    (batch,) = pair_rows([first, second], 9)
    assert batch.tokens.tolist() == [[4, 5, 6, 5, 3, 3]]
    assert batch.labels.tolist() == [[5, 6, 7, 8, 1, 2]]
    assert batch.weight.tolist() == [[0, 1, 1, 1, 1, 1]]
    assert batch.streams["pair"].tolist() == [[0, 1, 1, -1, 2, -2]]
    assert batch.streams["margin"].tolist() == [[0, 1.5, 1.5, 1.5, 0.25, 0.25]]
    assert batch.streams["first"].tolist() == [[0, 1, 0, 0, 1, 0]]
    with pytest.raises(ValueError, match="a pair of 4 tokens .* row of 3"):
        pair_rows([first], 3)
    assert len(pair_rows([first, second], 4)) == 2


# The reward of long answers (DAPO §3.4) and what is masked.


@pytest.mark.parametrize(
    ("length", "truncated", "buffer", "overlong", "reward"),
    [
        (6, False, 0, "keep", 1.0),
        (6, False, 4, "keep", 1.0),  # 10 - 4 tokens are free
        (7, False, 4, "keep", 1.0 - 1 / 4),
        (10, True, 4, "keep", 1.0 - 4 / 4),
        (12, True, 1, "keep", 0.0),  # by 1 at most
        (10, True, 0, "mask", None),
        (6, False, 0, "mask", 1.0),
    ],
)
def test_reward_falls_over_the_buffer_before_the_limit(length, truncated, buffer, overlong, reward):
    given: dict[str, Any] = {"max_tokens": 10, "overlong_buffer": buffer, "overlong": overlong}
    config = RolloutConfig(train={"steps": 1}, **given)  # type: ignore[arg-type]
    asked = Prompt("p", [{"role": "user", "content": "?"}], "off", {})
    one = Completion([1] * length, [0.0] * length, "length" if truncated else "stop")
    judged = Judged(1.0, {"exact": Outcome("right", 1.0)})
    sample = SimpleNamespace(truncated=truncated, completion="x")
    found = Rollouts._answer(SimpleNamespace(config=config), asked, one, sample, judged)  # type: ignore[arg-type]
    assert found.reward == (None if reward is None else pytest.approx(reward))


# A thought begins with the tag, or its prompt ended with it; it ends at the first closing tag.


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        (" <think> a </think>\n b ", False, Thought("a", "b ", True)),
        ("a</think> b", True, Thought("a", "b", True)),
        ("a</think> b", False, Thought(None, "a</think> b", False)),
        ("<think>a", False, Thought("a", "", False)),
        ("a <think>b</think>", False, Thought(None, "a <think>b</think>", False)),
        ("a <think>b</think>c", True, Thought("a <think>b", "c", True)),
        ("<think></think>b</think>", False, Thought("", "b</think>", True)),
    ],
)
def test_thoughts_and_answers(text: str, opened: bool, expected: Thought):
    assert split(text, opened) == expected
    splitter, found = Splitter(opened), Thought()
    for letter in text:
        found += splitter.push(letter)
    assert found + splitter.flush() == expected


def test_the_pieces_of_a_stream_hold_back_what_may_be_a_tag():
    splitter = Splitter()
    pieces = [splitter.push(one) for one in ("<thi", "nk> a", " <", "b </thin", "k> c", " d")]
    assert pieces == [
        Thought(), Thought("a"), Thought(""), Thought(" <b"), Thought("", "c", True),
        Thought(None, " d")]  # fmt: skip
    assert splitter.flush() == Thought()
    assert begun("ab</thi", ["</think>"]) == 5 and begun("ab</thix", ["</think>"]) == 0
    assert begun("</think>", ["</think>"]) == 0 and begun("<", ["</think>", "<x"]) == 1
    assert begun("", ["</think>"]) == 0 == begun("a", [])


def test_the_parts_of_a_message_and_of_a_prompt():
    assert split_message({"content": "<think>x</think>y", "reasoning_content": " t "}) == Thought(
        "t", "<think>x</think>y", True
    )
    assert split_message({"content": "<think>x</think>y"}) == Thought("x", "y", True)
    assert opens("a <think>\n") and not opens("<think> a") and not opens("")
    assert Thought("a", "b") + Thought("c", "d", True) == Thought("ac", "bd", True)
    assert Thought() + Thought(None, "x") == Thought(None, "x", False)
