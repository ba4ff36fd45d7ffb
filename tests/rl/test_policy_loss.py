"""The policy gradient in chunks is the plain formula, and the identities 8 and 13 of the design."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tessera.data.batch import Batch
from tessera.generate.torch_engine import TorchEngine
from tessera.objectives.grpo import MAX_LOG_RATIO as FAR
from tessera.objectives.grpo import PolicyGradient, _TokenLoss
from tessera.objectives.lm import SFT
from tessera.rl.experience import Answer, Group, rows, split_group
from tessera.rl.policy import GRPOConfig
from tests import tiny
from tests.toy import toy_config

REWARDS = [{"kind": "format"}]


def config(**changes: Any) -> GRPOConfig:
    return GRPOConfig(train={"steps": 1}, rewards=REWARDS, **changes)  # type: ignore[arg-type]


def group(prompt: int, lengths: list[int], seed: int = 0) -> Group:
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(0, 40, (count,), generator=generator).tolist()

    answers = [
        Answer(draw(n), (-torch.rand(n, generator=generator)).tolist(), "stop", "", 0.0, {}, True)
        for n in lengths
    ]
    for number, answer in enumerate(answers):
        answer.advantage = [1.3, -0.7, 0.4][number % 3]
    return Group(0, "on", draw(prompt), answers)


GROUPS = [group(5, [3, 7, 1], 1), group(1, [4, 2], 2), group(8, [6, 6, 5], 3)]


@pytest.fixture(autouse=True)
def fresh_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests change what answers hold; none of them sees another's."""
    monkeypatch.setitem(globals(), "GROUPS", copy.deepcopy(GROUPS))


def alone(groups: list[Group]) -> list[Batch]:
    """Each answer with its prompt in a row of its own."""
    return [
        batch
        for one in groups
        for answer in one.answers
        for batch in rows([Group(one.number, one.mode, one.ids, [answer])], 64, "token")
    ]


def summed(objective: PolicyGradient, module, batches: list[Batch]):
    """The loss over some batches, its gradients, and the statistics."""
    module.zero_grad()
    total, stats = 0.0, {}
    for batch in batches:
        for loss, told in objective.losses(module, batch):
            loss.backward()
            total += float(loss.detach())
            stats = {k: stats.get(k, 0.0) + float(v) for k, v in told.items()}
    return total, {k: p.grad.clone() for k, p in module.named_parameters()}, stats


def plain(module, groups: list[Group], c: GRPOConfig, reference=None) -> torch.Tensor:
    """The formula of objectives/grpo.py, a token at a time."""
    total = torch.zeros(())
    for one in groups:
        for answer in one.answers:
            ids = torch.tensor([one.ids + answer.ids])
            start = len(one.ids) - 1
            own = F.log_softmax(module.logits(module(ids[:, :-1])), -1)[0, start:]
            log_prob = own.gather(1, ids[0, start + 1 :, None]).squeeze(1)
            behaviour = torch.tensor(answer.logprobs)
            old = log_prob.detach() if c.updates_per_rollout == 1 else behaviour + 0.01
            advantage, ratio = torch.tensor(answer.advantage or 0.0), (log_prob - old).exp()
            gain = torch.minimum(
                ratio * advantage, ratio.clamp(1 - c.clip_low, 1 + c.clip_high) * advantage
            )
            if c.dual_clip and advantage < 0:
                gain = torch.maximum(gain, c.dual_clip * advantage)
            if c.importance_cap:
                gain = gain * (old - behaviour).exp().clamp(max=c.importance_cap)
            loss = -gain
            if reference is not None:
                theirs = F.log_softmax(reference.logits(reference(ids[:, :-1])), -1)[0, start:]
                further = theirs.gather(1, ids[0, start + 1 :, None]).squeeze(1).detach() - log_prob
                loss = loss + c.kl * (further.exp() - further - 1)
            scale = 1 / len(answer.ids) if c.level == "sequence" else 1.0
            total = total + scale * loss.sum()
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"level": "sequence"},
        {"updates_per_rollout": 2},
        {"updates_per_rollout": 2, "clip_low": 0.1, "clip_high": 0.4, "dual_clip": 1.5},
        {"kl": 0.3},
        {"importance_cap": 1.2},
    ],
    ids=str,
)
def test_rows_of_shared_prompts_give_the_plain_formula(changes: dict[str, Any]):
    c, module = config(**changes), tiny.model(toy_config(3))
    reference = tiny.model(toy_config(3), seed=1) if c.kl else None
    expected = plain(module, GROUPS, c, reference)
    expected.backward()
    gradients = {k: p.grad.clone() for k, p in module.named_parameters()}
    objective = PolicyGradient(c, reference)
    for length in (64, 16):
        for answer in (one for g in GROUPS for one in g.answers):
            later = c.updates_per_rollout > 1
            answer.old = [one + 0.01 for one in answer.logprobs] if later else None
        total, found, stats = summed(objective, module, rows(GROUPS, length, c.level))
        assert total == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)
        for key, gradient in gradients.items():
            torch.testing.assert_close(found[key], gradient, atol=2e-5, rtol=1e-3)
    assert stats["entropy"] > 0 and stats["gap"] > 0


