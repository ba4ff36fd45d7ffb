"""Training speed: the LM objective on packed documents against TRL's SFTTrainer, in one run.

    python benchmarks/training.py [--baselines DIR] [--peer PYTHON] [--rounds 3] [--steps 10]

DIR (../shared/baselines) holds trl_sft.py and _trl_common.py: a random Llama of 6M parameters,
conversations of arithmetic, steps of 4096 positions, AdamW at a constant 1e-3, float32. Both
sides read the same conversations through the same tokenizer. TRL runs at its best setting (one
row of 512 at a time) and at its obvious one (8 rows at once); pairs of ours and TRL's alternate,
each in a fresh process. A rate counts predictions: positions with a label, which both share.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tessera.data.batch import Batch, Ids
from tessera.data.documents import Documents
from tessera.data.store import TokenWriter
from tessera.model.config import ModelConfig, uniform
from tessera.model.cpu import multiply
from tessera.model.transformer import Transformer
from tessera.objectives.lm import LM
from tessera.runs.run import Run, read_metrics
from tessera.train.engine import Trainer
from tessera.train.optim import TrainConfig

ROOT = Path(__file__).parents[1]
VOCAB, HIDDEN, FFN, LAYERS, HEADS, KV_HEADS = 320, 256, 688, 8, 4, 2
ROW, STEP_TOKENS, MEAN_CHARS = 512, 4096, 150
SETTINGS = {"best (1 row x 8)": ("1", "8"), "obvious (8 rows)": ("8", "1")}


@dataclass(frozen=True)
class Side:
    """One process's figures: per optimizer step, after the warm-up."""

    wall: float
    cpu: float
    predictions: float
    positions: float
    loss_first: float
    loss_last: float
    peak: float  # MB of the process, imports included
    grown: float  # of them after the model was built

    @property
    def per_wall(self) -> float:
        return self.predictions / self.wall

    @property
    def per_cpu(self) -> float:
        return self.predictions / self.cpu


class Clocked:
    """A source that notes the time at which each step begins, and counts what it serves."""

    def __init__(self, source: Documents) -> None:
        self.source = source
        self.marks: list[tuple[float, float]] = []
        self.predictions: list[float] = []

    def batches(self, step: int) -> list[Batch]:
        self.mark()
        batches = self.source.batches(step)
        self.predictions.append(sum(float(b.weight.sum()) for b in batches))
        return batches

    def mark(self) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.side == "ours":
        print(json.dumps(train_ours(options)))
        return
    for needed in (options.baselines / "trl_sft.py", Path(options.peer)):
        if not needed.exists():
            print(f"skipped: {needed} is not here (--baselines, --peer; make venv-trl)")
            return
    peaks, rounds = [], []
    for _ in range(options.rounds):
        for name, setting in SETTINGS.items():
            peaks.append((matmul_flops(torch.matmul), matmul_flops(multiply)))
            rounds.append((name, run_ours(options), run_peer(options, setting)))
            _, ours, peer = rounds[-1]
            print(f"# {name}: {ours.per_cpu:,.0f} against {peer.per_cpu:,.0f}", file=sys.stderr)
    print(report(rounds, tuple(max(x) for x in zip(*peaks, strict=True)), options))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--baselines", type=Path, default=ROOT.parent / "shared" / "baselines")
    parser.add_argument("--peer", default=str(ROOT / ".venv-trl/bin/python"), help="has TRL")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="timed optimizer steps")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps before them")
    parser.add_argument("--microbatch", type=int, default=1024, help="ours: positions at once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", choices=["both", "ours"], default="both")
    return parser.parse_args()


def run_ours(options: argparse.Namespace) -> Side:
    figures = json_of([sys.executable, __file__, *sys.argv[1:], "--side", "ours"], options.threads)
    return Side(**figures)


def run_peer(options: argparse.Namespace, setting: tuple[str, str]) -> Side:
    batch, accumulation = setting
    words = {
        "--batch": batch,
        "--accum": accumulation,
        "--steps": options.steps,
        "--warmup": options.warmup,
        "--threads": options.threads,
    }
    script = options.baselines / "trl_sft.py"
    flags = [str(x) for pair in words.items() for x in pair]
    with tempfile.TemporaryDirectory() as out:
        found = json_of([options.peer, str(script), *flags, "--out", out], options.threads)
    wall = found["step_seconds"]["mean"]
    return Side(
        wall=wall,
        cpu=found["cpu_seconds_per_step"],
        predictions=found["trained_tokens_per_second"] * wall,
        positions=found["fed_positions_per_step"],
        loss_first=found["loss_first"],
        loss_last=found["loss_last"],
        peak=found["peak_rss_mb"],
        grown=found["peak_rss_mb"] - found["peak_rss_mb_before_training"],
    )


def json_of(command: Sequence[str], threads: int) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def train_ours(options: argparse.Namespace) -> dict[str, float]:
    """The figures of a `Side`: the real Trainer on a data run made of the same conversations."""
    total = options.steps + options.warmup
    config = TrainConfig(
        steps=total,
        tokens_per_step=STEP_TOKENS,
        microbatch_tokens=options.microbatch,
        sequence_length=ROW,
        lr=1e-3,
        schedule="constant",
        warmup=0.0,
        betas=(0.9, 0.999),
        save_seconds=1e9,
    )
    with tempfile.TemporaryDirectory() as folder:
        ids = conversations(options.baselines, total * STEP_TOKENS // 110 + 64)
        source = Clocked(documents(write_data(Path(folder) / "data", ids), config))
        module = initial(Transformer(shape()))
        before = peak_mb()
        with open_run(Path(folder) / "run", "cpt") as run:
            Trainer(module, LM(), source, config, run).fit()
            source.mark()
            losses = [row["loss"] for row in read_metrics(run.path)]
    skip = options.warmup
    spans = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(source.marks)][skip:]
    wall, cpu = (statistics.fmean(x) for x in zip(*spans, strict=True))
    return {
        "wall": wall,
        "cpu": cpu,
        "predictions": statistics.fmean(source.predictions[skip:]),
        "positions": STEP_TOKENS,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "peak": peak_mb(),
        "grown": peak_mb() - before,
    }


