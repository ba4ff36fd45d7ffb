"""Peak memory of each process, by stage: what one process holds, and what each of two does.

    python benchmarks/memory.py [--hidden 768]

A random Llama goes through a recipe; each stage is run again in fresh processes, of which the
anonymous pages are sampled every 5 ms, less those that Python held with its libraries. What is
mapped from files is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import harness
from harness import Command, Figures, fresh, memory_mb, table

from tessera import dist
from tessera.pipeline import run_recipe
from tessera.runs.recipe import loads

RECIPE = """
name = "memory"
[data]
tasks = {{ calc = 200 }}
format = "chat"
switch = "detailed thinking"
heldout = 0.1
tokenizer = {{ bpe = 259, chat = true }}
[parent]
train = {{ steps = 1, {sizes} }}
[parent.architecture]
hidden_size = {hidden}
num_hidden_layers = 12
num_attention_heads = 12
num_key_value_heads = 4
intermediate_size = {ffn}
max_position_embeddings = 512
[bld]
parent = "parent"
space = {{ attention = ["noop"], ffn = ["50%", "noop"] }}
train = {{ steps = 1, {sizes} }}
calibration_tokens = 256
[score]
parent = "parent"
tokens = 256
[cost]
source = "counted"
[search]
constraints = {{ parameters = "0.8x" }}
[race]
parent = "parent"
searches = ["search"]
train = {{ steps = 1, {sizes} }}
tokens = 256
[profile]
model = "parent"
tasks = {{ "calc@2" = 4 }}
samples = 0
[grpo]
model = "parent"
prompts_per_rollout = 2
samples = 2
max_tokens = 8
tensor = {tensor}
gap_limit = 9.0
rewards = [{{ kind = "format" }}]
train = {{ steps = 1, microbatch_tokens = 256, lr = 1e-5 }}
"""
IMPORT = """
[parent-half]
stage = "parent"
path = "{runs}/memory/parent"
dtype = "bfloat16"
[export]
model = "parent-half"
format = "decilm"
"""
SIZES = "tokens_per_step = 512, microbatch_tokens = 256, sequence_length = 256"
# The last first: a stage made anew outdates those behind it.
STAGES = ("export", "grpo", "race", "score", "bld", "parent-half")


def run_stages(runs: Path, hidden: int, only: list[str] | None) -> float:
    """Brings stages about in this process or job; returns the MB that it held at most."""
    made = (runs / "memory" / "grpo").exists()
    text = (RECIPE + IMPORT * made).format(
        runs=runs, hidden=hidden, ffn=hidden * 8 // 3, sizes=SIZES, tensor=dist.world()
    )
    before, most, done = memory_mb("RssAnon"), [0.0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], memory_mb("RssAnon"))
            time.sleep(0.005)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        run_recipe(loads(text), runs, only=only, redo=only or (), quiet=True)
    finally:
        done.set()
        watching.join()
    return most[0] - before


def side(options: argparse.Namespace) -> None:
    """Prints what each process of this job held for a stage."""
    held = run_stages(options.runs, options.hidden, [options.side])
    (options.runs / f"held-{dist.rank()}.txt").write_text(str(held))
    if dist.is_main():
        while not all(file.exists() for file in _told(options.runs)):
            time.sleep(0.05)
        print(json.dumps({"mb": [float(file.read_text()) for file in _told(options.runs)]}))


def _told(runs: Path) -> list[Path]:
    return [runs / f"held-{rank}.txt" for rank in range(dist.world())]


def row(stage: str, runs: Path, hidden: int) -> Figures:
    words = ["--side", stage, "--runs", str(runs), "--hidden", str(hidden)]
    found: Figures = {"": stage}
    for processes in (1, 2):
        for file in runs.glob("held-*.txt"):
            file.unlink()
        held = fresh(__file__, words, processes=processes)["mb"]
        found[f"{processes} process{'es' * (processes > 1)}, MB"] = " / ".join(
            f"{one:,.0f}" for one in held
        )
    return found


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--side", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=Path, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> None:
    if options.side:
        side(options)
        return
    # Blocks go back to the kernel when they are freed, so that peaks are of what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        run_stages(runs, options.hidden, None)
        run_stages(runs, options.hidden, None)  # what imports the parent, too
        weights = (runs / "memory" / "parent" / "model" / "model.safetensors").stat().st_size
        print(f"parent: {weights / 1e6:,.0f} MB in float32")
        table([row(stage, runs, options.hidden) for stage in STAGES][::-1])


if __name__ == "__main__":
    harness.main(__doc__, Command(run, arguments, {"hidden": 48}))
