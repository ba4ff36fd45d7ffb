from __future__ import annotations

import pytest
import torch

from tessera.eval.compare import CompareConfig, promise_error, quality, speeds
from tessera.objectives.lm import heldout_loss
from tessera.puzzle.cost_table import Scenario
from tests.toy import toy_batch, toy_model

BATCHES = [toy_batch(i) for i in range(3)]


def test_a_model_agrees_with_itself_and_has_its_own_loss():
    parent = toy_model().requires_grad_(False)
    found = quality(parent, parent, BATCHES)
    assert found["kl"] == 0 and found["agreement"] == pytest.approx(1)
    assert found["lm_loss"] == pytest.approx(heldout_loss(parent, BATCHES), rel=1e-5)


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


def test_a_promise_kept_has_no_error():
    assert promise_error(2.0, 2.0) == 0
    assert promise_error(1.5, 1.2) == pytest.approx(0.25)
    assert promise_error(None, 1.2) is None
