"""A training step against the machine: share of the matmul peak, where the rest goes, processes.

    python benchmarks/step.py [--sizes 6M 45M 160M] [--steps 4] [--threads 1]
    python benchmarks/step.py --processes [--rounds 3]

Without --processes: the real Trainer with the LM loss at three sizes, documents of 32 to 512
tokens packed into rows of 1024, float32. Operations are counted (`train/flops.py`: what the
mathematics needs, no recomputation), CPU seconds measured, and the peak is the best of 20
products of 1024x1024 by the faster of torch's two libraries, before and after each size. One more
step runs under torch's profiler; its kernels are sorted into kinds.

With --processes: two gloo processes (FSDP2) of one thread each against one process of two
threads, on the same rows, in turn; ratios are medians of pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from training import Clocked, matmul_flops, open_run, write_data

from tessera import dist
from tessera.data.documents import Documents
from tessera.model.config import ModelConfig, uniform
from tessera.model.cpu import multiply
from tessera.model.transformer import Transformer
from tessera.objectives.lm import LM
from tessera.train.engine import Trainer
from tessera.train.flops import Work, model_cost
from tessera.train.optim import TrainConfig

LENGTH, ROW, STEP_TOKENS, SHORTEST = 512, 1024, 4096, 32
SIZES = {  # vocabulary, hidden, FFN, layers, heads, KV heads
    "6M": (320, 256, 688, 8, 4, 2),
    "45M": (8192, 512, 1376, 12, 8, 2),
    "160M": (32_000, 768, 2048, 16, 12, 4),
}
KINDS = {  # words in a kernel's name, in the order they are tried
    "attention": ("scaled_dot_product",),
    "matrix products": ("linear_pointwise", "aten::mm", "addmm", "bmm"),
    "AdamW": ("adamw",),
    "softmax of the head": ("softmax",),
}


def shape(size: str) -> ModelConfig:
    vocab, hidden, width, layers, heads, kv = SIZES[size]
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_attention_heads=heads,
        head_dim=hidden // heads,
        blocks=uniform(f"gqa-{kv}", f"swiglu-{width}", layers),
    )


def settings(steps: int) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        tokens_per_step=STEP_TOKENS,
        microbatch_tokens=ROW,
        sequence_length=LENGTH,
        schedule="constant",
        warmup=0.0,
        save_seconds=1e9,
    )


def draw(vocab: int, tokens: int) -> list[np.ndarray]:
    """Documents of log-uniform lengths, `tokens` predictions or a few more."""
    random, found = np.random.default_rng(0), []
    while tokens > 0:
        length = round(float(np.exp(random.uniform(np.log(SHORTEST), np.log(LENGTH)))))
        found.append(random.integers(0, vocab, length + 1))
        tokens -= length
    return found


class Measured(Clocked):
    """A clocked source that counts its batches' operations too."""

    def __init__(self, source: Documents, config: ModelConfig) -> None:
        super().__init__(source)
        self.config, self.flops = config, []

    def batches(self, step: int) -> list[Any]:
        batches = super().batches(step)
        cost = model_cost(self.config)
        self.flops.append(sum(cost.training(Work.of(batch)) for batch in batches))
        return batches


def trained(size: str, steps: int, folder: Path) -> tuple[Trainer, Measured]:
    """A Trainer that has run `steps` steps, and its source."""
    config, train = shape(size), settings(steps)
    data = folder / "data"
    if dist.is_main():
        write_data(data, draw(config.vocab_size, (steps + 2) * STEP_TOKENS), config.vocab_size)
    dist.barrier()
    layout = train.spread.layout
    documents = Documents(
        data,
        sequence_length=LENGTH,
        row_length=ROW,
        tokens_per_step=STEP_TOKENS,
        microbatch_tokens=ROW,
        seed=0,
        shard=(layout.data_rank, layout.data_world),
    )
    source = Measured(documents, config)
    module = train.spread.transformer(Transformer(config).init_weights(0))
    with open_run(folder / f"run-{dist.rank()}", "cpt") as run:
        trainer = Trainer(module, LM(), source, train, run)
        trainer.fit()
        source.mark()
    return trainer, source


