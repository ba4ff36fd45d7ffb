"""What `tessera check` tells of a recipe against what its runs took: seconds, memory, disk.

    python benchmarks/estimate.py --recipe recipes/smollm2-135m.toml --runs runs [--cpu] [KEY=VALUE]

The runs are to be finished, each in one process on this machine with as many threads as now. What a
stage takes is estimated from what is there when it begins. Memory is the most that the process
held, disk what the run has kept, without resume states. --cpu: CPU
seconds over threads instead of the wall's, where other work ran beside it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import harness
from harness import Command, table

from tessera.pipeline import STAGES, run_recipe
from tessera.planning.here import estimate
from tessera.runs.plan import plan
from tessera.runs.recipe import load, loads
from tessera.runs.run import read_manifest
from tessera.table import clock

LEAST = 10.0  # seconds of a stage whose ratio is told
TOY = """
[data]
tokenizer = "byte"
tasks = { calc = 50 }
[parent]
architecture = { hidden_size = 32, num_hidden_layers = 2, num_attention_heads = 4 }
train = { steps = 2 }
[cpt]
train = { steps = 2 }
"""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", type=Path, default=Path("recipes/smollm2-135m.toml"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--cpu", action="store_true", help="CPU seconds over threads")
    parser.add_argument("overrides", nargs="*")


def run(given: argparse.Namespace) -> None:
    if given.recipe is None:
        given.runs = Path(tempfile.mkdtemp())
        recipe = loads(TOY)
        run_recipe(recipe, given.runs, quiet=True)
    else:
        recipe = load(given.recipe, given.overrides)
    lines = {line.name: line for line in estimate(recipe, STAGES, given.runs)}
    rows, totals = [], [0.0, 0.0]
    for step in plan(recipe, given.runs, (), STAGES):
        if step.action != "skip":
            print(f"{step.name}: not finished")
            continue
        made, line = read_manifest(step.path), lines[step.name]
        took = made.cpu_seconds / given.threads if given.cpu else made.seconds
        kept = sum(file.stat().st_size for file in step.path.rglob("*") if file.is_file())
        for i, seconds in enumerate((line.seconds, took)):
            totals[i] += seconds
        rows.append(
            {
                "stage": step.name,
                "estimate": clock(line.seconds),
                "took": clock(took),
                "ratio": f"{line.seconds / took:.2f}" if took >= LEAST else "",
                "memory, GB": f"{line.parts.total / 1e9:.2f}",
                "held": f"{made.peak_memory / 1e9:.2f}",
                "disk, GB": f"{line.left / 1e9:.2f}",
                "kept": f"{kept / 1e9:.2f}",
                "not known": line.unknown,
            }
        )
    ratio = totals[0] / totals[1] if totals[1] else 0.0
    rows.append(
        {
            "stage": "in all",
            "estimate": clock(totals[0]),
            "took": clock(totals[1]),
            "ratio": f"{ratio:.2f}",
        }
    )
    table(rows)


if __name__ == "__main__":
    harness.main(__doc__, Command(run, options, {"recipe": None}))
