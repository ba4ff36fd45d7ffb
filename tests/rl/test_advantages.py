"""Advantages and the curriculum: pure functions and what they promise."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.rl.advantages import grpo, of_group, rloo
from tessera.rl.curriculum import CurriculumConfig, order

rewards = st.lists(st.floats(-5, 5), min_size=2, max_size=12)


@settings(derandomize=True, deadline=None)
@given(rewards)
def test_advantages_sum_to_nothing_and_keep_the_order(values: list[float]):
    for rule in (grpo, rloo):
        found = rule(values)
        assert sum(found) == pytest.approx(0, abs=1e-6 * len(found) * 10)
        better = [a > b for a, b in zip(found, found[1:], strict=False)]
        assert all(values[i] >= values[i + 1] - 1e-6 for i, higher in enumerate(better) if higher)


@settings(derandomize=True, deadline=None)
@given(rewards)
def test_rloo_is_the_reward_less_the_mean_of_the_others(values: list[float]):
    for i, found in enumerate(rloo(values)):
        others = [value for j, value in enumerate(values) if j != i]
        assert found == pytest.approx(values[i] - sum(others) / len(others), abs=1e-9)
    scale = len(values) / (len(values) - 1)  # and n/(n-1) times the distance from the mean
    centred = grpo(values, std=False)
    assert rloo(values) == pytest.approx([scale * one for one in centred], abs=1e-9)


def test_std_makes_groups_alike_and_leaves_one_without_spread_alone():
    assert np.std(grpo([0.0, 0.0, 0.0, 1.0]), ddof=1) == pytest.approx(1, abs=1e-4)
    assert grpo([0.7, 0.7, 0.7]) == pytest.approx([0, 0, 0])


@pytest.mark.parametrize("reward", [0.1, 0.7, 1.3])
def test_a_group_whose_answers_are_worth_the_same_pulls_at_nothing(reward: float):
    # Sums of such numbers are rounded: the mean of three 0.1 is not 0.1.
    for count in range(2, 17):
        for rule in (grpo, partial(grpo, std=False), rloo):
            assert not any(rule([reward] * count))


def test_what_could_not_be_judged_is_in_nobodys_mean():
    assert of_group([1.0, None, 0.0], rloo) == [1.0, None, -1.0]
    assert of_group([None, None], rloo) == [None, None]


RATES = list(np.random.default_rng(0).uniform(size=400))


@pytest.mark.parametrize("kind", ["random", "curriculum"])
def test_no_prompt_comes_again_before_all_have_come(kind: str):
    found = order(RATES, 30, 40, CurriculumConfig(order=kind), 3)
    everything = np.concatenate(found.batches)
    assert len(everything) == 30 * 40
    for start in range(0, len(everything), 400):
        assert len(set(everything[start : start + 400].tolist())) == 400
    again = order(RATES, 30, 40, CurriculumConfig(order=kind), 3)
    assert all(map(np.array_equal, found.batches, again.batches))
    other = order(RATES, 30, 40, CurriculumConfig(order=kind), 4)
    assert not all(map(np.array_equal, found.batches, other.batches))


def test_the_curriculum_goes_from_easy_to_hard_as_planned_while_the_pools_last():
    found = order(RATES, 8, 40, CurriculumConfig(order="curriculum", sigma=0.15), 0)
    means = [np.mean([RATES[i] for i in batch]) for batch in found.batches]
    # Of the last batch a part is what earlier ones left over, from the largest pool.
    assert means[:7] == sorted(means[:7], reverse=True)
    assert means[0] > 0.75 and means[6] < 0.3 and found.actual[-1, :2].sum() > 0.6
    assert np.abs(found.planned - found.actual)[:3].max() < 0.08
    assert found.actual.sum(1) == pytest.approx(np.ones(8))


def test_a_bin_that_is_empty_is_made_up_for_by_the_largest():
    rates = [0.05] * 90 + [0.95] * 10
    found = order(rates, 2, 50, CurriculumConfig(order="curriculum", sigma=0.05), 0)
    assert [sum(rates[i] > 0.5 for i in batch) for batch in found.batches] == [10, 0]


def test_a_curriculum_needs_pass_rates():
    with pytest.raises(ValueError, match="profile.samples"):
        order([0.5, None], 1, 1, CurriculumConfig(order="curriculum"), 0)
