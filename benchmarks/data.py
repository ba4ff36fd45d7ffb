"""Data: the speed of tokenising, the memory of a large corpus, what the cache saves, the fill.

    python benchmarks/data.py [--megabytes 200] [--threads 1]

Text is TinyStories; a large corpus is its words drawn anew into as many documents, in files of
25 MB of JSONL. The stage runs in a process of its own each time, whose peak of resident memory is
the kernel's figure. Speeds are per second of CPU, so that other jobs on the machine count little.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

from tessera.data.config import DataConfig
from tessera.data.documents import WINDOW, Documents, plan_rows
from tessera.data.encode import Encoder, key_of
from tessera.data.prepare import stage as prepare
from tessera.data.readers import Record, content_hash, read
from tessera.data.tokenizer import byte_tokenizer, load_tokenizer
from tessera.runs.run import Run

SHARED = Path(__file__).parents[2] / "shared"
STORIES = SHARED / "data/tinystories/train_head_2316_stories.txt"
TOKENIZERS = {
    "byte": None,
    "stories260k, 512 (tokenizer.json)": "models/stories260k",
    "stories260k, 512 (SentencePiece)": "models/stories260k/tokenizer.model",
    "GPT-2, 50k": "data/tokenizers/gpt2",
    "Llama 3, 128k": "data/tokenizers/llama3/tokenizer.model",
}
FILE_MB = 25


def main() -> None:
    options = parse()
    if options.side:
        print(json.dumps(run_stage(json.loads(options.side))))
        return
    if not STORIES.exists():
        print(f"skipped: {STORIES} is not here")
        return
    print(f"{options.threads} tokenizer thread(s), tokenizers {tokenizers.__version__}, ", end="")
    print(f"numpy {np.__version__}, torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(tokenising(), end="\n\n", flush=True)
        print(corpora(folder, options.megabytes), end="\n\n", flush=True)
        print(fill(folder), end="\n\n", flush=True)
        print(mixture(folder), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=200, help="size of the large corpus")
    parser.add_argument("--threads", type=int, default=1, help="threads of the tokenizers library")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(options.threads)
    return options


def cpu(work: Callable[[], Any]) -> float:
    """CPU seconds of this process."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def tokenising() -> str:
    """MB of text a CPU second: what the stage does to it, step by step."""
    texts = [record.content for record in read(STORIES) if isinstance(record, Record)]
    data = [text.encode() for text in texts]
    megabytes = sum(map(len, data)) / 1e6
    steps: dict[str, Callable[[], Any]] = {
        "hash of a file's content": lambda: [content_hash(STORIES) for _ in range(20)],
        "reading .txt": lambda: list(read(STORIES)),
        "hash of each document": lambda: [key_of(one) for one in data],
    }
    for label, path in TOKENIZERS.items():
        tokenizer = load_tokenizer(SHARED / path) if path else byte_tokenizer()
        encoder = Encoder(tokenizer, False, ())
        steps[f"tokenising, {label}"] = lambda encoder=encoder: list(encoder.portions(texts))
    lines = ["| step | MB / CPU s |", "|---|--:|"]
    for label, work in steps.items():
        best = min(cpu(work) for _ in range(3))
        times = 20 if "content" in label else 1
        lines.append(f"| {label} | {times * megabytes / best:,.1f} |")
    return "\n".join(lines)


