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
from tessera.model.transformer import Transformer
from tessera.objectives.kd import KD, KDConfig
from tessera.objectives.lm import LM
from tessera.planning import Job, Layout, memory
from tessera.train.engine import Trainer

OBJECTIVES = ("lm", "kd")


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


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=LARGE)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--side", choices=OBJECTIVES, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> None:
    if options.side:
        side(options.sizes[0], options.side)
        return
    found = [(s, o, p) for s in options.sizes for o in OBJECTIVES for p in options.processes]
    table([row(*one) for one in found])


if __name__ == "__main__":
    harness.main(__doc__, Command(run, arguments, {"sizes": ["toy"]}))
