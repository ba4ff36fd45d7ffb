"""Training speed and memory: against TRL, a plain distillation loop, and the machine's own peak.

    python benchmarks/training.py trl [--baselines DIR] [--peer PYTHON] [--steps 10]
    python benchmarks/training.py kd [--steps 5]
    python benchmarks/training.py step [--sizes 6M 45M 160M] [--steps 4]
    python benchmarks/training.py processes [--sizes 6M 45M 160M] [--steps 4]

trl: the LM objective on packed documents against TRL's SFTTrainer. DIR (../shared/baselines) holds
trl_sft.py and _trl_common.py: a random Llama of 6M parameters, conversations of arithmetic, steps
of 4096 positions, AdamW at a constant 1e-3, float32. Both read the same conversations through the
same tokenizer. TRL runs at its best setting (one row of 512 at a time) and at its obvious one (8
rows at once). A rate counts predictions: positions with a label, which both share.

kd: the KD objective in the Trainer against the loop that one writes over transformers' models:
both models' logits, `kl_div` of their log-softmaxes, backward. Random Llamas of one shape, float32,
AdamW. Two works have rows of one document of 512 tokens, 2048 a step, so that packing is no part of
the comparison; the third has documents of 32 to 512 tokens, which we pack and the loop pads. The
loop runs with four documents at once and with one (least memory, no padding). Memory is the
process's peak less what it held before a model was built.

step: the Trainer with the LM loss at three sizes, documents of 32 to 512 tokens packed into rows of
1024. Operations are counted (`train/flops.py`: no recomputation), CPU seconds measured; the peak is
the best of 20 products of 1024x1024 by the faster of torch's two libraries, before and after. One
more step runs under torch's profiler; its kernels are sorted into kinds.

processes: two gloo processes (FSDP2) of one thread against one of two threads, on the same rows.

Sides alternate, each in a fresh process; ratios are medians of pairs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
import torch.nn.functional as F
from harness import (
    BASELINES,
    TRL,
    Command,
    Figures,
    alternate,
    fresh,
    median,
    memory_mb,
    need,
    ratio,
    table,
)
from torch.nn.utils.rnn import pad_sequence

from tessera import dist
from tessera.data.batch import Batch, Ids
from tessera.data.documents import Documents
from tessera.data.store import TokenWriter
from tessera.model.config import ModelConfig, uniform
from tessera.model.cpu import multiply
from tessera.model.transformer import Transformer
from tessera.objectives.kd import KD, KDConfig
from tessera.objectives.lm import LM
from tessera.runs.run import Run, read_metrics
from tessera.train.engine import Trainer
from tessera.train.flops import Work, model_cost
from tessera.train.optim import TrainConfig

ROW, STEP_TOKENS, MEAN_CHARS = 512, 4096, 150
SETTINGS = {"best (1 row x 8)": ("1", "8"), "obvious (8 rows)": ("8", "1")}
LENGTH, KD_TOKENS, SHORTEST = 512, 2048, 32
PACKED = 1024  # positions of a row of kd and step
SIZES = {  # vocabulary, hidden, FFN, layers, heads, KV heads
    "6M": (320, 256, 688, 8, 4, 2),
    "45M": (8192, 512, 1376, 12, 8, 2),
    "160M": (32_000, 768, 2048, 16, 12, 4),
    "toy": (320, 32, 64, 2, 4, 2),
}
LARGE = [size for size in SIZES if size != "toy"]
WORKS = {  # shape; shortest document
    "V 4,096, full rows": ((4096, 256, 688, 8, 4, 2), LENGTH),
    "V 4,096, 32 to 512 tokens": ((4096, 256, 688, 8, 4, 2), 32),
    "V 128,256, full rows": ((128_256, 256, 688, 4, 4, 2), LENGTH),
    "toy": (SIZES["toy"], 32),
}
PLAIN = {"plain, 4 at once": 4, "plain, 1 at a time": 1}
KINDS = {  # words in a kernel's name, in the order they are tried
    "attention": ("scaled_dot_product",),
    "matrix products": ("linear_pointwise", "aten::mm", "addmm", "bmm"),
    "AdamW": ("adamw",),
    "softmax of the head": ("softmax",),
}


# What the commands share; rl.py and plan.py use it, too.


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


def open_run(path: Path, stage: str) -> Run:
    return Run.open(path, stage=stage, config={}, inputs={}, seed=0, quiet=True)


def write_data(path: Path, ids: Sequence[Ids | list[int]], vocab_size: int) -> Path:
    """A finished data run that holds these documents."""
    with open_run(path, "data") as run:
        with TokenWriter(path / "tokens", "train", vocab_size) as writer:
            lengths = np.array([len(document) for document in ids])
            writer.add(np.concatenate(ids), lengths)
            writer.finish()
        run.write_json("data", {"splits": ["train"], "vocab_size": vocab_size, "pad_id": 0})
        run.finish()
    return path


def packed(data: Path, train: TrainConfig, row: int, shard: tuple[int, int] = (0, 1)) -> Documents:
    """Documents of a data run in rows of so many positions."""
    return Documents(
        data,
        sequence_length=LENGTH,
        row_length=row,
        tokens_per_step=train.tokens_per_step,
        microbatch_tokens=train.microbatch_tokens,
        seed=0,
        shard=shard,
    )


def shape(size: tuple[int, ...]) -> ModelConfig:
    vocab, hidden, width, layers, heads, kv = size
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_attention_heads=heads,
        head_dim=hidden // heads,
        blocks=uniform(f"gqa-{kv}", f"swiglu-{width}", layers),
    )


def settings(steps: int, **changes: Any) -> TrainConfig:
    table = {"steps": steps, "tokens_per_step": STEP_TOKENS, "microbatch_tokens": PACKED}
    table |= {"sequence_length": LENGTH, "schedule": "constant", "warmup": 0.0}
    return TrainConfig.model_validate({**table, "save_seconds": 1e9, **changes})


def draw(vocab: int, tokens: int) -> list[np.ndarray]:
    """Documents of log-uniform lengths, `tokens` predictions or a few more."""
    random, found = np.random.default_rng(0), []
    while tokens > 0:
        length = round(float(np.exp(random.uniform(np.log(SHORTEST), np.log(LENGTH)))))
        found.append(random.integers(0, vocab, length + 1))
        tokens -= length
    return found


@torch.no_grad()
def initial(module: Transformer) -> Transformer:
    """The peer's distribution of first weights, so that the losses fall alike."""
    torch.manual_seed(0)
    for weight in module.parameters():
        if weight.ndim == 2:
            weight.normal_(0.0, 0.02)
    return module


