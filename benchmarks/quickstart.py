"""The quickstart over several seeds: its table, and the seconds of every stage.

    python benchmarks/quickstart.py [--task calc] [--seeds 0 1 2] [--runs runs/quickstart-seeds]

What the folder holds already is not run again. Seconds are of the wall, with whatever else the
machine does, and of the CPU; the models' speeds were paired within each run. "Work" is the share of
hard answers whose whole work is right: an answer can be right by a shortcut, its work cannot.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from tessera.cli.quickstart import EXAMPLES, HARD, ROWS, rendered, table
from tessera.runs.run import read_table
from tessera.table import render_table

EVALUATIONS = [(run, mode) for _, run, _, mode in ROWS if mode != "off"]


def ran(task: str, seed: int, runs: Path) -> Path:
    """The finished quickstart of a family of problems and a seed."""
    name = f"quickstart-{task}-{seed}"
    words = ["quickstart", f"seed={seed}", f"name={name}", "--runs", str(runs), "--quiet"]
    words += ["--task", task]
    subprocess.run([sys.executable, "-m", "tessera", *words], check=True, stdout=subprocess.DEVNULL)
    return runs / name


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=list(EXAMPLES), default="calc")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/quickstart-seeds"))
    options = parser.parse_args()
    homes = {seed: ran(options.task, seed, options.runs) for seed in options.seeds}
    rows = {seed: table(home) for seed, home in homes.items()}
    for seed, found in rows.items():
        print(f"seed {seed}\n{rendered(found)}\n")
    gains = [
        {row["model"]: row["hard"] for row in found}["after RL, thinking on"]
        - {row["model"]: row["hard"] for row in found}["after SFT, thinking on"]
        for found in rows.values()
    ]
    spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
    print(f"RL on hard problems: {statistics.mean(gains):+.1%}, spread {spread:.1%}\n")
    print(render_table([{"work": f"seed {seed}", **work(home)} for seed, home in homes.items()]))
    print()
    times = {
        f"seed {seed}{name}": seconds(home, key)
        for seed, home in homes.items()
        for name, key in (("", "seconds"), (", CPU", "cpu_seconds"))
    }
    stages = list(next(iter(times.values())))
    told = [{"stage": s, **{k: round(t[s], 1) for k, t in times.items()}} for s in stages]
    told.append({"stage": "all", **{k: round(sum(t.values())) for k, t in times.items()}})
    print(render_table(told))


if __name__ == "__main__":
    main()
