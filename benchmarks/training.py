"""Training speed and memory: against TRL, a plain distillation loop, and the machine's own peak.

    python benchmarks/training.py lm [--model PATH] [--peer PYTHON] [--steps 2] [--threads-of 1 2]
    python benchmarks/training.py sft [the same]
    python benchmarks/training.py kd [the same]
    python benchmarks/training.py step [--sizes 6M 45M 160M] [--steps 4]
    python benchmarks/training.py processes [--sizes 6M 45M 160M] [--steps 4]

lm, sft, kd: SmolLM2-135M-Instruct, or another model, takes steps of 4096 positions with AdamW, in
float32 and in bfloat16, on arithmetic problems of which lm and kd have rows of 512 tokens and sft
the answers to learn, packed into such rows. TRL's SFTTrainer has its best setting (one row at a
time, best-fit packing, no gradient checkpointing), and in bfloat16 both of its ways: autocast, with
weights and moments in float32 as ours, and all of them in bfloat16. kd's peer is the loop that one
writes over transformers' models: both models' logits, `kl_div` of their log-softmaxes, backward;
parent and child are the same model. A rate counts predictions: positions with a label. Memory is
the process's peak.

step: the Trainer with the LM loss at three sizes, documents of 32 to 512 tokens packed into rows of
1024. Operations are counted (`train/flops.py`: no recomputation), CPU seconds measured; the peak is
the best of 20 products of 1024x1024 by the faster of torch's two libraries, before and after. One
more step runs under torch's profiler; its kernels are sorted into kinds.

processes: two gloo processes (FSDP2) of one thread against one of two threads, on the same rows.

Sides alternate, each in a fresh process; ratios are medians of pairs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
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
    TRL,
    Command,
    Figures,
    alternate,
    fresh,
    median,
    memory_mb,
    need,
    ratio,
    smollm2,
    table,
)

from tessera import dist
from tessera.data.batch import OFF, Batch, Ids
from tessera.data.documents import Documents
from tessera.data.problems import problem
from tessera.data.store import TokenWriter
from tessera.data.tokenizer import load_tokenizer
from tessera.export.write import export_model
from tessera.model.config import ModelConfig, uniform
from tessera.model.cpu import multiply
from tessera.model.placement import DTYPES
from tessera.model.source import load_config
from tessera.model.transformer import Transformer
from tessera.objectives.kd import KD, KDConfig
from tessera.objectives.lm import LM, SFT
from tessera.runs.run import Run, read_metrics
from tessera.train.engine import Objective, Trainer
from tessera.train.optim import TrainConfig

STEP_TOKENS, LENGTH, SHORTEST = 4096, 512, 32
PACKED = 1024  # positions of a row of step
SETTINGS = {"float32": ["float32"], "bfloat16": ["autocast", "bfloat16"]}  # of a peer
TRL_SIDE = Path(__file__).parent / "peers" / "trl_side.py"
SIZES = {  # vocabulary, hidden, FFN, layers, heads, KV heads
    "6M": (320, 256, 688, 8, 4, 2),
    "45M": (8192, 512, 1376, 12, 8, 2),
    "160M": (32_000, 768, 2048, 16, 12, 4),
    "toy": (320, 32, 64, 2, 4, 2),
}
LARGE = [size for size in SIZES if size != "toy"]
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


def write_data(
    path: Path,
    ids: Sequence[Ids | list[int]],
    vocab_size: int,
    trained: Sequence[list[int]] | None = None,
) -> Path:
    """A finished data run that holds these documents; trained: the mode of each id to learn."""
    marks = None if trained is None else np.concatenate(trained).astype(np.uint8)
    with open_run(path, "data") as run:
        with TokenWriter(path / "tokens", "train", vocab_size, masked=marks is not None) as writer:
            lengths = np.array([len(document) for document in ids])
            writer.add(np.concatenate(ids), lengths, marks)
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


def matmul_flops(
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    dtype: torch.dtype = torch.float32,
) -> float:
    """Operations a CPU second of a 1024^3 product: the best of 20."""
    a, b = torch.randn(2, 1024, 1024).to(dtype)
    seconds = []
    for _ in range(20):
        begun = time.process_time()
        product(a, b)
        seconds.append(time.process_time() - begun)
    return 2 * 1024**3 / min(seconds)


def peak(dtype: torch.dtype = torch.float32) -> float:
    """The faster of torch's two libraries, in operations a CPU second."""
    return max(matmul_flops(torch.matmul, dtype), matmul_flops(multiply, dtype))


def spans(marks: list[tuple[float, float]], skip: int = 1) -> list[tuple[float, float]]:
    """Wall and CPU seconds of each step, without the first ones."""
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(marks)][skip:]