def spans(source: Measured) -> tuple[float, float]:
    """Median wall and CPU seconds a step, without the first."""
    pairs = list(zip(source.marks[1:], source.marks[2:], strict=False))
    wall, cpu = (statistics.median(b[i] - a[i] for a, b in pairs) for i in (0, 1))
    return wall, cpu


def peak() -> float:
    return max(matmul_flops(torch.matmul), matmul_flops(multiply))


def kinds(trainer: Trainer, step: int) -> dict[str, float]:
    """Shares of a step's own kernel time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trainer.train_step(step)
    seconds: Counter[str] = Counter()
    for event in profile.key_averages():
        name = event.key.lower()
        kind = next((k for k, words in KINDS.items() if any(w in name for w in words)), "the rest")
        seconds[kind] += event.self_cpu_time_total
    return {kind: spent / seconds.total() for kind, spent in seconds.most_common()}


def of_size(size: str, steps: int) -> str:
    before = peak()
    with tempfile.TemporaryDirectory() as folder:
        trainer, source = trained(size, steps, Path(folder))
        wall, cpu = spans(source)
        shares = kinds(trainer, steps)
    best = max(before, peak())
    rate = statistics.median(source.flops[1:]) / cpu
    parameters = sum(p.numel() for p in trainer.module.parameters())
    parts = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
    return (
        f"| {size} | {parameters / 1e6:.1f} | {STEP_TOKENS / wall:,.0f} | {STEP_TOKENS / cpu:,.0f} "
        f"| {rate / 1e9:.0f} | {best / 1e9:.0f} | {rate / best:.0%} | {parts} |"
    )


def side(size: str, steps: int) -> None:
    """One process of a comparison: its main one prints seconds and the losses' end."""
    with dist.processes(), tempfile.TemporaryDirectory() as own:
        folder = dist.broadcast(own)
        trainer, source = trained(size, steps, Path(folder))
        wall, cpu = spans(source)
        total = float(trainer.layout.sum(torch.tensor(cpu, dtype=torch.float64)))
        if dist.is_main():
            rows = (Path(folder) / "run-0" / "metrics.jsonl").read_text().splitlines()
            print(json.dumps({"wall": wall, "cpu": total, "loss": json.loads(rows[-1])["loss"]}))
        dist.barrier()


def launched(processes: int, threads: int, size: str, steps: int) -> dict[str, float]:
    words = [__file__, "--side", "--sizes", size, "--steps", str(steps)]
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([*start, *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{processes} process(es) failed:\n{done.stderr[-2000:]}")
    return json.loads(next(x for x in done.stdout.splitlines() if x.startswith("{")))


def compare(size: str, options: argparse.Namespace) -> str:
    pairs = [
        (launched(2, 1, size, options.steps), launched(1, 2, size, options.steps))
        for _ in range(options.rounds)
    ]
    wall, cpu = (statistics.median(one[k] / two[k] for two, one in pairs) for k in ("wall", "cpu"))
    two, one = pairs[-1]
    return (
        f"| {size} | {STEP_TOKENS / two['wall']:,.0f} | {STEP_TOKENS / one['wall']:,.0f} "
        f"| {wall:.2f} | {cpu:.2f} | {two['loss']:.5f}, {one['loss']:.5f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", action="store_true")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side(options.sizes[0], options.steps)
        return
    started = time.strftime("%Y-%m-%d")
    print(
        f"{started}, {torch.backends.cpu.get_cpu_capability()}, float32, torch {torch.__version__}"
        f", {options.steps} steps of {STEP_TOKENS} positions\n"
    )
    if options.processes:
        print(
            "| | tokens/s, 2 gloo processes | 1 process, 2 threads | 2 processes / 2 threads, wall "
            "| CPU | losses at the end |\n|---|--:|--:|--:|--:|--:|"
        )
        for size in options.sizes:
            print(compare(size, options), flush=True)
        return
    torch.set_num_threads(options.threads)
    print(
        "| | parameters, M | tokens/s | tokens/CPU-s | GFLOP/CPU-s | matmul peak | share "
        "| kernels' time |\n|---|--:|--:|--:|--:|--:|--:|---|"
    )
    for size in options.sizes:
        print(of_size(size, options.steps), flush=True)


if __name__ == "__main__":
    main()
