"""Ranks change nothing (DESIGN identity 6), nor does going on in another number of them (7).

Every objective and layout trains in real processes over gloo, started as torchrun would; what one
process gives is computed here. Two launches serve all tests, for a process takes seconds to start.
Four processes are slow.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tessera import dist
from tessera.model.checkpoint import load_model
from tessera.model.pipelining import split_layers
from tessera.model.placement import Layout, LayoutError, ParallelConfig, Placement, trainable
from tessera.model.transformer import Transformer
from tessera.runs.run import read_metrics
from tessera.train.engine import context_of
from tests.test_dist import run_ranks
from tests.toy import toy_batch, toy_config
from tests.train.ranks import gradients, train

CODE = "from tests.train.ranks import main; main()"
NAMES = ("lm", "sft", "kd")
OBJECTIVES = pytest.mark.parametrize("objective", NAMES)
TENSOR = {"parallel": {"tensor": 2, "gradient_checkpointing": "selective"}}
REPLICAS, OFFLOAD = {"parallel": {"shard": 2}}, {"parallel": {"offload": True}}
PIPELINE = {"parallel": {"pipeline": 2}}
# Rows that two processes share: documents and answers cross the cut, and RPO's losses are of pairs.
CONTEXT, BOTH = {"parallel": {"context": 2}}, {"parallel": {"context": 2, "tensor": 2}}
LAYOUTS = ("2-lm-tensor", "2-kd-tensor", "2-kd-offload", "2-kd-context", "2-rpo-context")
LAYOUTS += ("2-grpo-context", "2-gkd-context", "2-kd-pipeline", "2-sft-pipeline")


def _job(home: Path, name: str, objective: str, **settings: Any) -> dict[str, Any]:
    return {
        "objective": objective,
        "run": str(home / name),
        "out": str(home / f"{name}.safetensors"),
        **settings,
    }


def _result(home: Path, name: str) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    return load_file(home / f"{name}.safetensors"), read_metrics(home / name)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process, of two, and of four, under names `WORLD-OBJECTIVE-WHAT`."""
    home = tmp_path_factory.mktemp("ranks")
    for name in NAMES:
        train(**_job(home, f"1-{name}", name))
        train(**_job(home, f"12-{name}", name, stop=3))
    gradients(str(home / "1.safetensors"))
    two = [{"out": str(home / "2.safetensors"), **TENSOR}]
    two += [_job(home, f"2-{name}-tensor", name, **TENSOR) for name in ("lm", "kd")]
    two.append(_job(home, "2-kd-offload", "kd", **OFFLOAD))
    two += [_job(home, f"2-{name}-pipeline", name, **PIPELINE) for name in ("kd", "sft")]
    two += [_job(home, "2-kd-piped-again", "kd", stop=stop, **PIPELINE) for stop in (3, None)]
    two.append(_job(home, "21-kd-pipeline", "kd", stop=3, **PIPELINE))
    train(**_job(home, "1-wide", "wide"))
    eight = {"optimizer": "adamw-8bit", "parallel": {"tensor": 2, "offload": True}}
    two.append(_job(home, "2-wide", "wide", **eight))
    two += [_job(home, "2-wide-resumed", "wide", stop=stop, **eight) for stop in (3, None)]
    for name in NAMES:
        two.append(_job(home, f"2-{name}", name))
        two += [_job(home, f"2-{name}-resumed", name, stop=stop) for stop in (3, None)]
        two.append(_job(home, f"21-{name}", name, stop=3))
        two.append(_job(home, f"12-{name}", name))
    for name in ("rpo", "grpo", "gkd"):
        train(**_job(home, f"1-{name}", name))
    two += [
        _job(home, f"2-{name}-context", name, **CONTEXT) for name in ("kd", "rpo", "grpo", "gkd")
    ]
    run_ranks(CODE, json.dumps(two))
    train(**_job(home, "21-kd-pipeline", "kd"))
    for name in NAMES:
        train(**_job(home, f"21-{name}", name))
    return home


@pytest.fixture(scope="module")
def four(home: Path) -> Path:
    """Four processes on two cores take half a minute."""
    four = [_job(home, "4-kd-tensor", "kd", **TENSOR), _job(home, "4-kd-shard", "kd", **REPLICAS)]
    four.append(_job(home, "4-kd-context", "kd", **CONTEXT))
    both = {"parallel": {"pipeline": 2, "tensor": 2, "gradient_checkpointing": True}}
    four.append(_job(home, "4-kd-pipeline", "kd", **both))
    four.append({"out": str(home / "4.safetensors"), **BOTH})
    run_ranks(CODE, json.dumps(four), world=4)
    return home


def _assert_close(home: Path, name: str, other: str) -> None:
    (weights, metrics), (others, rows) = _result(home, name), _result(home, other)
    assert weights.keys() == others.keys()
    mine, theirs = (torch.cat([w[key].flatten() for key in others]) for w in (weights, others))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3)
    # Adam divides by a gradient's size: one that is nearly zero moves as rounding says.
    assert (~torch.isclose(mine, theirs, rtol=1e-4, atol=2e-5)).float().mean() < 1e-4
    for row, same in zip(metrics, rows, strict=True):
        assert row == pytest.approx(same, rel=1e-4, abs=1e-6)


def _assert_equal(home: Path, name: str, other: str) -> None:
    (weights, metrics), (others, rows) = _result(home, name), _result(home, other)
    assert metrics == rows
    assert all(torch.equal(value, others[key]) for key, value in weights.items())


