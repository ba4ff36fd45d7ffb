"""Distillation: the KD objective in the Trainer against a plain loop over transformers' models.

    python benchmarks/kd.py [--rounds 3] [--steps 4] [--threads 1]

Teacher and student are random Llamas of one shape, float32; every row is one document of 512
tokens, so that packing is no part of the comparison, and a step is 2048 tokens under AdamW. The
plain loop is what one writes: both models' logits, `kl_div` of their log-softmaxes, backward. It
runs with all rows at once, and with one row at a time (less memory).
Ours and each of the two alternate, every one in a fresh process. Memory is the process's peak
(VmHWM) less what it held before a model was built.
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
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

LENGTH, STEP_TOKENS = 512, 2048
SHAPES = {  # vocabulary, hidden, FFN, layers, heads, KV heads
    "V 4,096": (4096, 256, 688, 8, 4, 2),
    "V 128,256": (128_256, 256, 688, 4, 4, 2),
}
PLAIN = {"plain, all rows at once": 4, "plain, one row at a time": 1}


def memory(key: str) -> float:
    """MB of this process: VmHWM its peak, VmRSS now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise SystemExit("needs Linux: /proc/self/status")


def rows(vocab: int, step: int) -> torch.Tensor:
    """Ids `(B, T + 1)` of a step, the same on both sides."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, vocab, (STEP_TOKENS // LENGTH, LENGTH + 1), generator=generator)


class Clock:
    """Wall and CPU seconds of each step, and the memory before there was a model."""

    def __init__(self) -> None:
        self.before, self.marks = memory("VmRSS"), []

    def mark(self) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))

    def figures(self, losses: list[float]) -> dict[str, float]:
        """Medians of all steps but the first."""
        pairs = list(zip(self.marks[1:], self.marks[2:], strict=False))
        wall, cpu = (statistics.median(b[i] - a[i] for a, b in pairs) for i in (0, 1))
        peak = memory("VmHWM") - self.before
        return {"wall": wall, "cpu": cpu, "peak": peak, "first": losses[0], "last": losses[-1]}


def ours(shape: tuple[int, ...], steps: int) -> dict[str, float]:
    """The Trainer with KD, all rows of a step in one microbatch."""
    from tessera.data.batch import Batch, pack
    from tessera.model.config import ModelConfig, uniform
    from tessera.model.transformer import Transformer
    from tessera.objectives.kd import KD, KDConfig
    from tessera.run import Run, read_metrics
    from tessera.train.engine import Trainer
    from tessera.train.optim import TrainConfig

    vocab, hidden, width, layers, heads, kv = shape
    words = uniform(f"gqa-{kv}", f"swiglu-{width}", layers)
    config = ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_attention_heads=heads,
        head_dim=hidden // heads,
        blocks=words,
    )

    class Source:
        def batches(self, step: int) -> list[Batch]:
            clock.mark()
            return [pack(rows(vocab, step).numpy(), LENGTH)]

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    clock = Clock()
    teacher = Transformer(config).init_weights(0).requires_grad_(False)
    student = Transformer(config).init_weights(1)
    train = TrainConfig(steps=steps, lr=1e-3, schedule="constant", warmup=0.0, save_seconds=1e9)
    objective = KD(teacher, KDConfig(train=train, cosine=0.0))
    with tempfile.TemporaryDirectory() as folder:
        with Run.open(
            Path(folder) / "run", stage="kd", config={}, inputs={}, seed=0, quiet=True
        ) as run:
            Trainer(student, objective, Source(), train, run).fit()
        clock.mark()
        return clock.figures([row["kl"] for row in read_metrics(Path(folder) / "run")])


def plain(shape: tuple[int, ...], steps: int, at_once: int) -> dict[str, float]:
    """The loop that one writes over transformers' models, `at_once` rows a backward."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab, hidden, width, layers, heads, kv = shape
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        attn_implementation="sdpa",
        tie_word_embeddings=False,
        use_cache=False,
    )
    clock = Clock()
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(config).requires_grad_(False).eval()
    student = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    losses = []
    for step in range(steps):
        clock.mark()
        ids, total = rows(vocab, step)[:, :-1], 0.0
        for part in ids.split(at_once):
            with torch.no_grad():
                target = F.log_softmax(teacher(part).logits, -1)
            found = F.log_softmax(student(part).logits, -1)
            loss = F.kl_div(found, target, log_target=True, reduction="sum") / STEP_TOKENS
            loss.backward()
            total += loss.item()
            del target, found, loss
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
    clock.mark()
    return clock.figures(losses)


def fresh(side: str, shape: str, options: argparse.Namespace) -> dict[str, float]:
    """One side's figures, from a process of its own."""
    words = ["--side", side, "--shape", shape, "--steps", str(options.steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *words], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(shape: str, options: argparse.Namespace) -> list[str]:
    """Markdown rows of one shape: medians, and ratios that are medians of pairs."""
    pairs: dict[str, list[tuple[dict, dict]]] = {name: [] for name in PLAIN}
    for _ in range(options.rounds):
        for name in PLAIN:
            pairs[name].append((fresh("ours", shape, options), fresh(name, shape, options)))
    everything = [mine for found in pairs.values() for mine, _ in found]
    lines = [row(shape, "tessera", everything, "", "", "")]
    for name, found in pairs.items():
        ratios = [
            f"{statistics.median(theirs[key] / mine[key] for mine, theirs in found):.2f}"
            for key in ("cpu", "wall", "peak")
        ]
        lines.append(row(shape, name, [theirs for _, theirs in found], *ratios))
    return lines


def row(shape: str, name: str, sides: list[dict], *ratios: str) -> str:
    cpu, wall, peak = (
        statistics.median(side[k] for side in sides) for k in ("cpu", "wall", "peak")
    )
    cells = [shape, name, f"{STEP_TOKENS / cpu:,.0f}", f"{STEP_TOKENS / wall:,.0f}", f"{peak:,.0f}"]
    return f"| {' | '.join([*cells, *ratios])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", default="")
    parser.add_argument("--shape", choices=SHAPES, default=None)
    options = parser.parse_args()
    if options.side:
        torch.set_num_threads(options.threads)
        shape = SHAPES[options.shape]
        found = (
            ours(shape, options.steps)
            if options.side == "ours"
            else plain(shape, options.steps, PLAIN[options.side])
        )
        print(json.dumps(found))
        return
    print(
        f"{options.threads} thread(s), {torch.backends.cpu.get_cpu_capability()}, float32, torch "
        f"{torch.__version__}; {options.rounds} pairs each, {options.steps} steps\n\n"
        "| vocabulary | | tokens/CPU-s | tokens/s | peak MB | CPU, plain / ours | wall | memory |\n"
        "|---|---|--:|--:|--:|--:|--:|--:|"
    )
    for shape in [options.shape] if options.shape else SHAPES:
        print("\n".join(compare(shape, options)), flush=True)


if __name__ == "__main__":
    main()
