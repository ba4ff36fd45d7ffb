"""The quickstart over several seeds: its table, and the seconds of every stage.

    python benchmarks/quickstart.py [--task calc] [--seeds 0 1 2] [--runs runs/quickstart-seeds]

What the folder holds already is not run again. Seconds are of the wall, with whatever else the
machine does, and of the CPU; the models' speeds were paired within each run. "Work" is the share of
hard answers whose whole work is right: an answer can be right by a shortcut, its work cannot.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import harness
from harness import Command, spread
from harness import table as show

from tessera.cli.quickstart import EXAMPLES, HARD
from tessera.cli.quickstart import TOY as QUICKSTART
from tessera.runs.run import read_table

EVALUATIONS = [(run, mode) for _, run, _, mode in QUICKSTART.rows if mode != "off"]
# Next to nothing of everything.
TOY = [
    "defaults.scenario={batch=4,prompt=8,new=4}",
    "data.tasks={calc=600}",
    "parent.architecture.num_hidden_layers=3",
    "score.tokens=1024",
    *(f"{one}.train.steps=2" for one in ("parent", "bld", "kd", "kd-dropped", "sft", "grpo")),
    "data-chat.sources.on.tasks={calc=300}",
    "data-chat.sources.off.tasks={calc=300}",
    "search.constraints={throughput='1.3x'}",
    "search-dropped.constraints={throughput='1.3x'}",
    "search.solutions=1",
    "race.train.steps=2",
    "frontier.points=[1.3]",
    "compare.tokens=512",
    "profile.tasks={calc=12}",
    "defaults.max_tokens=16",
    *(f"eval-{one}.limit=4" for one in ("parent", "child", "kd", "dropped", "sft", "grpo")),
]


def ran(seed: int, options: argparse.Namespace) -> Path:
    """The finished quickstart of a family of problems and a seed."""
    name = f"quickstart-{options.task}-{seed}"
    words = ["quickstart", f"seed={seed}", f"name={name}", *(TOY if options.smoke else ())]
    words += ["--runs", str(options.runs), "--quiet", "--task", options.task]
    words += ["--fast"] if options.smoke else []
    subprocess.run([sys.executable, "-m", "tessera", *words], check=True, stdout=subprocess.DEVNULL)
    return options.runs / name


def seconds(home: Path, key: str) -> dict[str, float]:
    """How long each stage took, by the wall (`seconds`) or the CPU (`cpu_seconds`)."""
    manifests = (json.loads(path.read_text()) for path in home.glob("*/run.json"))
    return {one["name"]: one.get(key, 0.0) for one in sorted(manifests, key=lambda m: m["started"])}


def work(home: Path) -> dict[str, float]:
    """Of each model, the share of hard problems whose work is right to the last step."""
    return {
        f"{run.removeprefix('eval-')} ({mode})": row["work"]
        for run, mode in EVALUATIONS
        for row in read_table(home / run, "eval")
        if row["mode"] == mode and row["task"].endswith(HARD)
    }


def run(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        options.runs = Path(scratch) if options.smoke else options.runs
        tell({seed: ran(seed, options) for seed in options.seeds})


def tell(homes: dict[int, Path]) -> None:
    rows = {seed: QUICKSTART.table(home) for seed, home in homes.items()}
    for seed, found in rows.items():
        print(f"\nseed {seed}\n{QUICKSTART.rendered(found)}")
    hard = [{row["model"]: row["hard"] for row in found} for found in rows.values()]
    gains = [one["after RL, thinking on"] - one["after SFT, thinking on"] for one in hard]
    print(f"\nRL on hard problems: {spread(gains, '+.1%')}")
    show([{"work": f"seed {seed}", **work(home)} for seed, home in homes.items()])
    times = {
        f"seed {seed}{name}": seconds(home, key)
        for seed, home in homes.items()
        for name, key in (("", "seconds"), (", CPU", "cpu_seconds"))
    }
    stages = list(next(iter(times.values())))
    told = [{"stage": s, **{k: round(t[s], 1) for k, t in times.items()}} for s in stages]
    told.append({"stage": "all", **{k: round(sum(t.values())) for k, t in times.items()}})
    show(told)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=list(EXAMPLES), default="calc")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/quickstart-seeds"))


if __name__ == "__main__":
    harness.main(__doc__, Command(run, arguments, {"seeds": [0]}))
