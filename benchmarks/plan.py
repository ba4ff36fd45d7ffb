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
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from kd import memory as process_memory
from step import LENGTH, ROW, SIZES, STEP_TOKENS, draw, settings, shape
from training import open_run, write_data

from tessera import dist
from tessera.data.documents import Documents
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
        config, train = shape(size), settings(3)
        if dist.is_main():
            ids = draw(config.vocab_size, 5 * STEP_TOKENS)
            write_data(folder / "data", ids, config.vocab_size)
        dist.barrier()
        layout = train.spread.layout
        source = Documents(
            folder / "data",
            sequence_length=LENGTH,
            row_length=ROW,
            tokens_per_step=STEP_TOKENS,
            microbatch_tokens=ROW,
            seed=0,
            shard=(layout.data_rank, layout.data_world),
        )
        before = process_memory("VmRSS")
        module = train.spread.transformer(Transformer(config).init_weights(0))
        chosen = LM()
        if objective == "kd":
            teacher = Transformer(config).init_weights(1).requires_grad_(False)
            chosen = KD(train.spread.transformer(teacher), KDConfig(train=train, cosine=0.0))
        with open_run(folder / f"run-{dist.rank()}", "cpt") as run:
            Trainer(module, chosen, source, train, run).fit()
        grown = max(dist.gather(process_memory("VmHWM") - before))
        if dist.is_main():
            print(json.dumps(grown))
        dist.barrier()


def measured(size: str, objective: str, processes: int) -> float:
    words = [__file__, "--side", objective, "--sizes", size]
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*start, *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{size} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.splitlines()[-1])


def row(size: str, objective: str, processes: int) -> str:
    config = shape(size)
    teacher = config if objective == "kd" else None
    job = Job("side", settings(3), config, teacher)
    parts = memory(job, Layout(1, processes, 1, False), 0.0, accelerator=False)
    state = (parts.weights + parts.gradients + parts.moments + parts.teacher) / 2**20
    rest = parts.total / 2**20 - state
    found = measured(size, objective, processes)
    return (
        f"| {size} | {objective} | {processes} | {state:,.0f} | {rest:,.0f} "
        f"| {state + rest:,.0f} | {found:,.0f} | {found / (state + rest):.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--side", choices=OBJECTIVES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        torch.set_num_threads(1)
        side(options.sizes[0], options.side)
        return
    print(
        "| | objective | processes | state, MB | all else | predicted | measured | ratio |\n"
        "|---|---|--:|--:|--:|--:|--:|--:|"
    )
    for size in options.sizes:
        for objective in OBJECTIVES:
            for processes in options.processes:
                print(row(size, objective, processes), flush=True)


if __name__ == "__main__":
    main()
