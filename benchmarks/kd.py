"""Distillation: the KD objective in the Trainer against a plain loop over transformers' models.

    python benchmarks/kd.py [--rounds 3] [--steps 5] [--threads 1]

Teacher and student are random Llamas of one shape, float32, under AdamW. Two works have rows of
one document of 512 tokens, 2048 a step, so that packing is no part of the comparison; the third
has documents of 32 to 512 tokens (log-uniform), which we pack and the plain loop pads to the
longest of a batch. The plain loop is what one writes: both models' logits, `kl_div` of their
log-softmaxes, backward. It runs with four documents at once (where rows are full, the whole step)
and with one (least memory, and no padding either). Ours and each of the two alternate, every one
in a fresh process. A plain step ends at the first document past 2048 tokens. Memory is the
process's peak (VmHWM) less what it held before a model was built.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

LENGTH, STEP_TOKENS, ROW = 512, 2048, 1024
WORKS = {  # vocabulary, hidden, FFN, layers, heads, KV heads; shortest document
    "V 4,096, full rows": ((4096, 256, 688, 8, 4, 2), LENGTH),
    "V 4,096, 32 to 512 tokens": ((4096, 256, 688, 8, 4, 2), 32),
    "V 128,256, full rows": ((128_256, 256, 688, 4, 4, 2), LENGTH),
}
PLAIN = {"plain, 4 at once": 4, "plain, 1 at a time": 1}


def memory(key: str) -> float:
    """MB of this process: VmHWM its peak, VmRSS now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise SystemExit("needs Linux: /proc/self/status")


def documents(work: str, steps: int) -> list[np.ndarray]:
    """Documents for `steps` steps, each of T + 1 ids, the same on both sides."""
    (vocab, *_), shortest = WORKS[work]
    draw, left, found = np.random.default_rng(0), (steps + 1) * STEP_TOKENS, []
    while left > 0:
        length = round(math.exp(draw.uniform(math.log(shortest), math.log(LENGTH))))
        found.append(draw.integers(0, vocab, length + 1))
        left -= length
    return found


def figures(marks: list[tuple[float, float]], counts: list[float], peak: float) -> dict:
    """Seconds a prediction over all steps but the first, and MB beyond those before a model."""
    wall, cpu = (b - a for a, b in zip(marks[1], marks[-1], strict=True))
    done = sum(counts[1:])
    return {"wall": wall / done, "cpu": cpu / done, "peak": peak}


def ours(work: str, steps: int) -> dict[str, float]:
    """The Trainer with KD on a data run, microbatches of one row of 1024."""
    from training import Clocked, open_run, write_data

    from tessera.data.documents import Documents
    from tessera.model.config import ModelConfig, uniform
    from tessera.model.transformer import Transformer
    from tessera.objectives.kd import KD, KDConfig
    from tessera.train.engine import Trainer
    from tessera.train.optim import TrainConfig

    vocab, hidden, width, layers, heads, kv = WORKS[work][0]
    config = ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_attention_heads=heads,
        head_dim=hidden // heads,
        blocks=uniform(f"gqa-{kv}", f"swiglu-{width}", layers),
    )
    train = TrainConfig(
        steps=steps,
        lr=1e-3,
        schedule="constant",
        warmup=0.0,
        save_seconds=1e9,
        tokens_per_step=STEP_TOKENS,
        microbatch_tokens=ROW,
        sequence_length=LENGTH,
    )
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder) / "data", documents(work, steps), vocab)
        source = Clocked(
            Documents(
                data,
                sequence_length=LENGTH,
                row_length=ROW,
                tokens_per_step=STEP_TOKENS,
                microbatch_tokens=ROW,
                seed=0,
            )
        )
        before = memory("VmRSS")
        teacher = Transformer(config).init_weights(0).requires_grad_(False)
        student = Transformer(config).init_weights(1)
        with open_run(Path(folder) / "run", "kd") as run:
            objective = KD(teacher, KDConfig(train=train, cosine=0.0))
            Trainer(student, objective, source, train, run).fit()
            source.mark()
    return figures(source.marks, source.predictions, memory("VmHWM") - before)