@OBJECTIVES
def test_two_processes_are_one(objective: str, home: Path):
    _assert_close(home, f"2-{objective}", f"1-{objective}")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_one_process(name: str, home: Path):
    _assert_close(home, name, "1-" + name.split("-")[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["4-kd-tensor", "4-kd-shard", "4-kd-context", "4-kd-pipeline"])
def test_layouts_of_four_processes_are_one(name: str, four: Path):
    _assert_close(four, name, "1-kd")


def test_gradients_of_split_layers_are_those_of_one_process(home: Path):
    _assert_same_gradients(home, 2)


@pytest.mark.slow
def test_gradients_of_shared_rows_and_split_layers_are_those_of_one_process(four: Path):
    _assert_same_gradients(four, 4)


def _assert_same_gradients(home: Path, world: int) -> None:
    one, several = (load_file(home / f"{count}.safetensors") for count in (1, world))
    assert {f"layers.0.attention.op.{norm}_norm.weight" for norm in "qk"} <= set(several)
    torch.testing.assert_close(several, one, rtol=1e-5, atol=1e-5)


def test_moments_of_8_bits_are_near_and_resume_bit_for_bit(home: Path):
    _assert_equal(home, "2-wide-resumed", "2-wide")
    (weights, eight), (others, plain) = (_result(home, f"{n}-wide") for n in (2, 1))
    torch.testing.assert_close(weights, others, rtol=0, atol=5e-3)  # steps of 3e-3 each
    losses = [row["loss"] for row in eight]
    assert losses == pytest.approx([row["loss"] for row in plain], rel=1e-3)
    assert losses[0] == pytest.approx(plain[0]["loss"], rel=1e-6)
    assert losses[-1] != plain[-1]["loss"]


def test_a_pipeline_resumes_and_is_saved(home: Path):
    _assert_equal(home, "2-kd-piped-again", "2-kd-pipeline")
    _assert_close(home, "21-kd-pipeline", "1-kd")
    weights, saved = _result(home, "2-kd-pipeline")[0], load_model(home / "2-kd-pipeline" / "model")
    assert all(torch.equal(value, weights[key]) for key, value in saved.state_dict().items())


@OBJECTIVES
def test_resuming_on_the_same_processes_is_bit_for_bit(objective: str, home: Path):
    _assert_equal(home, f"2-{objective}-resumed", f"2-{objective}")


@OBJECTIVES
@pytest.mark.parametrize("worlds", ["12", "21"])
def test_a_run_goes_on_in_another_number_of_processes(objective: str, worlds: str, home: Path):
    _assert_close(home, f"{worlds}-{objective}", f"1-{objective}")


@pytest.mark.parametrize("again", [True, "selective"])
def test_recomputed_blocks_give_the_same_bits(again: bool | str, home: Path):
    train(**_job(home, f"1-kd-{again}", "kd", parallel={"gradient_checkpointing": again}))
    _assert_equal(home, f"1-kd-{again}", "1-kd")


@pytest.mark.parametrize("objective", ["lm", "kd"])
def test_bfloat16_is_near_and_its_weights_are_float32(objective: str, home: Path):
    train(**_job(home, f"1-{objective}-half", objective, dtype="bfloat16"))
    (weights, metrics), (_, rows) = (_result(home, f"1-{objective}{x}") for x in ("-half", ""))
    assert all(value.dtype == torch.float32 for value in weights.values())
    losses = [row["loss"] for row in metrics]
    assert losses == pytest.approx([row["loss"] for row in rows], rel=1e-2)
    assert losses != [row["loss"] for row in rows]


def test_stages_are_balanced_by_parameters_and_none_is_empty():
    words = [("gqa-4", "swiglu-48"), ("noop", "noop"), ("gqa-4", "noop"), ("gqa-4", "swiglu-480")]
    config = toy_config(1, vocab_size=2).with_words(words)
    assert split_layers(config, 2) == [range(3), range(3, 4)]
    assert split_layers(config, 3) == [range(1), range(1, 3), range(3, 4)]


def test_a_layout_that_does_not_divide_is_told_with_those_that_do(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(LayoutError, match="parallel.tensor = 4 .* 6 processes .* 1, 2, 3, 6"):
        Layout.of(ParallelConfig(tensor=4))
    with pytest.raises(LayoutError, match="parallel.tensor = 4 .* 3 processes of a stage.* 1, 3"):
        Layout.of(ParallelConfig(pipeline=2, tensor=4))
    with pytest.raises(LayoutError, match="parallel.shard = 2 .* 3 processes .* 1, 3"):
        Layout.of(ParallelConfig(tensor=2, shard=2))
    with pytest.raises(LayoutError, match="parallel.context = 2 .* 3 processes .* 1, 3"):
        Layout.of(ParallelConfig(tensor=2, context=2))


def test_neighbours_of_a_context_group_read_the_same_rows(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "12")
    ranks = []
    for rank in range(12):
        monkeypatch.setenv("RANK", str(rank))
        layout = Layout.of(ParallelConfig(tensor=2, context=3, shard=2))
        ranks.append((layout.data_rank, layout.data_world))
    assert ranks == [(rank // 6, 2) for rank in range(12)]


def test_what_is_stepped_is_what_is_held_behind_a_forward_pass_too():
    placement = Placement(dtype=torch.bfloat16)
    with dist.processes():
        module = placement.transformer(Transformer(toy_config()))
        batch = toy_batch(0)
        with torch.no_grad():
            module(batch.tokens, context_of(batch))
        held = trainable(module)
        assert {one.dtype for one in held.values()} == {torch.float32}
        assert held.keys() == {key for key, _ in Transformer(toy_config()).named_parameters()}