def test_a_token_far_from_the_reference_has_a_bounded_distance_and_does_not_pull():
    far = torch.tensor([-90.0, -20.5, -19.5, -3.0, 0.0, 3.0, 19.5, 20.5, 90.0, 2000.0])
    zero, weight = torch.zeros_like(far), torch.ones_like(far)
    streams = {"advantage": zero, "behaviour": zero, "reference": far}
    log_prob = torch.zeros_like(far, requires_grad=True)
    curve = _TokenLoss(config(kl=0.3), streams, weight)
    value, slope = curve(log_prob, zero, slice(None))
    near = (log_prob - far).abs() <= FAR
    further = far - log_prob
    plainly = 0.3 * (further.exp() - further - 1)
    (expected,) = torch.autograd.grad(plainly[near].sum(), log_prob)
    torch.testing.assert_close(value[near], plainly[near], rtol=0, atol=0)
    torch.testing.assert_close(slope, torch.where(near, expected, 0.0))
    most = 0.3 * (torch.tensor([-FAR, FAR]).exp() - torch.tensor([-FAR, FAR]) - 1)
    torch.testing.assert_close(value[far < -FAR], most[:1].expand(2))
    torch.testing.assert_close(value[far > FAR], most[1:].expand(3))
    assert curve.stats["kl"].isfinite()


def test_advantage_one_on_policy_is_the_gradient_of_fine_tuning():
    module = tiny.model(toy_config(3))
    for answer in (one for g in GROUPS for one in g.answers):
        answer.advantage = 1.0
    batches = rows(GROUPS, 64, "token")
    _, policy, _ = summed(PolicyGradient(config()), module, batches)
    module.zero_grad()
    for batch in alone(GROUPS):  # SFT knows no shared prompts
        parts = (batch.tokens, batch.labels, batch.weight, batch.positions)
        plainly = Batch(*parts, torch.zeros_like(batch.segments))
        for loss, _ in SFT().losses(module, plainly):
            loss.backward()
    for key, parameter in module.named_parameters():
        torch.testing.assert_close(policy[key], parameter.grad, atol=2e-5, rtol=1e-3)


def test_a_row_holds_each_prompt_once_and_every_answer_once():
    batches = rows(GROUPS, 40, "token")
    trained = sum(int((batch.weight > 0).sum()) for batch in batches)
    assert trained == sum(len(a.ids) for g in GROUPS for a in g.answers)
    tokens = sum(int((batch.segments >= 0).sum()) for batch in batches)
    found = [list(split_group(g, 40)) for g in GROUPS]
    assert tokens == trained + sum(
        len(g.ids) - 1 for g, parts in zip(GROUPS, found, strict=True) for _ in parts
    )
    with pytest.raises(ValueError, match="train.microbatch_tokens"):
        rows(GROUPS, 9, "token")


def test_the_engines_log_probs_are_the_trainers():
    module = tiny.model(toy_config(3))
    engine = TorchEngine(module)
    for one in GROUPS:
        scored = engine.score([one.ids + answer.ids for answer in one.answers])
        for answer, values in zip(one.answers, scored, strict=True):
            answer.logprobs = values[len(one.ids) - 1 :]
    _, _, stats = summed(PolicyGradient(config()), module, rows(GROUPS, 64, "token"))
    assert stats["gap"] / sum(len(a.ids) for g in GROUPS for a in g.answers) < 1e-5
