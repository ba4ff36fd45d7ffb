"""Advantages, policy and preference losses, curriculum, rewards and rates, by hand.

A section an equation; nothing here calls what it checks to say what is right.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tessera.eval.scores import pass_at
from tessera.objectives.gkd import GKD, GKDLossConfig
from tessera.objectives.grpo import PolicyGradient, PolicyLossConfig
from tessera.objectives.rpo import RPO, RPOLossConfig, distance
from tessera.puzzle import compare
from tessera.puzzle.compare import CompareConfig, promised_speedup
from tessera.puzzle.cost_table import Scenario
from tessera.rl import preference
from tessera.rl import rewards as rewards_of
from tessera.rl.advantages import grpo, of_group, rloo
from tessera.rl.curriculum import CurriculumConfig, order
from tessera.rl.experience import Answer, Group, rows
from tessera.rl.pool import Rubric
from tessera.rl.preference import Pair
from tessera.rl.rewards import (
    ChoiceReward,
    CodeReward,
    ExactReward,
    FormatReward,
    FunctionReward,
    InstructionsReward,
    NumberReward,
    RewardError,
    Sample,
    check,
    names,
    prepare,
    require_fields,
)
from tessera.rl.verifiers.outcome import Outcome, right, unjudged
from tests import tiny

# GRPO (§8.1): A_i = (r_i - mean r) / std r over a prompt's answers.


def test_grpos_advantages_are_standard_deviations_from_the_groups_mean():
    rewards = [1.0, 0.0, 0.0, 0.5]
    mean = 1.5 / 4
    deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 3)  # of a sample: n - 1
    assert grpo(rewards) == pytest.approx([(r - mean) / deviation for r in rewards], rel=1e-5)
    assert grpo(rewards, std=False) == pytest.approx([r - mean for r in rewards])
    # 1e-6 beside the deviation (NeMo-RL); less than that is no deviation to divide by.
    close = [0.0, 2e-6]
    assert grpo(close) == pytest.approx([-1e-6 / (2**0.5 * 1e-6 + 1e-6), 1 / (1 + 2**0.5)])
    assert grpo([0.0, 1e-6]) == pytest.approx([-5e-7, 5e-7], rel=1e-9)
    assert grpo([0.0, 1e-12]) == [0.0, 0.0] == grpo([0.0, 0.0])
    assert grpo([0.0, 4e-12])[1] == pytest.approx(2e-12)
    assert grpo([3.0]) == [0.0] == rloo([3.0])


# RLOO (§8.2): A_i = r_i - mean of the others.


def test_rloos_advantages_are_distances_from_the_mean_of_the_others():
    assert rloo([1.0, 0.0, 0.5]) == pytest.approx([1.0 - 0.25, 0.0 - 0.75, 0.5 - 0.5])
    assert of_group([1.0, None, 0.0, 0.5], rloo) == pytest.approx([0.75, None, -0.75, 0.0])
    assert of_group([None, 2.0], rloo) == [None, 0.0]
    assert of_group([], rloo) == []


# The policy's loss: -min(ρA, clip(ρ)A), with β·k3, by token or by answer.


def policy_loss(ratios: list[float], advantages: list[float], **settings: Any):
    """(loss, statistics, the model's log-prob slopes) of answers whose ratio to the old policy is
    given for every token; what the engine said is half as likely as the old policy."""
    module, level = tiny.model(tiny.PARENT), settings.pop("level", "token")
    lengths, prompt = [1, 3, 2], [4, 7]
    further: float | None = settings.pop("further", None)
    ids = tiny.tokens(29, 6, seed=5).tolist()
    answers, start = [], 0
    for number, length in enumerate(lengths):
        own = ids[start : start + length]
        start += length
        whole = torch.tensor([prompt + own])
        log_q = module.logits(module(whole[:, :-1]))[0, 1:].log_softmax(-1)
        log_probs = log_q.gather(1, whole[0, 2:, None])[:, 0].tolist()
        old = [one - math.log(ratios[number]) for one in log_probs]
        behaviour = [one - math.log(2) for one in old]
        made = Answer(own, behaviour, "stop", "", 0.0, {}, True, advantages[number], old)
        answers.append(made)
    (batch,) = rows([Group(0, "on", prompt, answers)], 64, level)
    if further is not None:  # the reference's log-probs are so much above the model's
        reference = _Shifted(module, further)
    objective = PolicyGradient(
        PolicyLossConfig(**settings),
        reference if further is not None else None,  # type: ignore[arg-type]
    )
    ((loss, told),) = objective.losses(module, batch)
    return loss, {key: float(value) for key, value in told.items()}, float(objective.weight(batch))


class _Shifted(torch.nn.Module):
    """A reference with the same hidden states."""

    def __init__(self, module: torch.nn.Module, further: float) -> None:
        super().__init__()
        self.module, self.further = [module], further

    def __call__(self, *given: Any) -> torch.Tensor:
        return self.module[0](*given)

    @property
    def head(self) -> torch.Tensor:
        return self.module[0].head  # type: ignore[return-value]


@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.95, 1.0, 1.15, 1.31, 4.0])
@pytest.mark.parametrize("advantage", [1.5, -0.5])
@pytest.mark.parametrize("dual", [0.0, 3.0])
def test_the_surrogate_is_clipped_where_it_would_gain(ratio: float, advantage: float, dual: float):
    found, told, weight = policy_loss(
        [ratio] * 3, [advantage] * 3, clip_low=0.2, clip_high=0.3, dual_clip=dual
    )
    gain = min(ratio * advantage, min(max(ratio, 0.8), 1.3) * advantage)
    if dual and advantage < 0:
        gain = max(gain, dual * advantage)
    moves = gain == ratio * advantage
    assert weight == 6.0
    assert found.item() / weight == pytest.approx(-gain, rel=1e-4)
    assert told["clipped"] / weight == (0.0 if moves else 1.0)
    assert told["gap"] / weight == pytest.approx(math.log(2), rel=1e-4)
    assert "kl" not in told


def test_a_tokens_slope_is_its_ratio_times_its_advantage_unless_it_is_clipped():
    """∂ρA/∂log π = ρA; zero where min takes the clipped side."""
    module = tiny.model(tiny.PARENT)
    for ratio, advantage, dual, slope in [
        (1.1, 2.0, 0.0, -2.2), (1.5, 2.0, 0.0, 0.0), (0.5, 2.0, 0.0, -1.0),
        (1.5, -2.0, 0.0, 3.0), (0.5, -2.0, 0.0, 0.0), (1.2, 2.0, 0.0, -2.4),
        (5.0, -2.0, 3.0, 0.0), (2.9, -2.0, 3.0, 5.8),
    ]:  # fmt: skip
        ids = torch.tensor([[4, 7, 9]])
        log_q = module.logits(module(ids[:, :-1]))[0, 1].log_softmax(-1)
        (expected,) = torch.autograd.grad(slope * log_q[9], module.lm_head.weight)
        old = [float(log_q[9].detach()) - math.log(ratio)]
        answer = Answer([9], old, "stop", "", 0.0, {}, True, advantage, old)
        (batch,) = rows([Group(0, "on", [4, 7], [answer])], 8, "token")
        config = PolicyLossConfig(clip_low=0.2, clip_high=0.21, dual_clip=dual)
        ((loss, _),) = PolicyGradient(config).losses(module, batch)
        (found,) = torch.autograd.grad(loss, module.lm_head.weight)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_answers_count_by_their_tokens_or_all_alike():
    """Lengths 1, 3, 2: the mean over tokens, or over answers of their own means."""
    advantages = [1.0, -2.0, 0.5]
    loss, _, weight = policy_loss([1.0] * 3, advantages, level="token")
    assert loss.item() / weight == pytest.approx(-(1 * 1.0 - 3 * 2.0 + 2 * 0.5) / 6, rel=1e-4)
    loss, _, weight = policy_loss([1.0] * 3, advantages, level="sequence")
    assert weight == pytest.approx(3.0)
    assert loss.item() / weight == pytest.approx(-(1.0 - 2.0 + 0.5) / 3, rel=1e-4)


@pytest.mark.parametrize(("cap", "factor"), [(0.0, 1.0), (None, 1.0), (1.5, 1.5), (3.0, 2.0)])
def test_an_engine_of_other_weights_is_corrected_up_to_a_cap(cap: float | None, factor: float):
    """min(π_old / π_engine, cap), which is 2 here."""
    loss, _, weight = policy_loss([1.1] * 3, [1.0] * 3, importance_cap=cap)
    assert loss.item() / weight == pytest.approx(-1.1 * factor, rel=1e-4)


@pytest.mark.parametrize("further", [-25.0, -1.0, 0.0, 0.5, 25.0])
def test_the_reference_holds_the_policy_by_k3(further: float, monkeypatch: pytest.MonkeyPatch):
    """k3 = π_ref/π - log(π_ref/π) - 1 (Schulman), its log clamped at 20 (NeMo-RL)."""
    from tessera.objectives import grpo as module

    plain = module.token_log_probs
    monkeypatch.setattr(module, "token_log_probs", lambda *given: plain(*given) + further)
    loss, told, weight = policy_loss([1.0] * 3, [0.0] * 3, further=further, kl=0.3)
    ratio = math.exp(max(-20.0, min(20.0, further)))
    k3 = ratio - max(-20.0, min(20.0, further)) - 1
    assert told["kl"] / weight == pytest.approx(k3, rel=1e-4, abs=1e-6)
    assert loss.item() / weight == pytest.approx(0.3 * k3, rel=1e-4, abs=1e-6)


def test_the_policys_defaults_are_those_of_nemo_rl():
    config = PolicyLossConfig()
    assert (config.clip_low, config.clip_high, config.dual_clip, config.kl) == (0.2, 0.2, 0.0, 0.0)
    for bad in (0.5, 1.0):
        with pytest.raises(ValueError, match=f"{bad:g}"):
            PolicyLossConfig(dual_clip=bad)
    assert PolicyLossConfig(dual_clip=1.01).dual_clip == 1.01


# On-policy distillation (GKD, arXiv 2306.13649): D(teacher, student) at each token of an answer.


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_a_teacher_corrects_every_token_of_an_answer(beta: float):
    """Of packed answers to one prompt as of each alone, the prompt's tokens left out."""
    student, teacher = tiny.model(tiny.PARENT, seed=1), tiny.model(tiny.PARENT, seed=2)
    ids, prompt = tiny.tokens(29, 6, seed=5).tolist(), [4, 7, 2]
    answers = [
        Answer(own, [0.0] * len(own), "stop", "", None, {}, True, 1.0) for own in (ids[:4], ids[4:])
    ]
    expected = 0.0
    for answer in answers:
        whole = torch.tensor([prompt + answer.ids])
        at = slice(len(prompt) - 1, -1)
        p, q = (
            one.logits(one(whole))[0, at].double().softmax(-1).detach().numpy()
            for one in (teacher, student)
        )
        m = {0.0: q, 1.0: p}.get(beta, beta * p + (1 - beta) * q)
        share = {0.0: 1.0, 1.0: 0.0}.get(beta, beta)
        expected += share * (p * np.log(p / m)).sum() + (1 - share) * (q * np.log(q / m)).sum()
    (row,) = rows([Group(0, "on", prompt, answers)], 64, "token")
    ((loss, told),) = GKD(teacher, GKDLossConfig(beta=beta)).losses(student, row)
    assert loss.item() == pytest.approx(expected, rel=1e-4) and told == {}
    ((same, _),) = GKD(tiny.model(tiny.PARENT, seed=1), GKDLossConfig(beta=beta)).losses(
        student, row
    )
    assert same.item() == pytest.approx(0.0, abs=1e-5)


# RPO (§8.3): a distance of the gap D = β[Δ(chosen) - Δ(rejected)] from D* = η(r_c - r_r).


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def kl_of_coins(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


@pytest.mark.parametrize("gap", [-1.5, 0.0, 0.7])
@pytest.mark.parametrize("target", [0.3, 2.0])
def test_the_distances_of_a_gap_from_its_target(gap: float, target: float):
    d, star = torch.tensor([gap]), torch.tensor([target])
    backward, forward = (kl_of_coins(*map(sigma, p)) for p in ((target, gap), (gap, target)))
    assert distance("backward", d, star).item() == pytest.approx(backward, rel=1e-4)
    assert distance("forward", d, star).item() == pytest.approx(forward, rel=1e-4)
    assert distance("squared", d, star).item() == pytest.approx((gap - target) ** 2)


PAIRS = [Pair([4, 7], [1, 2, 3], [9, 8], 1.0), Pair([5], [6], [7, 1, 2], 0.25)]


def test_preferences_are_learnt_as_gaps_of_log_ratios():
    module, reference = tiny.model(tiny.PARENT, seed=1), tiny.model(tiny.PARENT, seed=2)

    def log_prob(of: Any, pair: Pair, answer: list[int]) -> float:
        ids = torch.tensor([pair.prompt + answer])
        hidden = of(ids[:, :-1]).detach().double().numpy()[0, len(pair.prompt) - 1 :]
        logits = hidden @ of.head.detach().double().numpy().T
        log_q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return sum(log_q[at, token] for at, token in enumerate(answer))

    beta, eta, sft = 0.4, 1.5, 0.3
    config = RPOLossConfig(beta=beta, eta=eta, distance="backward", sft=sft)
    gaps, expected = [], 0.0
    for pair in PAIRS:
        up, down = (
            log_prob(module, pair, one) - log_prob(reference, pair, one)
            for one in (pair.chosen, pair.rejected)
        )
        gaps.append(beta * (up - down))
        expected += kl_of_coins(sigma(eta * pair.margin), sigma(gaps[-1]))
        expected -= sft * log_prob(module, pair, pair.chosen) / len(pair.chosen)
    (batch,) = preference.rows(PAIRS, 64)
    objective = RPO(config, reference)
    ((loss, told),) = objective.losses(module, batch)
    assert objective.weight(batch) == 2.0
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert told["gap_mean"].item() == pytest.approx(sum(gaps), rel=1e-4)
    assert told["margin"].item() == pytest.approx(1.25)
    assert told["accuracy"].item() == sum(gap > 0 for gap in gaps)
    defaults = RPOLossConfig()
    assert (defaults.beta, defaults.eta, defaults.sft) == (0.01, 1.0, 0.0)
    assert defaults.distance == "backward"


def answer(ids: list[int], reward: float | None) -> Answer:
    return Answer(ids, [0.0] * len(ids), "stop", "", reward, {}, True)


def test_the_best_and_the_worst_answer_make_a_pair():
    group = Group(0, "on", [7], [answer([1], 0.5), answer([2], 2.0), answer([3], -1.0)])
    assert preference.of_group(group) == Pair([7], [2], [3], 3.0)
    tied = Group(
        0, "on", [7], [answer([5], 2.0), answer([9], 2.0), answer([4], 0.0), answer([3], 0.0)]
    )
    assert preference.of_group(tied) == Pair([7], [5], [4], 2.0)  # of equals the first
    same = Group(0, "on", [7], [answer([1], 0.5), answer([2], 0.5)])
    assert preference.of_group(same) is None
    empty = Group(0, "on", [7], [answer([1], 0.5), answer([], 9.0), answer([2], None)])
    assert preference.of_group(empty) is None  # nothing was said, or nothing is known
    assert len(PAIRS[0]) == 2 - 1 + 3 + 2


def test_every_pair_comes_once_an_epoch_to_one_of_the_processes(monkeypatch: pytest.MonkeyPatch):
    """Five pairs, two a step, two processes: five steps are two epochs."""
    pairs = [Pair([1], [10 + number], [20], 1.0) for number in range(5)]
    layout = SimpleNamespace(data_rank=0, data_world=2)
    train = SimpleNamespace(placement=SimpleNamespace(layout=layout), microbatch_tokens=8)
    config: Any = SimpleNamespace(pairs_per_step=2, train=train)
    monkeypatch.setattr(preference, "padded", lambda rows, empty: [*rows, empty])
    seen: list[list[int]] = [[], []]
    for rank in (0, 1):
        layout.data_rank = rank
        source = preference.PairSource(pairs, config, 7)
        for step in range(5):
            *own, empty = source.batches(step)
            assert not empty.weight.any() and empty.tokens.shape == (1, 2)
            labels = torch.cat([one.labels.flatten() for one in own]).tolist()
            seen[rank] += [label - 10 for label in labels if 10 <= label < 20]
    first = [pair for both in zip(*seen, strict=True) for pair in both]
    assert sorted(first[:5]) == sorted(first[5:]) == [0, 1, 2, 3, 4] and first[:5] != first[5:]


# The curriculum (§7.1): share of a bin ∝ exp(-(middle - μ)² / 2σ²), μ from start to end.


@pytest.mark.parametrize(("sigma_", "steps"), [(0.2, 5), (0.35, 3), (0.1, 1)])
def test_the_share_of_a_bin_is_a_gaussian_of_its_pass_rate(sigma_: float, steps: int):
    config = CurriculumConfig(order="curriculum", start=0.8, end=0.2, sigma=sigma_, bins=4)
    planned = order([0.1, 0.3, 0.6, 0.9] * 5, steps, 2, config, 0).planned
    for step in range(steps):
        centre = 0.8 - 0.6 * step / max(1, steps - 1)
        middles = (0.125, 0.375, 0.625, 0.875)
        weights = [math.exp(-((m - centre) ** 2) / (2 * sigma_**2)) for m in middles]
        assert planned[step] == pytest.approx([w / sum(weights) for w in weights])


def test_the_curriculums_defaults_go_from_easy_to_hard():
    config = CurriculumConfig()
    assert (config.order, config.start, config.end) == ("random", 0.9, 0.1)
    assert (config.sigma, config.bins) == (0.2, 10)


def test_a_batch_holds_the_planned_numbers_and_the_largest_remainders():
    """Ten prompts a bin of two; a batch of five, shares of 1/2 each at the middle: 3 and 2."""
    config = CurriculumConfig(order="curriculum", start=0.5, end=0.5, sigma=0.2, bins=2)
    found = order([0.2] * 10 + [0.8] * 10, 2, 5, config, 0)
    assert found.planned == pytest.approx(np.full((2, 2), 0.5))
    assert sorted(map(tuple, found.actual.tolist())) == [(0.6, 0.4), (0.6, 0.4)]
    # A width that leaves one bin: what it lacks is taken from the fullest of the others.
    narrow = CurriculumConfig(order="curriculum", start=0.9, end=0.9, sigma=0.01, bins=5)
    found = order([0.9] * 3 + [0.1] * 9 + [0.3] * 4, 1, 6, narrow, 0)
    assert found.actual.tolist() == [[0.5, 0.0, 0.0, 0.0, 0.5]]
    # Bins are closed below, and a pass rate of 1 is in the last.
    edges = order([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], 1, 6, narrow, 0)
    assert edges.actual.tolist() == pytest.approx(np.array([[1, 1, 1, 1, 2]]) / 6)


def test_at_random_the_plan_is_what_there_is_and_prompts_without_a_rate_are_the_hardest():
    found = order([None, 0.1, 0.9, 0.95], 3, 4, CurriculumConfig(bins=2), 0)
    assert found.planned.tolist() == [[0.5, 0.5]] * 3
    assert [sorted(one.tolist()) for one in found.batches] == [[0, 1, 2, 3]] * 3
    assert len({tuple(one.tolist()) for one in found.batches}) > 1  # shuffled
    table = found.table(2)
    assert [row["step"] for row in table] == [1, 1, 3, 3]
    assert [row["pass_rate"] for row in table] == [0.25, 0.75] * 2
    assert {row["planned"] for row in table} == {row["actual"] for row in table} == {0.5}


# Rewards: Σ weight · score, or nothing where one of them could not be judged.


def sample(completion: str, truncated: bool = False, **fields: Any) -> Sample:
    return Sample([{"role": "user", "content": "?"}], completion, fields, truncated)


def test_a_sample_is_worth_the_weighted_sum_of_its_parts(monkeypatch: pytest.MonkeyPatch):
    rewards = [
        ExactReward(kind="exact", weight=2.0),
        FormatReward(kind="format", weight=-0.5),
        NumberReward(kind="number"),
    ]
    outcomes = {0: right(), 1: Outcome("wrong", 0.25, ""), 2: Outcome("right", 0.5)}
    rubric = Rubric(rewards, 1)
    monkeypatch.setattr(rubric._pool, "check", lambda tasks: [outcomes[part] for part, _ in tasks])
    (found,) = rubric([sample("x")])
    assert found.reward == pytest.approx(2.0 * 1.0 - 0.5 * 0.25 + 0.5)
    assert list(found.parts) == ["exact", "format", "number"]
    outcomes[1] = unjudged("why")
    first, second = rubric([sample("x"), sample("y")])
    assert first.reward is None is second.reward and first.parts["exact"].score == 1.0
    assert [type(one).model_fields["weight"].default for one in rewards] == [1.0] * 3


@pytest.mark.parametrize(
    ("reward", "completion", "gold", "verdict"),
    [
        (ExactReward(kind="exact"), "<think>no</think> Paris ", "paris", "right"),
        (ExactReward(kind="exact", ignore_case=False), "Paris", "paris", "wrong"),
        (ExactReward(kind="exact"), "<think>Paris", "paris", "wrong"),  # the thought did not end
        (NumberReward(kind="number"), "3.0", 3, "right"),
        (NumberReward(kind="number"), "3.1", 3, "wrong"),
        (NumberReward(kind="number", tolerance=0.2), "3.1", 3, "right"),
        (ChoiceReward(kind="choice"), "\\boxed{C}", "C", "right"),
        (ChoiceReward(kind="choice", choices=2), "\\boxed{C}", "B", "wrong"),
    ],
)
def test_a_checker_sees_the_answer_behind_the_thought(reward, completion, gold, verdict):
    assert check(reward, sample(completion, answer=gold)).verdict == verdict


@pytest.mark.parametrize("completion", ["<think>a</think>b", "b"])
@pytest.mark.parametrize(("said", "mode"), [("on", None), ("off", None), ("", "on"), ("", "off")])
def test_the_format_is_that_of_the_mode_however_it_is_said(completion, said, mode):
    """Tags with thinking on, none with thinking off."""
    system = [{"role": "system", "content": f"detailed thinking {said}"}] if said else []
    one = Sample([*system, {"role": "user", "content": "?"}], completion, {}, mode=mode)
    thinks = "<think>" in completion
    expected = "right" if thinks == ((said or mode) == "on") else "wrong"
    assert check(FormatReward(kind="format"), one).verdict == expected


def odd(one: Sample) -> Any:
    """What a reward of one's own may do: judge a thought that did not end, lie, or fail."""
    if one.completion == "fail":
        raise KeyError("nothing here")
    return 1.0 if one.completion == "lie" else right()


def test_a_checker_that_fails_judges_nothing():
    silent = check(NumberReward(kind="number"), sample("<think>3", answer=3))
    assert silent.verdict == "wrong" and "answer" in silent.reason
    with pytest.raises(RewardError, match="'mine'.*nowhere"):
        prepare([FunctionReward(kind="function", function="nowhere:odd", name="mine")])
    with pytest.raises(RewardError, match="'function'.*none_such"):
        prepare([FunctionReward(kind="function", function=f"{__name__}:none_such")])
    own = FunctionReward(kind="function", function=f"{__name__}:odd")
    assert check(own, sample("<think>never closed")).verdict == "right"
    assert check(own, sample("lie")).score is None
    failed = check(own, sample("fail"))
    assert failed.score is None and "KeyError" in failed.reason
    missing = check(ExactReward(kind="exact"), sample("x"))
    assert missing.verdict == "could-not-judge" and "answer" in missing.reason


def test_a_reward_says_which_fields_it_judges_by():
    code = CodeReward(kind="code", setup="before")
    assert code.fields({"tests": "x"}) == ["tests"] == code.fields({})
    assert code.fields({"inputs": ["1"], "outputs": ["1"]}) == ["inputs", "outputs"]
    assert code.fields({"tests": None, "inputs": ["1"]}) == ["inputs", "outputs"]
    assert code.fields({"tests": "x", "inputs": ["1"]}) == ["tests"]
    told = InstructionsReward(kind="instructions")
    assert told.fields({}) == ["instruction_id_list", "kwargs"]
    assert FormatReward(kind="format").fields({}) == []
    exact = ExactReward(kind="exact", answer="gold", name="mine")
    require_fields([exact, FormatReward(kind="format")], {"gold": "x"})
    for row in ({}, {"gold": None}):
        with pytest.raises(RewardError, match="'mine'.*'gold'"):
            require_fields([exact], row)
    assert names([exact, ExactReward(kind="exact")]) == ["mine", "exact"]
    with pytest.raises(RewardError, match="'exact'"):
        names([ExactReward(kind="exact"), NumberReward(kind="number", name="exact")])


def test_a_program_is_given_its_rows_tests_and_their_setup(monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []

    def judged(kind: str, completion: str, **given: Any) -> Outcome:
        names = ("tests", "setup", "entry_point", "inputs", "outputs")
        seen.append((kind, completion, *(given[name] for name in names)))
        return right()

    monkeypatch.setattr(rewards_of, "judge", judged)
    monkeypatch.setattr(rewards_of, "require_isolation", lambda: seen.append("isolated"))
    reward = CodeReward(kind="code", setup="before")
    check(reward, sample("say", tests=["t"], before="s", entry_point="f"))
    check(reward, sample("say", inputs=["1"], outputs=["2"], setup="other"))
    assert seen == [
        ("code", "say", ["t"], "s", "f", None, None),
        ("code", "say", None, None, None, ["1"], ["2"]),
    ]
    prepare([reward])
    assert seen[-1] == "isolated"


def test_instructions_are_judged_by_the_rows_own_arguments(monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    monkeypatch.setattr(rewards_of, "judge", lambda *told, **given: seen.append(given) or right())
    row = {"instruction_id_list": ["a"], "kwargs": [{"n": 3}]}
    check(InstructionsReward(kind="instructions", partial=True), sample("say", **row))
    assert seen == [{**row, "loose": False, "partial": True}]


def test_a_program_may_take_its_time_before_its_checker_is_killed():
    """Eight times its CPU seconds by the clock, and ten to start."""
    limits: Any = {"seconds": 5}
    assert CodeReward(kind="code", limits=limits, deadline=50).deadline == 50
    with pytest.raises(ValueError, match="deadline = 49"):
        CodeReward(kind="code", limits=limits, deadline=49)


# Rates: pass@k (arXiv 2107.03374) by counting, and speed-ups of rounds.


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (5, 4, 2), (4, 0, 2), (3, 3, 3)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n: int, c: int, k: int):
    from itertools import combinations

    draws = [any(i < c for i in chosen) for chosen in combinations(range(n), k)]
    assert pass_at(n, c, k) == pytest.approx(sum(draws) / len(draws))


def test_a_speed_up_is_the_median_of_whole_runs_side_by_side(monkeypatch: pytest.MonkeyPatch):
    """Seconds of (prefill, step): a run of 5 new tokens is a prefill and 4 steps."""
    parent = [(1.0, 0.5), (3.0, 1.0), (1.0, 0.5)]
    child = [(0.5, 0.5), (1.0, 1.0), (1.0, 0.125)]
    monkeypatch.setattr(compare, "in_turn", lambda models, *_: [parent, child][: len(models)])
    config = CompareConfig(scenario={"batch": 2, "prompt": 7, "new": 5})
    found = compare.speeds({"parent": None, "child": None}, config, "x", quiet=True)  # type: ignore[dict-item]
    ratios = [3.0 / 2.5, 7.0 / 5.0, 3.0 / 1.5]
    assert found["child"]["speedup"] == pytest.approx(sorted(ratios)[1])
    assert found["parent"]["speedup"] == 1.0
    assert found["child"]["decode_tokens_per_second"] == 2 / 0.5
    assert found["child"]["prefill_tokens_per_second"] == 2 * 7 / 1.0
    row = {"predicted": {"throughput": 30.0}, "parent": {"throughput": 20.0}}
    work = Scenario(batch=2)
    told = {"scenarios": {"a": {**row, "scenario": work.model_dump()}}}
    assert promised_speedup(told, work) == 1.5
