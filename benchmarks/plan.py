"""`tessera plan` against this machine: predicted memory beside a real training's peak.

    python benchmarks/plan.py [--sizes 6M 45M 160M] [--processes 1 2]

The real Trainer runs three steps (LM, and KD from a teacher of the same shape) in one process, or
spread over two by FSDP2 over gloo, each in fresh processes. Measured is the peak of the fullest
process (VmHWM) less what it held before a model was built. The parts that follow from counting
(weights, gradients, moments) are identities and tested as such; this is about their sum with
activations and loss, and about what no part counts: buffers of libraries, pages of code first
touched, what the allocator keeps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import harness
from harness import Command, Figures, fresh, memory_mb, table
from training import (
    LARGE,
    PACKED,
    SIZES,
    STEP_TOKENS,
    draw,
    open_run,
    packed,
    settings,
    shape,
    write_data,
)

from tessera import dist
from tessera.devices import DEVICES
from tessera.model.config import ModelConfig, uniform
from tessera.model.transformer import Transformer
from tessera.objectives.kd import KD, KDConfig
from tessera.objectives.lm import LM
from tessera.planning.training import NETWORK, Cluster, Job, Layout, memory, planned
from tessera.train.engine import Trainer
from tessera.train.optim import TrainConfig

OBJECTIVES = ("lm", "kd")
# torchtitan's own runs in bfloat16 of 8,192 tokens a row, tokens a second and GPU: eager, compiled
# (its benchmarks/llama3_h100_202412 and asyncTP_llama3_h100_2025-06; the 405B: docs/performance.md
# of 2024). Its H100s have 96 GB at 2.4 TB/s and 500 W.
GRAND_TETON = replace(DEVICES["H100"], memory=96e9, bandwidth=2.4e12)
LLAMAS = {"8B": (4096, 32, 32, 14_336), "70B": (8192, 80, 64, 28_672)}
LLAMAS["405B"] = (16_384, 126, 128, 53_248)
TITAN: list[tuple[str, int, Layout, int, float | None, float | None]] = [
    ("8B", 1, Layout(1, 8, 1, "selective"), 2, 5762, 6667),
    ("8B", 16, Layout(1, 128, 1, "selective"), 2, 5605, 6514),
    ("8B", 8, Layout(1, 8, 8, "selective"), 12, None, 4378),
    ("70B", 32, Layout(1, 32, 8, True), 16, None, 597.3),
    ("405B", 16, Layout(1, 16, 8, True), 2, 109, None),
]


def side(size: str, objective: str) -> None:
    """Trains in this process of a job; the main one prints the fullest process's MB."""
    with dist.processes(), tempfile.TemporaryDirectory() as own:
        folder = Path(dist.broadcast(own))
        config, train = shape(SIZES[size]), settings(3)
        if dist.is_main():
            ids = draw(config.vocab_size, 5 * STEP_TOKENS)
            write_data(folder / "data", ids, config.vocab_size)
        dist.barrier()
        layout = train.placement.layout
        shard = (layout.data_rank, layout.data_world)
        source = packed(folder / "data", train, PACKED, shard)
        before = memory_mb("VmRSS")
        module = train.placement.transformer(Transformer(config).init_weights(0))
        chosen = LM()
        if objective == "kd":
            teacher = Transformer(config).init_weights(1).requires_grad_(False)
            chosen = KD(train.placement.transformer(teacher), KDConfig(train=train, cosine=0.0))
        with open_run(folder / f"run-{dist.rank()}", "cpt") as run:
            Trainer(module, chosen, source, train, run).fit()
        grown = max(dist.gather(memory_mb() - before))
        if dist.is_main():
            print(json.dumps({"grown": grown}))
        dist.barrier()


def row(size: str, objective: str, processes: int) -> Figures:
    config = shape(SIZES[size])
    teacher = config if objective == "kd" else None
    job = Job("side", settings(3), config, teacher)
    parts = memory(job, Layout(1, processes, 1, False), 0.0, accelerator=False)
    state = (parts.weights + parts.gradients + parts.moments + parts.teacher) / 2**20
    predicted = parts.total / 2**20
    words = ["--side", objective, "--sizes", size]
    found = fresh(__file__, words, processes=processes)["grown"]
    return {
        "": size,
        "objective": objective,
        "processes": processes,
        "state, MB": f"{state:,.0f}",
        "all else": f"{predicted - state:,.0f}",
        "predicted": f"{predicted:,.0f}",
        "measured": f"{found:,.0f}",
        "ratio": f"{found / predicted:.2f}",
    }


def published() -> Iterator[Figures]:
    """Tokens a second of trainings that others ran, and what a plan says of them."""
    for name, nodes, layout, rows, eager, compiled in TITAN:
        hidden, layers, heads, width = LLAMAS[name]
        config = ModelConfig(
            vocab_size=128_256,
            hidden_size=hidden,
            num_attention_heads=heads,
            head_dim=128,
            blocks=uniform("gqa-8", f"swiglu-{width}", layers),
        )
        train = TrainConfig(
            steps=1,
            tokens_per_step=rows * layout.rows * 8192,
            microbatch_tokens=8192 * rows,
            sequence_length=8192,
            dtype="bfloat16",
        )
        cluster = Cluster(nodes, 8, GRAND_TETON, NETWORK)
        plan = planned(Job("titan", train, config), cluster, layout)
        rate = train.tokens_per_step / plan.time.total / cluster.world
        cells = [f"{n:,.0f} ({rate / n - 1:+.0%})" if n else "" for n in (eager, compiled)]
        yield {
            "Llama 3.1": name,
            "GPUs": cluster.world,
            "train.parallel": str(layout),
            "planned, tokens/s and GPU": f"{rate:,.0f}",
            "MFU": f"{plan.time.mfu:.0%}",
            "published, eager": cells[0],
            "compiled": cells[1],
        }


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=LARGE)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--side", choices=OBJECTIVES, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> None:
    if options.side:
        side(options.sizes[0], options.side)
        return
    table([*published()], "Trainings that others ran")
    found = [(s, o, p) for s in options.sizes for o in OBJECTIVES for p in options.processes]
    table([row(*one) for one in found])


if __name__ == "__main__":
    harness.main(__doc__, Command(run, arguments, {"sizes": ["toy"]}))
