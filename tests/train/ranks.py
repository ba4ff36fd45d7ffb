"""Trainings of the identities in as many processes as there are, for test_parallel.py.

python -m tests.train.ranks JOBS      a JSON list of jobs, each the keywords of `train`
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tessera import dist
from tessera.data.batch import Batch
from tessera.data.preferences import Pair
from tessera.model.checkpoint import save_model, whole
from tessera.model.config import uniform
from tessera.model.transformer import Transformer
from tessera.objectives.gkd import GKD, GKDLossConfig
from tessera.objectives.grpo import PolicyGradient, PolicyLossConfig
from tessera.objectives.kd import KD, KDConfig
from tessera.objectives.lm import LM, SFT
from tessera.objectives.rpo import RPO, RPOLossConfig
from tessera.rl import experience, preference
from tessera.rl.experience import Answer, Group
from tessera.runs.run import Run
from tessera.train.engine import Objective, Trainer
from tessera.train.optim import TrainConfig
from tests import tiny
from tests.toy import ToySource, split_rows, toy_batch, toy_config

# With what two processes cannot split: one KV head, a width of 9, and rows of 15 tokens.
WORDS = (("gqa-4", "swiglu-48"), ("noop", "swiglu-9"), ("gqa-2", "noop"), ("linear", "linear"))
WORDS += (("gqa-1", "swiglu-10"),)


class Ranks(ToySource):
    """Rows of a step dealt to the data ranks, equally many each."""

    def __init__(self, config: TrainConfig, objective: str) -> None:
        super().__init__()
        layout = config.placement.layout
        self.rank, self.world = layout.data_rank, layout.data_world
        self.rows = {"rpo": pairs, "grpo": answers, "gkd": answers}.get(objective, documents)

    def batches(self, step: int) -> list[Batch]:
        return self.rows(step)[self.rank :: self.world]


def documents(step: int) -> list[Batch]:
    rows = split_rows(toy_batch(step, rows=4, length=15))
    for mode, row in enumerate(rows):
        row.mode = torch.full_like(row.tokens, mode % 3)
    return rows


def pairs(step: int) -> list[Batch]:
    """Rows of two pairs, of one, and of none."""
    ids = toy_batch(step, rows=3, length=24).tokens.tolist()
    made = [Pair(row[:7], row[7:11], row[11:24], 0.1 * n) for n, row in enumerate(ids, 1)]
    return [preference._row(some) for some in (made[:2], made[2:], [], [])]


def answers(step: int) -> list[Batch]:
    """Rows of a prompt and two answers to it, the second with an advantage below 0."""
    made = []
    for row in toy_batch(step, rows=4, length=30).tokens.tolist():
        written = [
            Answer(ids, [-3.0] * len(ids), "stop", "", None, {}, True, advantage)
            for ids, advantage in ((row[9:14], 1.0), (row[14:30], -0.5))
        ]
        made.append(experience.row([Group(0, None, row[:9], written)], "sequence"))
    return made


def lm(config: TrainConfig, **changes: Any) -> tuple[nn.Module, Objective]:
    module = tiny.model(toy_config(5, qk_norm=True, **changes).with_words(WORDS))
    return config.placement.transformer(module), LM()


def wide(config: TrainConfig) -> tuple[nn.Module, Objective]:
    """Of matrices whose halves are large enough for moments of 8 bits."""
    shape = toy_config(1, hidden_size=64, blocks=uniform("gqa-4", "swiglu-128", 1))
    return config.placement.transformer(tiny.model(shape)), LM()


def sft(config: TrainConfig) -> tuple[nn.Module, Objective]:
    return lm(config)[0], SFT()


def kd(config: TrainConfig) -> tuple[nn.Module, Objective]:
    child, _ = lm(config, sliding_window=5)
    settings = KDConfig(train=config, cosine=0.5, lm=0.1)
    return child, KD(frozen(config, child), settings)


def frozen(config: TrainConfig, beside: Any = None) -> Transformer:
    teacher = tiny.model(toy_config(5), seed=1).requires_grad_(False)
    return config.placement.transformer(teacher, beside)


def rpo(config: TrainConfig) -> tuple[nn.Module, Objective]:
    return lm(config, sliding_window=5)[0], RPO(RPOLossConfig(sft=0.1), frozen(config))


def grpo(config: TrainConfig) -> tuple[nn.Module, Objective]:
    return lm(config, sliding_window=5)[0], PolicyGradient(PolicyLossConfig(kl=0.1), frozen(config))


def gkd(config: TrainConfig) -> tuple[nn.Module, Objective]:
    return lm(config, sliding_window=5)[0], GKD(frozen(config), GKDLossConfig(beta=0.5))


MAKE = {"lm": lm, "wide": wide, "sft": sft, "kd": kd, "rpo": rpo, "grpo": grpo, "gkd": gkd}


def train(objective: str, run: str, out: str, stop: int | None = None, **settings: Any) -> None:
    """Train in run directory `run` and write the final weights, whole, to `out`.

    settings: those of TrainConfig; `stop`: the run is interrupted before that step (from 0).
    """
    config = TrainConfig(**{"steps": 6, "lr": 3e-3, "save_seconds": 1e-9, **settings})
    module, loss = MAKE[objective](config)
    source = Ranks(config, objective)
    plain = source.batches
    for batch in plain(0) if config.parallel.context > 1 else ():
        own = batch.shared(config.placement.layout)
        assert own.tokens.shape[1] * config.parallel.context < batch.tokens.shape[1] + 4

    def stopping(step: int) -> list[Batch]:
        if step == stop:
            raise KeyboardInterrupt
        return plain(step)

    source.batches = stopping  # type: ignore[method-assign]
    opened = Run.open(Path(run), stage="kd", config={}, inputs={}, seed=0, quiet=True)
    with contextlib.suppress(KeyboardInterrupt), opened:
        Trainer(module, loss, source, config, opened).fit()
    _save({k: v.detach() for k, v in module.named_parameters()}, out)
    if config.parallel.pipeline > 1:
        assert isinstance(module, Transformer)
        save_model(module, opened.model_path)


def gradients(out: str, **settings: Any) -> None:
    """Write the gradients of one step of `lm` to `out`, whole."""
    config = TrainConfig(steps=1, **settings)
    module, objective = lm(config, qkv_bias=True, o_bias=True, mlp_bias=True)
    for batch in Ranks(config, "lm").batches(0):
        batch = batch.shared(config.placement.layout)
        for loss, _ in objective.losses(module, batch):
            loss.backward()
    _save({k: v.grad for k, v in module.named_parameters() if v.grad is not None}, out)


def _save(tensors: dict[str, Tensor], out: str) -> None:
    tensors = {key: whole(tensor).contiguous() for key, tensor in tensors.items()}
    for of_a_stage in dist.gather(tensors):
        tensors |= of_a_stage
    if dist.is_main():
        save_file(tensors, out)
    dist.barrier()


def main() -> None:
    with dist.processes():
        for job in json.loads(sys.argv[1]):
            (train if "run" in job else gradients)(**job)


if __name__ == "__main__":
    main()
