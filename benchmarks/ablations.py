"""What each part of the search is worth: one thing changed at a time, the same budgets.

    python benchmarks/ablations.py stories260k|char [--speeds 1.5 2] [--seeds 0 1 2]

Begins from what `benchmarks/puzzle.py` left in --runs (library, scores, costs, the learning rate
of each speed). Every variant is the first solution of its search, without a race, distilled on the
same tokens at the same rate:

    kl        replace-one KL of the trained library: the reference
    lm_loss, cosine   other scores of the same library
    pruned    words cut from the parent and not trained
    longer    the library trained for twice as many steps: what `coupled` spends
    coupled   the most-chosen pairs trained jointly on top, scored and searched again
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from puzzle import SPACE, WORKS, Work, best_rates, label, run, spread, trained

from tessera.runs.run import read_table

SCORES = {"kl": "kl", "lm_loss": "lm_loss", "cosine": "cosine"}
LIBRARIES = ("pruned", "longer", "coupled")


def recipe(name: str, work: Work, speeds: Sequence[float], seed: int, base: Path) -> dict:
    """All variants at all speeds as a recipe's tables; base holds the runs of the same seed."""
    made = {"library": str(base / "bld"), "scores": str(base / "score")}
    costs = str(base / "cost")
    tables: dict = {"name": f"{name}-ablations-{seed}", "seed": seed}
    tables |= {"parent": work.parent, "data": work.data}
    score = {"tokens": 8192, "sequence_length": work.length}
    for at in map(label, speeds):
        for variant, column in SCORES.items():
            inputs = {"scores": made["scores"], "costs": costs}
            tables[f"search-{variant}-{at}"] = {**inputs, **_search(at), "minimize": column}
    tables["bld-pruned"] = {"space": SPACE, "train": work.train(1, 1e-12)}
    tables["bld-longer"] = {"space": SPACE, "train": work.train(2 * work.bld, 2e-3)}
    tables["couple"] = {
        "library": made["library"],
        "searches": [f"search-kl-{label(speed)}" for speed in speeds],
        "train": work.train(work.bld, 2e-3),
    }
    names = {"pruned": "bld-pruned", "longer": "bld-longer", "coupled": "couple"}
    for variant in LIBRARIES:
        tables[f"score-{variant}"] = {"library": names[variant], **score}
        for at in map(label, speeds):
            inputs = {"scores": f"score-{variant}", "costs": costs}
            tables[f"search-{variant}-{at}"] = inputs | _search(at)
    models = []
    for speed in speeds:
        at = label(speed)
        lr = best_rates(read_table(base / f"race-{at}", "race"))[f"search-{at}.1"]
        for variant in (*SCORES, *LIBRARIES):
            library = names.get(variant, made["library"])
            chosen = {"library": library, "architecture": f"search-{variant}-{at}"}
            tables[f"child-{variant}-{at}"] = chosen
            tables[f"kd-{variant}-{at}"] = {"train": work.train(work.kd, lr), "cosine": 0.1}
            models += [f"child-{variant}-{at}", f"kd-{variant}-{at}"]
    scenario = {"batch": 8, "prompt": 64, "new": 16}  # quality is what is asked here
    compare = {"models": models, "scenario": scenario, "rounds": 3}
    return tables | {"compare": compare | {"sequence_length": work.length}}


def _search(at: str) -> dict:
    return {"constraints": {"throughput": f"{int(at) / 100:g}x"}, "prices": False}


def report(name: str, speeds: Sequence[float], seeds: dict[int, dict[str, dict]]) -> str:
    """A Markdown table: KL before and after distillation, mean and range over the seeds."""
    lines = [
        f"## {name}\n",
        "| target | variant | KL before KD | KL after KD |",
        "|--:|---|--:|--:|",
    ]
    for speed in speeds:
        for variant in (*SCORES, *LIBRARIES):
            cells = [
                spread(
                    [rows[f"{kind}-{variant}-{label(speed)}"]["kl"] for rows in seeds.values()],
                    ".3f",
                )
                for kind in ("child", "kd")
            ]
            lines.append(f"| {speed:g}x | {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", nargs="?", choices=WORKS)
    parser.add_argument("--speeds", type=float, nargs="+", default=[1.5, 2.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs") / "benchmark")
    options = parser.parse_args()
    if options.work is None:
        print("skipped: name a parent that benchmarks/puzzle.py was run for")
        return
    work, seeds = trained(options.work, options.runs), {}
    for seed in options.seeds:
        base = options.runs / f"{options.work}-{seed}"
        folder = run(recipe(options.work, work, options.speeds, seed, base), options.runs)
        seeds[seed] = {row["model"]: row for row in read_table(folder / "compare", "compare")}
        print(report(options.work, options.speeds, seeds), flush=True)


if __name__ == "__main__":
    main()