def write_corpus(folder: Path, megabytes: int) -> list[str]:
    """Files of documents as long as the stories, of their words drawn at random."""
    stories = [record.content.split() for record in read(STORIES) if isinstance(record, Record)]
    words = np.array([word for story in stories for word in story])
    lengths = np.array([len(story) for story in stories])
    folder.mkdir(exist_ok=True)
    paths = []
    for number in range(max(1, megabytes // FILE_MB)):
        rng, path, size = np.random.default_rng(number), folder / f"{number:03}.jsonl", 0
        with path.open("w") as file:
            while size < min(FILE_MB, megabytes) * 1e6:
                drawn = words[rng.integers(len(words), size=rng.choice(lengths))]
                size += file.write(json.dumps({"text": " ".join(drawn)}) + "\n")
        paths.append(str(path))
    return paths


def run_stage(options: dict[str, Any]) -> dict[str, float]:
    """One run of the stage in this process: seconds, CPU seconds and the peak of its memory."""
    before = _status("VmRSS")
    begun = time.monotonic(), time.process_time()
    data_run(Path(options["run"]), Path(options["model"]), **options["table"])
    return {
        "wall": time.monotonic() - begun[0],
        "cpu": time.process_time() - begun[1],
        "before": before,
        "peak": _status("VmHWM"),
    }


def _status(key: str) -> float:
    """A figure of the kernel's about this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def data_run(where: Path, model: Path, **table: Any) -> Path:
    """A finished data run."""
    config = DataConfig(**table)
    dumped, inputs = config.model_dump(mode="json"), {"model": model}
    with Run.open(where, stage="data", config=dumped, inputs=inputs, seed=0, quiet=True) as run:
        prepare(config, run, inputs)
        run.finish()
    return where


def corpora(folder: Path, megabytes: int) -> str:
    """The stage on a small and a large corpus: nothing known, all known, one file more."""
    model = SHARED / "models/stories260k"
    lines = [
        "| corpus | cache | wall s | CPU s | peak MiB | of it before |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for size in (megabytes // 8, megabytes):
        home = folder / f"corpus-{size}"
        paths = write_corpus(home, size)
        cases = {"empty": paths, "all in it": paths}
        if len(paths) > 2:
            cases = {"empty": paths[:-1], "all but one file": paths, "all in it": paths}
        for number, (label, chosen) in enumerate(cases.items()):
            held = 0.02 if number < 2 else 0.05  # another split of the same tokens
            table = {"paths": chosen, "end": "bos", "heldout": held}
            side = {"run": str(home / f"run-{number}"), "model": str(model), "table": table}
            found = json.loads(_process(side))
            read_mb = sum(Path(path).stat().st_size for path in chosen) / 1e6
            lines.append(
                f"| {read_mb:.0f} MB, {len(chosen)} files | {label} | {found['wall']:.1f} | "
                f"{found['cpu']:.1f} | {found['peak']:.0f} | {found['before']:.0f} |"
            )
    return "\n".join(lines)


def _process(side: dict[str, Any]) -> str:
    command = [sys.executable, __file__, "--side", json.dumps(side)]
    threads = os.environ["RAYON_NUM_THREADS"]
    command += ["--threads", threads]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def fill(folder: Path) -> str:
    """The fill of TinyStories' rows, and what planning and serving them costs."""
    run = data_run(folder / "stories", SHARED / "models/stories260k", paths=str(STORIES), end="bos")
    lines = [
        f"| pieces of at most | rows of | fill of an epoch | ms to plan {WINDOW} documents "
        "| ms to serve 32,768 positions |",
        "|--:|--:|--:|--:|--:|",
    ]
    for sequence, row in ((512, 512), (512, 2048), (256, 256), (256, 2048)):
        sizes: dict[str, Any] = {"sequence_length": sequence, "row_length": row}
        source = Documents(run, **sizes, tokens_per_step=32_768, microbatch_tokens=4096, seed=0)
        part = source.parts[0]
        rows = plan_rows(part.offsets, np.arange(part.num_documents), sequence, row)
        share = part.num_predictions / (len(rows) * row)
        drawn = np.random.default_rng(0).integers(part.num_documents, size=WINDOW)
        planning = min(cpu(lambda: plan_rows(part.offsets, drawn, sequence, row)) for _ in range(5))  # noqa: B023
        serving = cpu(lambda: [source.batches(step) for step in range(20)]) / 20  # noqa: B023
        lines.append(
            f"| {sequence} | {row} | {share:.1%} | {planning * 1e3:.1f} | {serving * 1e3:.1f} |"
        )
    return "\n".join(lines)


def mixture(folder: Path) -> str:
    """Three real sources by weight: what 400 steps trained on, counted in their batches' rows."""
    sources = {
        "stories": {"paths": str(STORIES), "weight": 0.6},
        "math": {
            "paths": str(SHARED / "data/gsm8k/train.jsonl"),
            "field": "question",
            "weight": 0.3,
        },
        "sums": {"tasks": {"calc": 2000}, "weight": 0.1},
    }
    run = data_run(folder / "mix", SHARED / "models/stories260k", sources=sources, end="bos")
    lines = [
        "| source | rows of | weight | trained, 10 steps | 400 steps | epochs | fill |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row_length in (512, 2048):
        sizes: dict[str, Any] = {"sequence_length": 512, "row_length": row_length}
        source = Documents(run, **sizes, tokens_per_step=32_768, microbatch_tokens=4096, seed=0)
        early, late = counted(source, 10), counted(source, 400)
        for row in source.summary(400):
            name = row["source"]
            lines.append(
                f"| {name} | {row_length} | {row['weight']:.1%} | {early[name]:.2%} "
                f"| {late[name]:.2%} | {row['epochs']:.2f} | {row['fill']:.1%} |"
            )
    return "\n".join(lines)


def counted(source: Documents, steps: int) -> dict[str, float]:
    """The share of each source among the predictions that so many steps hold."""
    trained = dict.fromkeys((part.name for part in source.parts), 0)
    for index in range(steps * source.rows_per_step):
        which, own = source.mix.row(index)
        part = source.parts[which]
        row = part.row(own)
        trained[part.name] += sum(stop - start - 1 for start, stop in row or [])
    total = sum(trained.values())
    return {name: tokens / total for name, tokens in trained.items()}


if __name__ == "__main__":
    main()
