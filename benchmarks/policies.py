"""Reinforcement learning on the quickstart's fine-tuned child: orders of prompts and algorithms.

    python benchmarks/policies.py RUNS [--seeds 0 1 2]

RUNS holds what benchmarks/quickstart.py made (RUNS/quickstart-SEED/sft). Every row trains the same
model on as many answers: GRPO on prompts by chance, from easy to hard and answered one step ahead,
RLOO, and online RPO.
Accuracy is greedy on held-out problems of three and six operations, reasoning on.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from tessera.pipeline import run_recipe
from tessera.runs.recipe import loads
from tessera.runs.run import read_manifest, read_table
from tessera.table import render_table

RECIPE = """
name = "policies-{seed}"
seed = {seed}
[profile]
model = "{sft}"
tasks = {{ calc = 500 }}
off = 0.1
samples = 8
max_tokens = 64
rewards = [{{ kind = "exact" }}]
drop_from = {drop}
[grpo]
{common}
train = {{ {train}, lr = 5e-4 }}
[grpo-curriculum]
{common}
curriculum = {{ order = "curriculum" }}
train = {{ {train}, lr = 5e-4 }}
[grpo-ahead]
{common}
staleness = 1
gap_limit = 1.0
train = {{ {train}, lr = 5e-4 }}
[rloo]
{common}
kl = 0.0
train = {{ {train}, lr = 5e-4 }}
[rpo]
{common}
beta = 0.1
eta = 10.0
dynamic_sampling = 2
train = {{ {train}, lr = 5e-4 }}
"""
COMMON = """model = "{sft}"
prompts_per_rollout = 12
samples = 12
max_tokens = 64
rewards = [{{ kind = "exact" }}, {{ kind = "format", weight = 0.1 }}]"""
TRAIN = 'steps = 100, microbatch_tokens = 2048, schedule = "constant"'
EVAL = """
[eval-{name}]
stage = "eval"
model = "{model}"
tasks = ["calc@3", "calc@6"]
thinking = "on"
on = {{ temperature = 0.0 }}
max_tokens = 64
"""
NAMES = ("grpo", "grpo-curriculum", "grpo-ahead", "rloo", "rpo")


def ran(seed: int, runs: Path) -> list[dict[str, float | str]]:
    """A row for each way of training one seed's model."""
    sft = (runs / f"quickstart-{seed}" / "sft").resolve()
    # Above every pass rate, so that all ways see the same prompts, easy ones among them.
    words = {"seed": seed, "sft": sft, "drop": 1.01, "train": TRAIN}
    text = RECIPE.format(**words, common=COMMON.format(sft=sft))
    text += EVAL.format(name="sft", model=sft)
    text += "".join(EVAL.format(name=name, model=name) for name in NAMES)
    run_recipe(loads(text), runs, quiet=True)
    home = runs / f"policies-{seed}"
    rows = []
    for name in ("sft", *NAMES):
        found = {row["task"]: row for row in read_table(home / f"eval-{name}", "eval")}
        seconds = read_manifest(home / name).seconds if name != "sft" else 0.0
        row = {"way": name, "seed": seed, "seconds": round(seconds, 1)}
        row |= {"easy": found["calc@3"]["value"], "hard": found["calc@6"]["value"]}
        rows.append({**row, "obedience": found["calc@6"]["obedience"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    rows = [row for seed in options.seeds for row in ran(seed, options.runs)]
    print(render_table(rows))
    told = []
    for name in ("sft", *NAMES):
        hard = [float(row["hard"]) for row in rows if row["way"] == name]
        spread = statistics.stdev(hard) if len(hard) > 1 else 0.0
        told.append({"way": name, "hard, mean": statistics.mean(hard), "spread": round(spread, 3)})
    print(f"\n{render_table(told)}")


if __name__ == "__main__":
    main()