# Against TRL and a plain loop, on a real model


def compare(what: str, options: argparse.Namespace) -> None:
    """Our Trainer and its peer on the same documents, for each number of threads and precision."""
    if options.side:
        side = plain_kd if options.side == "plain" else train_ours
        print(json.dumps(side(what, options)))
        return
    if what != "kd":
        need(options.peer, hint="--peer; make venv-trl")
    with tempfile.TemporaryDirectory() as folder:
        model = yardstick(options, Path(folder) / "model")
        work = Path(folder) / "work.json"
        work.write_text(json.dumps(documents(what, model, options.steps)))
        options.model, options.work = model, work
        for threads, dtype in itertools.product(options.threads_of, options.dtypes):
            options.threads = threads
            peer = partial(run_plain if what == "kd" else run_trl, options)
            name = "plain loop" if what == "kd" else "TRL"
            ways: dict[str, Any] = {"tessera": partial(run_ours, what, options, dtype)}
            for setting in SETTINGS[dtype]:
                ways[f"{name}, {setting}"] = partial(peer, setting)
            found = alternate(ways, options.rounds)
            table(
                [rate_row(way, rows, found["tessera"]) for way, rows in found.items()],
                f"{what}, {dtype}, {threads} thread(s)",
            )


def compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="HF directory or GGUF; SmolLM2-135M otherwise")
    parser.add_argument("--peer", default=TRL, help="a Python that has TRL")
    parser.add_argument("--steps", type=int, default=2, help="timed optimizer steps, after one")
    parser.add_argument("--dtypes", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--threads-of", nargs="+", type=int, default=[1, 2], metavar="N")
    parser.add_argument("--microbatch", type=int, default=2048, help="ours: positions at once")
    parser.add_argument("--batch", type=int, default=1, help="the peer's: rows at once")
    for hidden in ("--side", "--setting", "--work"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)


def yardstick(options: argparse.Namespace, folder: Path) -> Path:
    """The model as a Hugging Face directory."""
    if options.smoke:
        return harness.tiny_model(folder)
    given = options.model or smollm2()
    if not given.is_dir():
        export_model(given, folder, "hf", check=False)
    return folder if folder.is_dir() else given


def documents(what: str, model: Path, steps: int) -> dict[str, Any]:
    """Ids, and labels of which sft has those of answers alone: of problems and their answers, as
    long as they are (sft), or joined and cut to rows."""
    tokenizer, length = load_tokenizer(model), LENGTH if load_config(model).hidden_size > 32 else 64
    wanted = (steps + 3) * STEP_TOKENS
    rows, labels, left = [], [], wanted
    for number in itertools.count():
        one = problem("calc", 0, number)
        asked = tokenizer.encode(f"{one.question}\n")
        answer = tokenizer.encode(f"{one.work}\nAnswer: {one.answer}\n")
        rows.append((asked + answer)[:length])
        labels.append(([-100] * len(asked) + answer)[:length])
        left -= len(rows[-1])
        if left <= 0:
            break
    if what != "sft":
        flat = list(itertools.chain.from_iterable(rows))
        rows = labels = [flat[at : at + length] for at in range(0, len(flat) - length, length)]
    return {"length": length, "documents": rows, "labels": labels}


def run_ours(what: str, options: argparse.Namespace, dtype: str) -> Figures:
    return fresh(__file__, side_words(what, options, "ours", dtype), options.threads)


def run_plain(options: argparse.Namespace, setting: str) -> Figures:
    return fresh(__file__, side_words("kd", options, "plain", setting), options.threads)


def side_words(what: str, options: argparse.Namespace, side: str, setting: str) -> list[str]:
    words = [what, "--side", side, "--setting", setting]
    for key in ("model", "work", "steps", "threads", "microbatch", "batch"):
        words += [f"--{key}", str(getattr(options, key))]
    return words


def run_trl(options: argparse.Namespace, setting: str) -> Figures:
    accumulation = STEP_TOKENS // (options.batch * LENGTH)
    words = ["sft", str(options.model), str(options.work), "--dtype", setting]
    words += ["--batch", str(options.batch), "--accum", str(accumulation)]
    words += ["--steps", str(options.steps), "--threads", str(options.threads)]
    return fresh(TRL_SIDE, words, options.threads, options.peer)


def train_ours(what: str, options: argparse.Namespace) -> Figures:
    """The Trainer on a data run of the documents; per step, after the first."""
    work, model = json.loads(Path(options.work).read_text()), options.model
    changes = {"microbatch_tokens": options.microbatch, "lr": 1e-5, "dtype": options.setting}
    train = settings(options.steps + 1, **changes)
    with tempfile.TemporaryDirectory() as folder:
        trained = None
        if what == "sft":
            trained = [[OFF if one >= 0 else 0 for one in row] for row in work["labels"]]
        vocab = load_config(model).vocab_size
        data = write_data(Path(folder) / "data", work["documents"], vocab, trained)
        source = Measured(packed(data, train, options.microbatch))
        module = train.placement.load(model)
        objective: Objective = SFT() if what == "sft" else LM()
        if what == "kd":
            teacher = train.placement.load(model, frozen=True, beside=module)
            objective = KD(teacher, KDConfig(train=train, cosine=0.0))
        with open_run(Path(folder) / "run", what) as run:
            source.count(Trainer(module, objective, source, train, run)).fit()
            source.mark()
    wall, cpu = (statistics.fmean(x) for x in zip(*spans(source.marks), strict=True))
    share = statistics.fmean(source.flops[1:]) / cpu / peak(DTYPES[options.setting])
    done = statistics.fmean(source.predictions[1:])
    return {"done": done, "wall": wall, "cpu": cpu, "peak": memory_mb(), "share": share}


def plain_kd(what: str, options: argparse.Namespace) -> Figures:
    """The loop that one writes over transformers' models, `batch` rows a backward."""
    from transformers import AutoModelForCausalLM

    rows = torch.tensor(json.loads(Path(options.work).read_text())["documents"])
    dtype = torch.bfloat16 if options.setting == "bfloat16" else torch.float32
    read = partial(AutoModelForCausalLM.from_pretrained, options.model, dtype=dtype)
    teacher, student = read().requires_grad_(False).eval(), read().train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)
    cast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=options.setting == "autocast")
    marks, at = [], 0
    for _ in range(options.steps + 1):
        marks.append((time.perf_counter(), time.process_time()))
        for _ in range(STEP_TOKENS // (options.batch * rows.shape[1])):
            ids = rows[at : at + options.batch]
            at += options.batch
            with cast():
                with torch.no_grad():
                    target = teacher(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
                found = student(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
                loss = F.kl_div(found, target, log_target=True, reduction="sum") / STEP_TOKENS
            loss.backward()
            del target, found, loss
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    marks.append((time.perf_counter(), time.process_time()))
    wall, cpu = (statistics.fmean(x) for x in zip(*spans(marks), strict=True))
    done = STEP_TOKENS // rows.shape[1] * (rows.shape[1] - 1)
    return {"done": done, "wall": wall, "cpu": cpu, "peak": memory_mb()}


def rate_row(name: str, rows: list[Figures], mine: list[Figures]) -> Figures:
    """Predictions a second: positions with a label, which both sides share."""
    for one in (*rows, *mine):
        one |= {f"per_{key}": one["done"] / one[key] for key in ("wall", "cpu")}
    row = {
        "": name,
        "tokens/s": f"{median(rows, 'per_wall'):,.0f}",
        "tokens/CPU-s": f"{median(rows, 'per_cpu'):,.0f}",
        "peak MB": f"{median(rows, 'peak'):,.0f}",
    }
    if rows is mine:
        return {**row, "of the products' peak": f"{median(rows, 'share'):.0%}"}
    row["tessera / it, wall"] = f"{ratio(mine, rows, 'per_wall'):.2f}"
    return {**row, "CPU": f"{ratio(mine, rows, 'per_cpu'):.2f}"}


# A step against the machine


def step(options: argparse.Namespace) -> None:
    table([of_size(size, options.steps) for size in options.sizes])


def step_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=LARGE)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--side", help=argparse.SUPPRESS)


class Measured(Clocked):
    """A clocked source that counts its batches' operations too."""

    def __init__(self, source: Documents) -> None:
        super().__init__(source)
        self.flops: list[float] = []

    def count(self, trainer: Trainer) -> Trainer:
        self.trainer = trainer
        return trainer

    def batches(self, step: int) -> list[Batch]:
        batches, trainer = super().batches(step), self.trainer
        self.flops.append(sum(trainer.objective.flops(trainer.module, b) for b in batches))
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
    source = Measured(packed(data, train, PACKED, shard))
    module = train.placement.transformer(Transformer(config).init_weights(0))
    with open_run(folder / f"run-{dist.rank()}", "cpt") as run:
        trainer = source.count(Trainer(module, LM(), source, train, run))
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
    SMALL = {"steps": 1, "threads_of": [1]}
    harness.main(
        __doc__,
        {
            "lm": Command(partial(compare, "lm"), compare_options, SMALL),
            "sft": Command(partial(compare, "sft"), compare_options, SMALL),
            "kd": Command(partial(compare, "kd"), compare_options, SMALL),
            "step": Command(step, step_options, TOY),
            "processes": Command(processes, step_options, TOY),
        },
    )
