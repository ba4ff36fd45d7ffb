from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tessera.objectives.lm import LM, loss_sums
from tessera.puzzle import compare
from tessera.puzzle.compare import CompareConfig, promised_speedup, quality, speeds
from tessera.puzzle.cost_table import Scenario
from tests.toy import toy_batch, toy_model

BATCHES = [toy_batch(i) for i in range(3)]


def test_a_model_agrees_with_itself_and_has_its_own_loss():
    parent = toy_model().requires_grad_(False)
    found = quality(parent, parent, BATCHES)
    assert found["kl"] == 0 and found["agreement"] == pytest.approx(1)
    loss, weight = loss_sums(LM(), parent, BATCHES)[0].tolist()
    assert found["lm_loss"] == pytest.approx(loss / weight, rel=1e-5)


def test_another_model_does_not():
    parent, other = toy_model().requires_grad_(False), toy_model(seed=1).requires_grad_(False)
    found = quality(parent, other, BATCHES)
    assert found["kl"] > 0 and found["agreement"] < 1


def test_speeds_are_ratios_to_the_first_model():
    models = {"parent": toy_model(layers=6), "child": toy_model(layers=1)}
    config = CompareConfig(scenario=Scenario(batch=2, prompt=4, new=6), rounds=3)
    rows = speeds({k: m.requires_grad_(False) for k, m in models.items()}, config, "compare")
    assert rows["parent"]["speedup"] == 1
    assert torch.tensor([rows["child"][k] for k in rows["child"]]).gt(0).all()


def test_each_child_takes_turns_with_the_parent_alone(monkeypatch):
    alive: list[str] = []
    order: list[str] = []

    class Engine:
        """Takes as long as what it holds has layers."""

        def __init__(self, module) -> None:
            self.sync(module, 0)
            alive.append("engine")

        def sync(self, module, version: int) -> None:
            self.name, self.layers = module.name, module.layers

        def close(self) -> None:
            alive.remove("engine")

    def seconds(engine, vocab_size, scenario):
        assert alive == ["engine"]
        order.append(engine.name)
        slow = 1 + len(order)  # a machine that gets slower all the time
        return slow * engine.layers, slow * engine.layers

    def model(name: str, layers: int):
        return SimpleNamespace(name=name, layers=layers, config=SimpleNamespace(vocab_size=9))

    monkeypatch.setattr(compare, "TorchEngine", Engine)
    monkeypatch.setattr(compare, "generation_seconds", seconds)
    config = CompareConfig(scenario=Scenario(batch=2, prompt=4, new=6), rounds=30)
    models = {name: model(name, n) for name, n in (("p", 4), ("a", 2), ("b", 1))}
    rows = speeds(models, config, "compare", quiet=True)
    assert list(rows) == ["p", "a", "b"] and not alive
    assert order[:62] == ["p", "a"] * 31
    assert order[62:] == ["p", "b"] * 31
    assert rows["p"]["speedup"] == 1
    assert [rows[k]["speedup"] for k in "ab"] == pytest.approx([2, 4], rel=0.05)
    alone = speeds({"p": models["p"]}, config, "compare", quiet=True)
    assert set(alone["p"]) == set(rows["p"]) and alone["p"]["speedup"] == 1


CHAT, LONG = Scenario(batch=2, prompt=4, new=10), Scenario(batch=3, prompt=40, new=5)


def _row(scenario: Scenario, rate: float | None, parent_batch: int | None = None) -> dict:
    row = {"predicted": {"throughput": rate}, "parent": {"throughput": 2.0 if rate else None},
           "scenario": scenario.model_dump()}  # fmt: skip
    return row | ({"parent_batch": parent_batch} if parent_batch else {})


def test_a_promise_is_for_the_scenario_that_is_timed():
    assert promised_speedup(_row(CHAT, 3.0), CHAT) == 1.5
    assert promised_speedup(_row(CHAT, 3.0), LONG) is None
    assert promised_speedup(_row(CHAT, None), CHAT) is None
    both = _row(CHAT, 3.0) | {"scenarios": {"chat": _row(CHAT, 3.0, 2), "long": _row(LONG, 5.0, 3)}}
    assert promised_speedup(both, CHAT) == 1.5
    assert promised_speedup(both, LONG) == 2.5


def test_a_promise_at_a_batch_that_the_parent_is_not_served_at_is_none():
    swept = _row(CHAT, 3.0) | {"scenarios": {"chat": _row(CHAT, 3.0, 1)}}
    assert promised_speedup(swept, CHAT) is None
