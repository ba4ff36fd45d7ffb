"""What is counted is what torch executes, where torch counts; padding and masked halves are not."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tessera.data.batch import pack
from tessera.model import matmul
from tessera.model.config import parse_kind
from tessera.model.context import Context
from tessera.model.transformer import Transformer
from tessera.objectives.bld import BLD
from tessera.objectives.kd import KD, KDConfig
from tessera.objectives.lm import LM
from tessera.puzzle.library import BlockLibrary
from tessera.puzzle.space import SpaceConfig, build_space
from tessera.puzzle.surgery import collect_statistics
from tessera.run import Run, read_metrics
from tessera.train.engine import Trainer
from tessera.train.flops import Work, model_cost, peak, subblock_cost
from tessera.train.optim import TrainConfig
from tests.toy import ToySource, toy_batch, toy_config, toy_model

WORDS = (("gqa-4", "swiglu-48"), ("noop", "swiglu-10"), ("gqa-2", "noop"), ("linear", "linear"))
ROWS, LENGTH = 2, 16
FULL = Work(ROWS * LENGTH, ROWS * LENGTH * LENGTH)  # torch counts the masked half, too


@pytest.fixture(autouse=True)
def counted_kernels(monkeypatch):
    """Only kernels that torch's counter knows."""
    monkeypatch.setattr(matmul, "prefers_onednn", lambda weight: False)
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _executed(action) -> int:
    with FlopCounterMode(display=False) as counter:
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


def test_training_is_three_forward_passes():
    module = _mixed()
    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    found = _executed(lambda: module.logits(module(tokens)).sum().backward())
    # gated_down's backward is a Function of ours, which the counter follows just the same.
    assert found == model_cost(module.config).training(FULL)


@pytest.mark.parametrize(
    "kind, word",
    [("attention", "gqa-2"), ("attention", "linear"), ("ffn", "swiglu-24"), ("ffn", "linear")],
)
def test_a_unit_on_its_own(kind, word):
    module = Transformer(toy_config(1).with_words((("gqa-4", "swiglu-48"),))).init_weights(0)
    swap = module.config.blocks[0].with_(kind, parse_kind(kind, word))
    block = Transformer(toy_config(1).with_words((swap.words,))).init_weights(0).blocks[0]
    unit = getattr(block, kind)
    context = module.prepare(Context.rows(torch.zeros(ROWS, LENGTH, dtype=torch.long)))
    x = torch.randn(ROWS, LENGTH, 32)
    with torch.no_grad():
        unit.norm.weight.requires_grad_(False)  # its gradient would ask for that of the product
    found = _executed(lambda: unit(x, context).sum().backward())
    cost = subblock_cost(module.config, parse_kind(kind, word))
    assert found == cost.local(FULL)


def test_documents_alone_count():
    documents = [list(range(length + 1)) for length in (3, 5, 8)]
    packed = pack(documents, 16)
    assert (packed.segments < 0).sum() == 0
    assert Work.of(packed) == Work(16, 6 + 15 + 36)
    padded = pack(documents[:2], 16)
    assert Work.of(padded) == Work(8, 6 + 15)
    assert Work.of(packed, sliding_window=4) == Work(16, 6 + 14 + 26)


def test_objectives_sum_their_models():
    batch, module, parent = toy_batch(0), _mixed(), toy_model(4)
    work = Work.of(batch)
    train = TrainConfig(steps=1)
    lm = LM().flops(module, batch)
    assert lm == model_cost(module.config).training(work)
    kd = KD(parent, KDConfig(train=train)).flops(module, batch)
    assert kd - lm == model_cost(parent.config).forward(work)


def test_a_library_costs_its_units_and_the_parent_up_to_them():
    parent, batch = toy_model(3), toy_batch(0)
    statistics = collect_statistics(parent, [toy_batch(9)])
    space = build_space(SpaceConfig(attention=(), ffn=("50%",)), parent.config)
    work = Work.of(batch)
    objective = BLD(parent, statistics)
    one, two = (
        BlockLibrary.from_parent(parent, space, statistics, [(n, "ffn", "swiglu-24") for n in keys])
        for keys in ([0], [0, 1])
    )
    unit = subblock_cost(parent.config, parse_kind("ffn", "swiglu-24")).local(work)
    block = model_cost(parent.config, head=False).forward(work) // 3
    assert objective.flops(one, batch) == block + unit
    assert objective.flops(two, batch) == 2 * (block + unit)


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
