"""What is counted is what torch executes, where torch counts; padding and masked halves are not."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tessera.data.batch import pack
from tessera.model import cpu
from tessera.model.transformer import Transformer
from tessera.objectives.kd import KD, KDConfig
from tessera.objectives.lm import LM, SFT
from tessera.puzzle.bld import BLD
from tessera.puzzle.library import BlockLibrary, save_library
from tessera.puzzle.space import SpaceConfig, Unit, build_space
from tessera.puzzle.surgery import collect_statistics
from tessera.runs.run import Run, read_metrics
from tessera.train import flops
from tessera.train.engine import Trainer
from tessera.train.flops import Work, model_cost, peak
from tessera.train.optim import TrainConfig
from tests.toy import ToySource, toy_batch, toy_config, toy_model

WORDS = (("gqa-4", "swiglu-48"), ("noop", "swiglu-10"), ("gqa-2", "noop"), ("linear", "linear"))
ROWS, LENGTH = 2, 16
FULL = Work(ROWS * LENGTH, ROWS * LENGTH * LENGTH)  # torch counts the masked half, too


@pytest.fixture(autouse=True)
def counted_kernels(monkeypatch):
    """Only kernels that torch's counter knows."""
    monkeypatch.setattr(cpu, "prefers_onednn", lambda weight: False)
    with sdpa_kernel(SDPBackend.MATH):
        yield


# torch's counter knows `addmm`, and not the one in place that sums the head's gradient.
IN_PLACE = {torch.ops.aten.addmm_: lambda sum, a, b, out_shape: 2 * a[0] * a[1] * b[1]}


def _executed(action) -> int:
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        action()
    return counter.get_total_flops()


def _mixed() -> Transformer:
    return Transformer(toy_config(4).with_words(WORDS)).init_weights(0)


def test_a_forward_pass_of_mixed_words():
    module = _mixed()
    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    with torch.no_grad():
        found = _executed(lambda: module.logits(module(tokens)))
    assert found == model_cost(module.config).forward(FULL)


def _lm():
    return _mixed(), LM()


def _sft():
    return _mixed(), SFT()


def _kd():
    parent = toy_model(4).requires_grad_(False)
    return _mixed(), KD(parent, KDConfig(train=TrainConfig(steps=1)))


def _bld(attention=("gqa-2", "linear"), ffn=("50%", "linear"), only=None):
    parent = toy_model(3).requires_grad_(False)
    statistics = collect_statistics(parent, [toy_batch(9)])
    space = build_space(SpaceConfig(attention=attention, ffn=ffn), parent.config)
    return BlockLibrary.from_parent(parent, space, statistics, only), BLD(parent, statistics)


def _pair(directory):
    library, objective = _bld()
    save_library(library, directory)
    pairs = [Unit.pair(1, "gqa-2", "swiglu-24"), Unit.pair(1, "gqa-4", "linear")]
    return BlockLibrary.from_pairs(objective.parent, directory, pairs), objective


@pytest.mark.parametrize("name", ["lm", "sft", "kd", "bld", "bld of one layer", "couple"])
def test_an_objective_counts_what_its_losses_and_gradients_execute(name, monkeypatch, tmp_path):
    makers = {"lm": _lm, "sft": _sft, "kd": _kd, "bld": _bld}
    makers["bld of one layer"] = lambda: _bld(only=[(1, "attention", "gqa-2")])
    makers["couple"] = lambda: _pair(tmp_path)
    module, objective = makers[name]()
    batch = pack([range(LENGTH + 1)] * ROWS, LENGTH)

    def run():
        for loss, _ in objective.losses(module, batch):
            loss.backward()

    monkeypatch.setattr(Work, "of", lambda *_: FULL)
    assert objective.flops(module, batch) == _executed(run)


def test_documents_alone_count():
    documents = [list(range(length + 1)) for length in (3, 5, 8)]
    packed = pack(documents, 16)
    assert (packed.segments < 0).sum() == 0
    assert Work.of(packed) == Work(16, 6 + 15 + 36)
    padded = pack(documents[:2], 16)
    assert Work.of(padded) == Work(8, 6 + 15)
    assert Work.of(packed, sliding_window=4) == Work(16, 6 + 14 + 26)


def test_untrained_tokens_never_meet_the_head_of_sft():
    batch, module = pack([range(17)], 16), _mixed()
    all_trained = SFT().flops(module, batch)
    batch.weight[:, :5] = 0
    head = 6 * module.config.hidden_size * module.config.vocab_size
    assert all_trained - SFT().flops(module, batch) == 5 * head


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_the_peak_of_a_board_is_its_own_or_none(name, tera):
    assert flops._sheet_peak(name) == (tera and tera * 1e12)


def test_speed_is_logged_apart_and_once_a_step(tmp_path):
    config = TrainConfig(steps=3, save_seconds=1e9)
    with Run.open(tmp_path / "r", stage="parent", config={}, inputs={}, seed=0, quiet=True) as run:
        Trainer(toy_model(), LM(), ToySource(), config, run).fit()
    names = set().union(*read_metrics(tmp_path / "r"))
    assert names == {"step", "loss", "grad_norm", "lr"}
    timings = [run.path.joinpath("timings.jsonl").read_text().splitlines()]
    assert len(timings[0]) == 3 and '"mfu"' in timings[0][0]
    best = peak(torch.float32)
    assert best and best > 1e8