def plain(work: str, steps: int, at_once: int) -> dict[str, float]:
    """The loop that one writes over transformers' models, `at_once` documents a backward."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab, hidden, width, layers, heads, kv = WORKS[work][0]
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
    before, marks, counts = memory("VmRSS"), [], []
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(config).requires_grad_(False).eval()
    student = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    unread = documents(work, steps)
    for _ in range(steps):
        marks.append((time.perf_counter(), time.process_time()))
        total = 0
        while total < STEP_TOKENS:
            ids, mask = padded([unread.pop() for _ in range(at_once)])
            attention = None if mask.all() else mask
            with torch.no_grad():
                target = F.log_softmax(teacher(ids, attention_mask=attention).logits, -1)
            found = F.log_softmax(student(ids, attention_mask=attention).logits, -1)
            if attention is None:
                loss = F.kl_div(found, target, log_target=True, reduction="sum")
            else:
                kl = F.kl_div(found, target, log_target=True, reduction="none").sum(-1)
                loss = (kl * mask).sum()
            loss = loss / STEP_TOKENS
            loss.backward()
            total += int(mask.sum())
            del target, found, loss
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        counts.append(total)
    marks.append((time.perf_counter(), time.process_time()))
    return figures(marks, counts, memory("VmHWM") - before)


def padded(documents: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask `(N, T)`."""
    rows = [torch.from_numpy(ids[:-1]) for ids in documents]
    ones = [torch.ones_like(row) for row in rows]
    return pad_sequence(rows, batch_first=True), pad_sequence(ones, batch_first=True)


def fresh(side: str, work: str, options: argparse.Namespace) -> dict[str, float]:
    """One side's figures, from a process of its own."""
    words = ["--side", side, "--work", work, "--steps", str(options.steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *words], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(work: str, options: argparse.Namespace) -> list[str]:
    """Markdown rows of one shape: medians, and ratios that are medians of pairs."""
    pairs: dict[str, list[tuple[dict, dict]]] = {name: [] for name in PLAIN}
    for _ in range(options.rounds):
        for name in PLAIN:
            pairs[name].append((fresh("ours", work, options), fresh(name, work, options)))
    everything = [mine for found in pairs.values() for mine, _ in found]
    lines = [row(work, "tessera", everything, "", "", "")]
    for name, found in pairs.items():
        ratios = [
            f"{statistics.median(theirs[key] / mine[key] for mine, theirs in found):.2f}"
            for key in ("cpu", "wall", "peak")
        ]
        lines.append(row(work, name, [theirs for _, theirs in found], *ratios))
    return lines


def row(work: str, name: str, sides: list[dict], *ratios: str) -> str:
    cpu, wall, peak = (
        statistics.median(side[k] for side in sides) for k in ("cpu", "wall", "peak")
    )
    cells = [work, name, f"{1 / cpu:,.0f}", f"{1 / wall:,.0f}", f"{peak:,.0f}"]
    return f"| {' | '.join([*cells, *ratios])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", default="")
    parser.add_argument("--work", choices=WORKS, default=None)
    options = parser.parse_args()
    if options.side:
        torch.set_num_threads(options.threads)
        found = (
            ours(options.work, options.steps)
            if options.side == "ours"
            else plain(options.work, options.steps, PLAIN[options.side])
        )
        print(json.dumps(found))
        return
    print(
        f"{options.threads} thread(s), {torch.backends.cpu.get_cpu_capability()}, float32, torch "
        f"{torch.__version__}; {options.rounds} pairs each, {options.steps} steps\n\n"
        "| work | | tokens/CPU-s | tokens/s | peak MB | CPU, plain / ours | wall | memory |\n"
        "|---|---|--:|--:|--:|--:|--:|--:|"
    )
    for work in [options.work] if options.work else WORKS:
        print("\n".join(compare(work, options)), flush=True)


if __name__ == "__main__":
    main()
