"""Where an order from easy to hard helps: a pool of prompts that are mostly too hard to learn from.

    python benchmarks/curriculum.py RUNS [--seeds 0 1 2] [--repeats 2]

RUNS holds what benchmarks/quickstart.py made (RUNS/quickstart-SEED/sft). One prompt in ten has
three operations, as the model has seen them; nine have HARD, more than it was ever trained on. GRPO
learns from few answers, in a random order, from easy to hard (Llama-Nemotron, arXiv 2505.00949,
§5.1) and, as a control, from hard to easy: the same model, prompts, rewards and number of answers.
Accuracy is greedy on held-out problems, reasoning on.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from tessera.pipeline import run_recipe
from tessera.runs.recipe import loads
from tessera.runs.run import read_table
from tessera.table import render_table

HARD = 9
STEPS = 40
LEVELS = (3, 6, HARD)
ORDERS = {
    "random": '{ order = "random" }',
    "easy to hard": '{ order = "curriculum" }',
    "hard to easy": '{ order = "curriculum", start = 0.1, end = 0.9 }',
}
RECIPE = """
name = "curriculum-{seed}-{repeat}"
seed = {repeat}
[profile]
model = "{sft}"
tasks = {{ "calc@3" = 200, "calc@{hard}" = 1800 }}
samples = 8
max_tokens = 96
rewards = [{{ kind = "exact" }}]
drop_from = 1.01
"""
GRPO = """
[{name}]
stage = "grpo"
model = "{sft}"
prompts = "profile"
prompts_per_rollout = 12
samples = 4
max_tokens = 96
rewards = [{{ kind = "exact" }}, {{ kind = "format", weight = 0.1 }}]
curriculum = {order}
train = {{ steps = {steps}, microbatch_tokens = 2048, lr = 5e-4, schedule = "constant" }}
"""
EVAL = """
[eval-{name}]
stage = "eval"
model = "{model}"
tasks = {tasks}
thinking = "on"
on = {{ temperature = 0.0 }}
max_tokens = 96
"""


def ran(seed: int, repeat: int, runs: Path) -> list[dict[str, Any]]:
    """A row for the model as it is, and one for each order."""
    sft = (runs / f"quickstart-{seed}" / "sft").resolve()
    tasks = [f"calc@{level}" for level in LEVELS]
    text = RECIPE.format(seed=seed, repeat=repeat, sft=sft, hard=HARD)
    text += EVAL.format(name="before", model=sft, tasks=tasks)
    for order, table in ORDERS.items():
        name = order.replace(" ", "-")
        text += GRPO.format(name=name, sft=sft, order=table, steps=STEPS)
        text += EVAL.format(name=name, model=name, tasks=tasks)
    run_recipe(loads(text), runs, quiet=True)
    home, rows = runs / f"curriculum-{seed}-{repeat}", []
    for order in ("before", *ORDERS):
        found = read_table(home / f"eval-{order.replace(' ', '-')}", "eval")
        row: dict[str, Any] = {"order": order, "seed": seed, "repeat": repeat}
        row |= {each["task"]: each["value"] for each in found}
        rows.append({**row, "obedience": min(each["obedience"] for each in found)})
    return rows


def gains(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each order's mean, and its distance from random order in pairs of one seed and repeat."""
    told = []
    for order in ("before", *ORDERS):
        row: dict[str, Any] = {"order": order}
        for level in LEVELS:
            task = f"calc@{level}"
            here, random = (
                [float(one[task]) for one in rows if one["order"] == name]
                for name in (order, "random")
            )
            row[task] = round(statistics.mean(here), 3)
            apart = [mine - theirs for mine, theirs in zip(here, random, strict=True)]
            if order not in ("before", "random"):
                row[f"{task} - random"] = round(statistics.mean(apart), 3)
                row[f"± {level}"] = round(statistics.stdev(apart) / len(apart) ** 0.5, 3)
        told.append(row)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    if options.runs is None:
        print("skipped: give the runs of benchmarks/quickstart.py")
        return
    pairs = [(seed, repeat) for seed in options.seeds for repeat in range(options.repeats)]
    rows = [row for pair in pairs for row in ran(*pair, options.runs)]
    print(render_table(rows))
    print(f"\n{render_table(gains(rows))}")


if __name__ == "__main__":
    main()