def conversations(baselines: Path, count: int) -> list[list[int]]:
    """The peer's conversations through its own tokenizer and template, cut to a row as it does."""
    sys.path.insert(0, str(baselines))
    import _trl_common as common  # type: ignore[import-not-found]

    tokenizer = common.make_tokenizer(SIZES["6M"][0])
    texts = (
        tokenizer.apply_chat_template(messages, tokenize=False)
        for messages in common.sums_conversations(count, 0, MEAN_CHARS)
    )
    return [tokenizer(text, add_special_tokens=False)["input_ids"][:ROW] for text in texts]


def matmul_flops(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
    """Operations a CPU second of a float32 1024^3 product: the best of 20."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds = []
    for _ in range(20):
        begun = time.process_time()
        product(a, b)
        seconds.append(time.process_time() - begun)
    return 2 * 1024**3 / min(seconds)


def peak() -> float:
    """The faster of torch's two libraries, in operations a CPU second."""
    return max(matmul_flops(torch.matmul), matmul_flops(multiply))


def spans(marks: list[tuple[float, float]], skip: int = 1) -> list[tuple[float, float]]:
    """Wall and CPU seconds of each step, without the first ones."""
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(marks)][skip:]


# Against TRL


def trl(options: argparse.Namespace) -> None:
    if options.side:
        print(json.dumps(train_ours(options)))
        return
    if not options.smoke:
        need(
            options.baselines / "trl_sft.py",
            options.peer,
            hint="--baselines, --peer; make venv-trl",
        )
    words = ["trl", *sys.argv[2 if sys.argv[1:2] == ["trl"] else 1 :], "--side", "ours"]
    ours = partial(fresh, __file__, words, options.threads)
    peaks = [(matmul_flops(torch.matmul), matmul_flops(multiply))]
    pairs = {}
    for name, setting in SETTINGS.items():
        ways: dict[str, Any] = {"ours": ours}
        if not options.smoke:
            ways["peer"] = partial(run_peer, options, setting)
        pairs[name] = alternate(ways, options.rounds)
        peaks.append((matmul_flops(torch.matmul), matmul_flops(multiply)))
    best = tuple(max(one) for one in zip(*peaks, strict=True))
    print(
        f"a float32 1024^3 product: torch.matmul {best[0] / 1e9:.0f}, oneDNN {best[1] / 1e9:.0f} "
        "GFLOP a CPU second"
    )
    mine = [one for found in pairs.values() for one in found["ours"]]
    rows = [trl_row(f"tessera, {options.microbatch} positions at once", options.size, mine, best)]
    rows += [
        trl_row(f"TRL, {n}", options.size, found["peer"], best)
        for n, found in pairs.items()
        if "peer" in found
    ]
    table(rows)
    if not options.smoke:
        table(
            [
                {
                    "tessera / TRL, median of pairs": name,
                    **{
                        key: f"{ratio(found['ours'], found['peer'], f'per_{key}'):.2f}"
                        for key in ("wall", "cpu")
                    },
                }
                for name, found in pairs.items()
            ]
        )


