"""Memory of a process by the keys of `train.parallel` and the optimizer, and the loss by each.

    python benchmarks/parallel.py [--size 45M] [--tokens 2048]

Two processes over gloo train a random Llama for two steps, each way in fresh processes. Measured is
the peak of the fullest process (VmHWM) less what it held before a model was built, with an
allocator that is told to return blocks to the kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import harness
from harness import Command, Figures, fresh, memory_mb, table
from training import SIZES, draw, open_run, packed, settings, shape, write_data

from tessera import dist
from tessera.model.transformer import Transformer
from tessera.objectives.lm import LM
from tessera.runs.run import read_metrics
from tessera.train.engine import Trainer

WAYS: dict[str, dict[str, Any]] = {
    "sharded": {},
    'gradient_checkpointing = "selective"': {"gradient_checkpointing": "selective"},
    "gradient_checkpointing = true": {"gradient_checkpointing": True},
    "tensor = 2": {"tensor": 2},
    "pipeline = 2": {"pipeline": 2},
    "pipeline = 2, gradient_checkpointing = true": {"pipeline": 2, "gradient_checkpointing": True},
    'optimizer = "adamw-8bit"': {"optimizer": "adamw-8bit"},
}


def side(way: dict[str, Any], size: str, tokens: int) -> None:
    """Trains in this process of a job; the main one prints the fullest process's MB."""
    changes: dict[str, Any] = {"tokens_per_step": 2 * tokens, "microbatch_tokens": tokens}
    if "optimizer" in way:
        changes["optimizer"] = way.pop("optimizer")
    with dist.processes(), tempfile.TemporaryDirectory() as own:
        folder = Path(dist.broadcast(own))
        config, train = shape(SIZES[size]), settings(2, parallel=way, **changes)
        if dist.is_main():
            ids = draw(config.vocab_size, 8 * tokens)
            write_data(folder / "data", ids, config.vocab_size)
        dist.barrier()
        layout = train.placement.layout
        shard = (layout.data_rank, layout.data_world)
        source = packed(folder / "data", train, tokens, shard)
        before = memory_mb("VmRSS")
        module = train.placement.transformer(Transformer(config).init_weights(0))
        with open_run(folder / f"run-{dist.rank()}", "cpt") as run:
            Trainer(module, LM(), source, train, run).fit()
        grown = max(dist.gather(memory_mb() - before))
        if dist.is_main():
            losses = [row["loss"] for row in read_metrics(folder / "run-0")]
            print(json.dumps({"grown": grown, "loss": losses[-1]}))
        dist.barrier()


def row(name: str, options: argparse.Namespace, base: float | None) -> Figures:
    words = ["--side", json.dumps(WAYS[name]), "--size", options.size, "--tokens"]
    found = fresh(__file__, [*words, str(options.tokens)], processes=2)
    ratio = f"{found['grown'] / base:.2f}" if base else "1"
    return {
        "two processes": name,
        "peak, MB": f"{found['grown']:,.0f}",
        "ratio": ratio,
        "loss of step 2": f"{found['loss']:.6f}",
        "grown": found["grown"],
    }


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, default="45M")
    parser.add_argument("--tokens", type=int, default=2048, help="of a row")
    parser.add_argument("--side", type=json.loads, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> None:
    if options.side is not None:
        side(options.side, options.size, options.tokens)
        return
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "262144"
    rows: list[Figures] = []
    for name in WAYS:
        rows.append(row(name, options, rows[0]["grown"] if rows else None))
    table([{key: value for key, value in one.items() if key != "grown"} for one in rows])


if __name__ == "__main__":
    harness.main(__doc__, Command(run, arguments, {"size": "toy", "tokens": 512}))
