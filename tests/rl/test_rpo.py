"""Preference optimisation: the formula by autograd, and pairs from files and from the policy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tessera.data.chat import ChatEncoder
from tessera.data.readers import DataError
from tessera.data.tokenizer import load_tokenizer
from tessera.objectives.rpo import RPO, Distance, distance
from tessera.rl.experience import Answer, Group
from tessera.rl.preference import (
    ORDER_STREAM,
    OnlinePairs,
    Pair,
    PairSource,
    RPOConfig,
    of_files,
    of_group,
    rows,
    rpo,
)
from tessera.runs.files import FailureError
from tessera.runs.run import Run, read_metrics
from tests import tiny
from tests.rl.policy_runs import REWARDS, made
from tests.toy import toy_config

PAIRS = [
    Pair([3, 5, 7], [1, 2, 3, 4], [9, 8], 1.0),
    Pair([4], [6, 6], [7, 1, 2], 0.25),
    Pair([2, 9, 9, 1, 4], [5], [3, 3, 3, 3, 3], 2.0),
]


def config(**changes: Any) -> RPOConfig:
    return RPOConfig(train={"steps": 1}, **{"beta": 0.4, "eta": 1.5, **changes})


def plain(module, reference, c: RPOConfig) -> torch.Tensor:
    def log_prob(model, pair: Pair, answer: list[int]) -> torch.Tensor:
        ids = torch.tensor([pair.prompt + answer])
        start = len(pair.prompt) - 1
        own = F.log_softmax(model.logits(model(ids[:, :-1])), -1)[0, start:]
        return own.gather(1, ids[0, start + 1 :, None]).sum()

    total = torch.zeros(())
    for pair in PAIRS:
        own = [log_prob(module, pair, one) for one in (pair.chosen, pair.rejected)]
        with torch.no_grad():
            theirs = [log_prob(reference, pair, one) for one in (pair.chosen, pair.rejected)]
        gap = c.beta * ((own[0] - theirs[0]) - (own[1] - theirs[1]))
        total = total + distance(c.distance, gap, torch.tensor(c.eta * pair.margin))
        total = total - c.sft * own[0] / len(pair.chosen)
    return total


@pytest.mark.parametrize("kind", ["backward", "forward", "squared"])
@pytest.mark.parametrize("sft", [0.0, 0.3])
@pytest.mark.parametrize("length", [12, 64])
def test_rows_of_pairs_have_the_gradient_of_the_formula(kind: Distance, sft: float, length: int):
    c, module = config(distance=kind, sft=sft), tiny.model(toy_config(3))
    reference = tiny.model(toy_config(3), seed=1)
    plain(module, reference, c).backward()
    expected = {k: p.grad.clone() for k, p in module.named_parameters()}
    module.zero_grad()
    objective, weight = RPO(c, reference), 0.0
    for batch in rows(PAIRS, length):
        weight += float(objective.weight(batch))
        for loss, _ in objective.losses(module, batch):
            loss.backward()
    assert weight == len(PAIRS)
    for key, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], atol=2e-5, rtol=1e-3)


def test_distances_are_zero_where_the_gap_is_the_margin_and_positive_elsewhere():
    target = torch.tensor([0.5, 2.0])
    for kind in ("backward", "forward", "squared"):
        assert distance(kind, target, target).abs().max() < 1e-6
        assert (distance(kind, target + 0.3, target) > 0).all()
        assert (distance(kind, target - 0.3, target) > 0).all()


def test_a_margin_without_end_is_dpo():
    gap = torch.tensor([-1.0, 0.0, 2.0])
    found = distance("backward", gap, torch.full((3,), 60.0))
    torch.testing.assert_close(found, -F.logsigmoid(gap))


def test_the_reference_itself_has_no_gap_and_half_the_way_to_go():
    module = tiny.model(toy_config(3))
    objective = RPO(config(), module)
    (batch,) = rows(PAIRS, 64)
    ((_, told),) = objective.losses(module, batch)
    assert float(told["gap_mean"]) == pytest.approx(0.0, abs=1e-6)
    assert float(told["margin"]) == pytest.approx(3.25)


def _answer(ids: list[int], reward: float | None) -> Answer:
    return Answer(ids, [0.0] * len(ids), "stop", "", reward, {}, True)


def test_the_best_and_the_worst_of_a_group_make_a_pair():
    answers = [_answer([1], 0.5), _answer([2], 2.0), _answer([3], None), _answer([4], -1.0)]
    assert of_group(Group(0, "on", [7], answers)) == Pair([7], [2], [4], 3.0)
    assert of_group(Group(0, "on", [7], answers[:1])) is None
    assert of_group(Group(0, "on", [7], answers[2:3])) is None


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("preferences"))


ROWS = [
    {"prompt": f"say {n}", "chosen": f"{n} it is", "rejected": "no"}
    | {"chosen_reward": 1 + n, "rejected_reward": 0}
    for n in range(12)
]


def train(home: Path, name: str, **table: Any) -> list[dict[str, Any]]:
    table = {"train": {"steps": 12, "lr": 5e-3, "microbatch_tokens": 512}, **table}
    inputs: Any = {"model": home / "parent", "prompts": home / "profile"}
    with Run.open(home / name, stage="rpo", config=table, inputs=inputs, seed=0, quiet=True) as run:
        rpo(RPOConfig(**table), run, inputs)
    return read_metrics(home / name)


def test_pairs_of_files_teach_their_preference(home: Path, tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    same, nan = {**ROWS[0], "chosen": "no"}, {**ROWS[0], "chosen_reward": float("nan")}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, same, nan]))
    found = train(home, "offline", paths=[str(path)], pairs_per_step=6, beta=0.1)
    assert found[0]["gap_mean"] == pytest.approx(0.0, abs=1e-6)
    assert found[-1]["loss"] < 0.7 * found[0]["loss"] and found[-1]["accuracy"] == 1.0
    log = (home / "offline" / "log.txt").read_text()
    assert "both answers are the same: left out  [1: rows 13]" in log
    assert "chosen_reward is nan, which is no finite number: left out  [1: rows 14]" in log


def test_pairs_come_in_the_order_of_each_epoch_which_is_drawn_once(
    monkeypatch: pytest.MonkeyPatch,
):
    found = [Pair([1], [n + 2], [0], 1.0) for n in range(11)]

    def place(at: int) -> int:
        epoch, at = divmod(at, len(found))
        return int(np.random.default_rng([3, ORDER_STREAM, epoch]).permutation(len(found))[at])

    expected = [[place(4 * step + i) for i in range(4)] for step in range(9)]
    drawn, plain = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda key: drawn.append(key) or plain(key))

    def read(steps: range) -> list[list[int]]:
        source = PairSource(found, config(pairs_per_step=4), 3)
        labels = [torch.cat([b.labels.flatten() for b in source.batches(s)]) for s in steps]
        return [[int(label) - 2 for label in one if label > 1] for one in labels]

    assert [sorted(one) for one in read(range(9))] == [sorted(one) for one in expected]
    assert len(drawn) == 4  # epochs that nine steps touch
    assert [sorted(one) for one in read(range(5, 9))] == [sorted(one) for one in expected[5:]]


def test_online_the_policy_learns_from_its_own_best_and_worst(home: Path):
    table = {"rewards": REWARDS, "prompts_per_rollout": 6, "samples": 6, "max_tokens": 8}
    train_table = {"steps": 60, "lr": 1e-2, "microbatch_tokens": 512}
    found = train(home, "online", **table, train=train_table, beta=0.1, eta=20.0, workers=1)
    rewards = [row["reward"] for row in found]
    assert sum(rewards[-5:]) > 1.1 * sum(rewards[:5])


ONLINE = {"rewards": REWARDS, "prompts_per_rollout": 4, "samples": 3, "max_tokens": 6, "workers": 1}


def flattened(monkeypatch: pytest.MonkeyPatch, barren: Callable[[int, int], bool]) -> list[Any]:
    """Makes all answers worth the same where `barren(rollout, further)`; what was asked."""
    plain, asked = OnlinePairs._answered, []

    def answered(self: OnlinePairs, rollout: int, numbers: Any, seconds: Any) -> list[Group]:
        groups = plain(self, rollout, numbers, seconds)
        further, at = divmod(rollout, 1 << 24)
        asked.append((at, further, list(numbers)))
        for answer in (one for group in groups for one in group.answers if barren(at, further)):
            answer.reward, answer.advantage = 1.0, 0.0
        return groups

    monkeypatch.setattr(OnlinePairs, "_answered", answered)
    return asked


@pytest.mark.parametrize("more", [{}, {"staleness": 1}, {"updates_per_rollout": 2}])
def test_a_rollout_without_pairs_asks_further_and_a_stopped_run_is_the_same(
    home: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, int]
):
    asked = flattened(monkeypatch, lambda rollout, further: rollout == 1 and further < 2)
    steps = {"steps": 4, "lr": 1e-2, "microbatch_tokens": 512, "save_seconds": 1e-9}
    name = "further" + "".join(more)
    straight = train(home, name, **ONLINE, **more, train=steps)
    others = [numbers for rollout, _, numbers in asked if rollout == 1]
    assert len(others) == 3 and others[0] != others[1] != others[2]
    plain = OnlinePairs.batches

    def stopping(self: OnlinePairs, step: int) -> Any:
        if step == 3 and not (home / f"{name}-stopped" / "seen").exists():
            (home / f"{name}-stopped" / "seen").touch()
            raise KeyboardInterrupt
        return plain(self, step)

    monkeypatch.setattr(OnlinePairs, "batches", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(home, f"{name}-stopped", **ONLINE, **more, train=steps)
    assert train(home, f"{name}-stopped", **ONLINE, **more, train=steps) == straight


def test_a_run_whose_rollouts_stay_barren_ends_and_keeps_what_was_answered(
    home: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = flattened(monkeypatch, lambda rollout, further: True)
    with pytest.raises(FailureError, match="samples/00000000.jsonl"):
        train(home, "barren", **ONLINE)
    assert [further for _, further, _ in asked] == list(range(8))
    assert (home / "barren" / "samples" / "00000000.jsonl").is_file()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "chosen": "b"}, "no rejected"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_reward": -1},
            "no rejected_reward",
        ),
        ({"chosen": "b", "rejected": "c"}, "no prompt"),
        ([1], "not an object"),
    ],
)
def test_a_row_that_is_no_pair_is_named_and_left_out(
    home: Path, tmp_path: Path, row: Any, says: str
):
    path, told = tmp_path / "pairs.jsonl", []
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(row) + "\n")
    encoder = ChatEncoder.of(load_tokenizer(home / "parent"))
    assert len(of_files([str(path)], encoder, told.append)) == 1
    (line,) = told
    assert says in line and line.endswith("[1: rows 2]")
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"pairs.jsonl:1.*{says}"):
        of_files([str(path)], encoder, told.append)


def test_a_reward_that_is_null_is_not_known(home: Path, tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    nulls = {"chosen_reward": None, "rejected_reward": None}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | nulls) + "\n")
    one, other = of_files([str(path)], ChatEncoder.of(load_tokenizer(home / "parent")))
    assert one == other and other.margin == 1.0


def test_a_pair_that_no_row_can_hold_says_what_to_raise():
    with pytest.raises(ValueError, match="train.microbatch_tokens"):
        rows(PAIRS, 8)