def trl_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--baselines", type=Path, default=BASELINES)
    parser.add_argument("--peer", default=TRL, help="a Python that has TRL")
    parser.add_argument("--steps", type=int, default=10, help="timed optimizer steps")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps before them")
    parser.add_argument("--microbatch", type=int, default=1024, help="ours: positions at once")
    parser.add_argument("--size", choices=SIZES, default="6M", help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)


def run_peer(options: argparse.Namespace, setting: tuple[str, str]) -> Figures:
    batch, accumulation = setting
    words = ["--batch", batch, "--accum", accumulation, "--steps", str(options.steps)]
    words += ["--warmup", str(options.warmup), "--threads", str(options.threads)]
    script = options.baselines / "trl_sft.py"
    with tempfile.TemporaryDirectory() as out:
        found = fresh(script, [*words, "--out", out], options.threads, options.peer)
    predictions, cpu = found["trained_tokens_per_second"], found["cpu_seconds_per_step"]
    wall = found["step_seconds"]["mean"]
    return {
        "wall": wall,
        "cpu": cpu,
        "predictions": predictions * wall,
        "per_wall": predictions,
        "per_cpu": predictions * wall / cpu,
        "positions": found["fed_positions_per_step"],
        "loss_first": found["loss_first"],
        "loss_last": found["loss_last"],
        "peak": found["peak_rss_mb"],
        "grown": found["peak_rss_mb"] - found["peak_rss_mb_before_training"],
    }