def peak_mb() -> float:
    """The most memory this process has held, in MB (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@torch.no_grad()
def initial(module: Transformer) -> Transformer:
    """The peer's distribution of first weights, so that the losses fall alike."""
    torch.manual_seed(0)
    for weight in module.parameters():
        if weight.ndim == 2:
            weight.normal_(0.0, 0.02)
    return module


def shape() -> ModelConfig:
    words = f"gqa-{KV_HEADS}", f"swiglu-{FFN}"
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        head_dim=HIDDEN // HEADS,
        blocks=uniform(*words, LAYERS),
    )


def conversations(baselines: Path, count: int) -> list[list[int]]:
    """The peer's conversations through its own tokenizer and template, cut to a row as it does."""
    sys.path.insert(0, str(baselines))
    import _trl_common as common  # type: ignore[import-not-found]

    tokenizer = common.make_tokenizer(VOCAB)
    texts = (
        tokenizer.apply_chat_template(messages, tokenize=False)
        for messages in common.sums_conversations(count, 0, MEAN_CHARS)
    )
    return [tokenizer(text, add_special_tokens=False)["input_ids"][:ROW] for text in texts]


def write_data(path: Path, ids: Sequence[Ids | list[int]], vocab_size: int = VOCAB) -> Path:
    """A finished data run that holds these documents."""
    with open_run(path, "data") as run:
        with TokenWriter(path / "tokens", "train", vocab_size) as writer:
            lengths = np.array([len(document) for document in ids])
            writer.add(np.concatenate(ids), lengths)
            writer.finish()
        run.write_json("data", {"splits": ["train"], "vocab_size": vocab_size, "pad_id": 0})
        run.finish()
    return path


def open_run(path: Path, stage: str) -> Run:
    return Run.open(path, stage=stage, config={}, inputs={}, seed=0, quiet=True)


def documents(data: Path, config: TrainConfig) -> Documents:
    return Documents(
        data,
        sequence_length=ROW,
        row_length=config.microbatch_tokens,
        tokens_per_step=config.tokens_per_step,
        microbatch_tokens=config.microbatch_tokens,
        seed=0,
    )


def matmul_flops(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
    """Operations a CPU second of a float32 1024^3 product: the best of 20."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds = []
    for _ in range(20):
        begun = time.process_time()
        product(a, b)
        seconds.append(time.process_time() - begun)
    return 2 * 1024**3 / min(seconds)


def step_flops(positions: float, predictions_a_document: float = 110) -> float:
    """6 operations a matrix parameter and position, and causal attention inside documents."""
    kv = HIDDEN * KV_HEADS // HEADS
    matrices = LAYERS * (2 * HIDDEN * (HIDDEN + kv) + 3 * HIDDEN * FFN) + VOCAB * HIDDEN
    attention = LAYERS * 6 * HIDDEN * predictions_a_document
    return positions * (6 * matrices + attention)


def report(
    rounds: list[tuple[str, Side, Side]], peaks: tuple[float, ...], options: argparse.Namespace
) -> str:
    ours = [ours for _, ours, _ in rounds]
    lines = [
        machine(options),
        f"a float32 1024^3 product: torch.matmul {peaks[0] / 1e9:.0f}, "
        f"oneDNN {peaks[1] / 1e9:.0f} GFLOP a CPU second",
        "",
        "| | wall s a step | CPU s a step | predictions/s | predictions/CPU-s | fed positions "
        "that predict | share of torch.matmul's peak | of oneDNN's | loss, first → last | peak MB "
        "| MB beyond the built model |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        row(f"tessera, {options.microbatch} positions at once", ours, peaks),
    ]
    for name in SETTINGS:
        lines.append(row(f"TRL, {name}", [peer for n, _, peer in rounds if n == name], peaks))
    lines += ["", "| tessera / TRL, median of pairs | wall | CPU |", "|---|--:|--:|"]
    for name in SETTINGS:
        pairs = [(a, b) for n, a, b in rounds if n == name]
        wall = statistics.median(a.per_wall / b.per_wall for a, b in pairs)
        cpu = statistics.median(a.per_cpu / b.per_cpu for a, b in pairs)
        lines.append(f"| {name} | {wall:.2f} | {cpu:.2f} |")
    return "\n".join(lines)


def row(name: str, sides: list[Side], peaks: tuple[float, ...]) -> str:
    def median(key: str) -> float:
        return statistics.median(getattr(side, key) for side in sides)

    useful = median("predictions") / median("positions")
    flops = step_flops(median("predictions")) / median("cpu")
    return (
        f"| {name} | {median('wall'):.2f} | {median('cpu'):.2f} | {median('per_wall'):,.0f} "
        f"| {median('per_cpu'):,.0f} | {useful:.1%} | {flops / peaks[0]:.0%} "
        f"| {flops / peaks[1]:.0%} "
        f"| {median('loss_first'):.2f} → {median('loss_last'):.2f} "
        f"| {median('peak'):,.0f} | {median('grown'):,.0f} |"
    )


def machine(options: argparse.Namespace) -> str:
    return (
        f"{options.threads} thread(s), {torch.backends.cpu.get_cpu_capability()}, float32, "
        f"torch {torch.__version__}, numpy {np.__version__}; {options.rounds} rounds of "
        f"{options.steps} steps after {options.warmup}"
    )


if __name__ == "__main__":
    main()
