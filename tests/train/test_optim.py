from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from tessera.train.optim import DocumentTrainConfig, TrainConfig, build_optimizer, lr_factor


def _curve(**settings: object) -> list[float]:
    config = TrainConfig(steps=100, warmup=0.1, min_lr=0.1, **settings)  # type: ignore[arg-type]
    return [lr_factor(config, step) for step in range(100)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warmup_rises_to_the_peak(schedule: str):
    curve = _curve(schedule=schedule)
    assert curve[:10] == sorted(curve[:10]) and 0 < curve[0] < curve[9] < 1
    assert curve[10] == 1


def test_cosine_falls_to_the_floor():
    curve = _curve(schedule="cosine")
    assert curve[10:] == sorted(curve[10:], reverse=True)
    assert curve[-1] == pytest.approx(0.1, abs=1e-3)


def test_wsd_is_flat_and_then_linear():
    curve = _curve(schedule="wsd", decay=0.2)
    assert set(curve[10:81]) == {1.0}
    steps = [a - b for a, b in zip(curve[80:], curve[81:], strict=False)]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_weight_decay_touches_matrices_only():
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = build_optimizer([matrix, vector], TrainConfig(steps=1, lr=0.1, weight_decay=0.5))
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert (matrix < 1).all() and (vector == 1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_length": 8192}, "sequence_length = 8192 is longer than a row of 4096"),
        ({"tokens_per_step": 5000}, "whole rows of 4096 positions; the nearest is 4096"),
    ],
)
def test_rows_that_documents_do_not_fill_are_refused_with_the_recipe(
    settings: dict[str, int], message: str
):
    TypeAdapter(TrainConfig).validate_python({"steps": 1, **settings})  # rollouts make other rows
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(DocumentTrainConfig).validate_python({"steps": 1, **settings})