def train_ours(options: argparse.Namespace) -> Figures:
    """The Trainer on a data run made of the same conversations; per step, after the warm-up."""
    total = options.steps + options.warmup
    changes = {"microbatch_tokens": options.microbatch, "lr": 1e-3, "betas": (0.9, 0.999)}
    config = settings(total, **changes)
    model = shape(SIZES[options.size])
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            ids = draw(model.vocab_size, total * STEP_TOKENS)
        else:
            ids = conversations(options.baselines, total * STEP_TOKENS // 110 + 64)
        data = write_data(Path(folder) / "data", ids, model.vocab_size)
        source = Clocked(packed(data, config, config.microbatch_tokens))
        module = initial(Transformer(model))
        before = memory_mb()
        with open_run(Path(folder) / "run", "cpt") as run:
            Trainer(module, LM(), source, config, run).fit()
            source.mark()
            losses = [row["loss"] for row in read_metrics(run.path)]
    times = spans(source.marks, options.warmup)
    wall, cpu = (statistics.fmean(x) for x in zip(*times, strict=True))
    predictions = statistics.fmean(source.predictions[options.warmup :])
    return {
        "wall": wall,
        "cpu": cpu,
        "predictions": predictions,
        "per_wall": predictions / wall,
        "per_cpu": predictions / cpu,
        "positions": STEP_TOKENS,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "peak": memory_mb(),
        "grown": memory_mb() - before,
    }


def step_flops(positions: float, size: str, predictions_a_document: float = 110) -> float:
    """6 operations a matrix parameter and position, and causal attention inside documents."""
    vocab, hidden, width, layers, heads, kv_heads = SIZES[size]
    kv = hidden * kv_heads // heads
    matrices = layers * (2 * hidden * (hidden + kv) + 3 * hidden * width) + vocab * hidden
    attention = layers * 6 * hidden * predictions_a_document
    return positions * (6 * matrices + attention)


def trl_row(name: str, size: str, sides: list[Figures], peaks: tuple[float, ...]) -> Figures:
    of = partial(median, sides)
    flops = step_flops(of("predictions"), size) / of("cpu")
    return {
        "": name,
        "wall s a step": f"{of('wall'):.2f}",
        "CPU s a step": f"{of('cpu'):.2f}",
        "predictions/s": f"{of('per_wall'):,.0f}",
        "predictions/CPU-s": f"{of('per_cpu'):,.0f}",
        "fed positions that predict": f"{of('predictions') / of('positions'):.1%}",
        "share of torch.matmul's peak": f"{flops / peaks[0]:.0%}",
        "of oneDNN's": f"{flops / peaks[1]:.0%}",
        "loss, first → last": f"{of('loss_first'):.2f} → {of('loss_last'):.2f}",
        "peak MB": f"{of('peak'):,.0f}",
        "MB beyond the built model": f"{of('grown'):,.0f}",
    }


# Distillation against a plain loop


def kd(options: argparse.Namespace) -> None:
    if options.side:
        side = kd_ours if options.side == "ours" else partial(kd_plain, at_once=PLAIN[options.side])
        print(json.dumps(side(options.work, options.steps)))
        return
    rows = []
    for work in [options.work] if options.work else [name for name in WORKS if name != "toy"]:
        words = ["kd", "--work", work, "--steps", str(options.steps), "--side"]
        sides = {
            name: partial(fresh, __file__, [*words, name], options.threads)
            for name in ("ours", *PLAIN)
        }
        pairs = {
            name: alternate({n: sides[n] for n in ("ours", name)}, options.rounds) for name in PLAIN
        }
        rows.append(
            kd_row(work, "tessera", [mine for found in pairs.values() for mine in found["ours"]])
        )
        for name, found in pairs.items():
            row = kd_row(work, name, found[name])
            for head, key in (("CPU, plain / ours", "cpu"), ("wall", "wall"), ("memory", "peak")):
                row[head] = f"{ratio(found[name], found['ours'], key):.2f}"
            rows.append(row)
    table(rows)


def kd_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--work", choices=WORKS)
    parser.add_argument("--side", help=argparse.SUPPRESS)


def kd_row(work: str, name: str, sides: list[Figures]) -> Figures:
    return {
        "work": work,
        "": name,
        "tokens/CPU-s": f"{1 / median(sides, 'cpu'):,.0f}",
        "tokens/s": f"{1 / median(sides, 'wall'):,.0f}",
        "peak MB": f"{median(sides, 'peak'):,.0f}",
    }


def documents(work: str, steps: int) -> list[np.ndarray]:
    """Documents for `steps` steps, each of T + 1 ids, the same on both sides."""
    (vocab, *_), shortest = WORKS[work]
    draw, left, found = np.random.default_rng(0), (steps + 1) * KD_TOKENS, []
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


def kd_ours(work: str, steps: int) -> Figures:
    """The Trainer with KD on a data run, microbatches of one row of 1024."""
    config = shape(WORKS[work][0])
    train = settings(steps, lr=1e-3, tokens_per_step=KD_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder) / "data", documents(work, steps), config.vocab_size)
        source = Clocked(packed(data, train, PACKED))
        before = memory_mb("VmRSS")
        teacher = Transformer(config).init_weights(0).requires_grad_(False)
        student = Transformer(config).init_weights(1)
        with open_run(Path(folder) / "run", "kd") as run:
            objective = KD(teacher, KDConfig(train=train, cosine=0.0))
            Trainer(student, objective, source, train, run).fit()
            source.mark()
    return figures(source.marks, source.predictions, memory_mb() - before)


def kd_plain(work: str, steps: int, at_once: int) -> Figures:
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
    before, marks, counts = memory_mb("VmRSS"), [], []
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(config).requires_grad_(False).eval()
    student = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    unread = documents(work, steps)
    for _ in range(steps):
        marks.append((time.perf_counter(), time.process_time()))
        total = 0
        while total < KD_TOKENS:
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
            loss = loss / KD_TOKENS
            loss.backward()
            total += int(mask.sum())
            del target, found, loss
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        counts.append(total)
    marks.append((time.perf_counter(), time.process_time()))
    return figures(marks, counts, memory_mb() - before)


def padded(documents: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask `(N, T)`."""
    rows = [torch.from_numpy(ids[:-1]) for ids in documents]
    ones = [torch.ones_like(row) for row in rows]
    return pad_sequence(rows, batch_first=True), pad_sequence(ones, batch_first=True)


# A step against the machine


def step(options: argparse.Namespace) -> None:
    table([of_size(size, options.steps) for size in options.sizes])


def step_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=LARGE)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--side", help=argparse.SUPPRESS)


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
    config, train = shape(SIZES[size]), settings(steps)
    data = folder / "data"
    if dist.is_main():
        write_data(data, draw(config.vocab_size, (steps + 2) * STEP_TOKENS), config.vocab_size)
    dist.barrier()
    layout = train.placement.layout
    shard = (layout.data_rank, layout.data_world)
    source = Measured(packed(data, train, PACKED, shard), config)
    module = train.placement.transformer(Transformer(config).init_weights(0))
    with open_run(folder / f"run-{dist.rank()}", "cpt") as run:
        trainer = Trainer(module, LM(), source, train, run)
        trainer.fit()
        source.mark()
    return trainer, source


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


def of_size(size: str, steps: int) -> Figures:
    before = peak()
    with tempfile.TemporaryDirectory() as folder:
        trainer, source = trained(size, steps, Path(folder))
        wall, cpu = map(statistics.median, zip(*spans(source.marks), strict=True))
        shares = kinds(trainer, steps)
    best = max(before, peak())
    rate = statistics.median(source.flops[1:]) / cpu
    parameters = sum(p.numel() for p in trainer.module.parameters())
    return {
        "": size,
        "parameters, M": f"{parameters / 1e6:.1f}",
        "tokens/s": f"{STEP_TOKENS / wall:,.0f}",
        "tokens/CPU-s": f"{STEP_TOKENS / cpu:,.0f}",
        "GFLOP/CPU-s": f"{rate / 1e9:.0f}",
        "matmul peak": f"{best / 1e9:.0f}",
        "share": f"{rate / best:.0%}",
        "kernels' time": ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items()),
    }


# Two processes against two threads


def processes(options: argparse.Namespace) -> None:
    if options.side:
        process_side(options.sizes[0], options.steps)
        return
    rows = []
    for size in options.sizes:
        words = ["processes", "--side", "ours", "--sizes", size, "--steps", str(options.steps)]
        ways = {
            "two": partial(fresh, __file__, [*words, "--threads", "1"], 1, processes=2),
            "one": partial(fresh, __file__, [*words, "--threads", "2"], 2),
        }
        found = alternate(ways, options.rounds)
        two, one = found["two"], found["one"]
        rows.append(
            {
                "": size,
                "tokens/s, 2 gloo processes": f"{STEP_TOKENS / two[-1]['wall']:,.0f}",
                "1 process, 2 threads": f"{STEP_TOKENS / one[-1]['wall']:,.0f}",
                "2 processes / 2 threads, wall": f"{ratio(two, one, 'wall'):.2f}",
                "CPU": f"{ratio(two, one, 'cpu'):.2f}",
                "losses at the end": f"{two[-1]['loss']:.5f}, {one[-1]['loss']:.5f}",
            }
        )
    table(rows)


def process_side(size: str, steps: int) -> None:
    """One process of a comparison: its main one prints seconds and the losses' end."""
    with dist.processes(), tempfile.TemporaryDirectory() as own:
        folder = Path(dist.broadcast(own))
        trainer, source = trained(size, steps, folder)
        wall, cpu = map(statistics.median, zip(*spans(source.marks), strict=True))
        total = float(trainer.layout.sum(torch.tensor(cpu, dtype=torch.float64)))
        if dist.is_main():
            loss = read_metrics(folder / "run-0")[-1]["loss"]
            print(json.dumps({"wall": wall, "cpu": total, "loss": loss}))
        dist.barrier()


if __name__ == "__main__":
    TOY = {"steps": 2, "sizes": ["toy"]}
    harness.main(
        __doc__,
        {
            "trl": Command(trl, trl_options, {"steps": 2, "warmup": 1, "size": "toy"}),
            "kd": Command(kd, kd_options, {"steps": 2, "work": "toy"}),
            "step": Command(step, step_options, TOY),
            "processes": Command(processes, step_options, TOY),
        },
    )
