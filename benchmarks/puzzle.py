"""The puzzle: the raced frontier beside the simple methods, and what each part of it is worth.

    python benchmarks/puzzle.py frontier stories260k|char|deep [--speeds ...] [--seeds 0 1 2]
    python benchmarks/puzzle.py ablations stories260k|char [--speeds 1.5 2] [--seeds 0 1 2]

frontier: one recipe a seed: a library, scores, costs; for each measured speed a search of several
diverse solutions (one of them by conditional re-scoring) and the uniform, dropped-layers and
dropped-attention baselines at the same budget, all in one race by successive halving. Then the
winner, the search's first solution (what there is without a race) and every baseline get the same
KD tokens, each at the learning rate that served it best in the race's first rung, and are timed
through the engine beside the parent. Seeds vary the order of the data, the library and the
distillation; the parent stays. Everything lands in --runs, so a killed benchmark goes on, and a
second look costs nothing.

ablations: one thing changed at a time, the same budgets, from what `frontier` left in --runs
(library, scores, costs, the learning rate of each speed). Every variant is the first solution of
its search, without a race, distilled on the same tokens at the same rate:

    kl        replace-one KL of the trained library: the reference
    lm_loss, cosine   other scores of the same library
    pruned    words cut from the parent and not trained
    longer    the library trained for twice as many steps: what `coupled` spends
    coupled   the most-chosen pairs trained jointly on top, scored and searched again

Printed: mean and range over the seeds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import harness
from harness import MODELS, STORIES, Command, skip, spread, table

from tessera.pipeline import run_recipe
from tessera.runs.recipe import dumps, loads
from tessera.runs.run import read_json, read_table

BASELINES = ("uniform", "dropped", "dropped-attention")
SPACE = {
    "attention": ["divisors", "linear", "noop"],
    "ffn": ["75%", "50%", "37.5%", "25%", "12.5%", "linear", "noop"],
}


@dataclass(frozen=True)
class Work:
    """A parent, its text, and how long things are trained: steps of `tokens` tokens."""

    parent: dict
    data: dict
    bld: int
    kd: int
    lrs: tuple[float, ...]
    tokens: int = 2048
    length: int = 128

    def train(self, steps: int, lr: float) -> dict:
        """A stage's training table."""
        return {
            "steps": steps,
            "tokens_per_step": self.tokens,
            "microbatch_tokens": min(2048, self.tokens),
            "sequence_length": self.length,
            "lr": lr,
        }


def real() -> dict:
    """The data table of the pretrained checkpoints, which end a story by predicting <s>."""
    return {"model": "parent", "end": "bos", "heldout": 0.08, "paths": [str(STORIES)]}


WORKS = {
    "stories260k": Work({"path": str(MODELS / "stories260k")}, real(), 60, 80, (4e-4, 1.5e-3)),
    "char": Work(
        {"path": str(MODELS / "tinystories-char-940k")},
        real(),
        50,
        60,
        (1.5e-4, 6e-4),
    ),
    "deep": Work(
        {
            "architecture": {
                "hidden_size": 96,
                "num_hidden_layers": 12,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "intermediate_size": 256,
                "max_position_embeddings": 256,
            },
            "train": {
                "steps": 500,
                "tokens_per_step": 2048,
                "microbatch_tokens": 2048,
                "sequence_length": 128,
                "lr": 3e-3,
                "schedule": "wsd",
                "decay": 0.3,
            },
        },
        {
            "tokenizer": {"bpe": 512},
            "tasks": {"calc": 8000, "sort": 4000, "compare": 4000},
            "heldout": 0.05,
            "paths": [str(STORIES)],
        },
        40,
        60,
        (5e-4, 2e-3),
    ),
    "toy": Work(
        {
            "architecture": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
            | {"num_key_value_heads": 4, "intermediate_size": 64, "max_position_embeddings": 256},
            "train": {"steps": 4, "tokens_per_step": 512, "microbatch_tokens": 512}
            | {"sequence_length": 128, "lr": 3e-3},
        },
        {"tokenizer": {"bpe": 280}, "tasks": {"calc": 600}, "heldout": 0.2},
        2,
        4,
        (5e-4, 2e-3),
        512,
    ),
}


# What both commands build recipes of


def best_rates(race: Sequence[dict]) -> dict[str, float]:
    """Candidate -> the learning rate it did best with in the first rung."""
    first = [row for row in race if row["rung"] == 1 and row["kl"] is not None]
    return {row["candidate"]: row["lr"] for row in sorted(first, key=lambda row: -row["kl"])}


def trained(name: str, runs: Path) -> Work:
    """The work of a name, its parent trained once for all seeds where it is not a checkpoint."""
    work = WORKS[name]
    if "path" in work.parent:
        return work
    folder = run({"name": f"{name}-parent", "data": work.data, "parent": work.parent}, runs)
    data = {key: value for key, value in work.data.items() if key != "tokenizer"}
    return replace(work, parent={"path": str(folder / "parent")}, data=data | {"model": "parent"})


def label(speed: float) -> str:
    """1.25 as 125."""
    return f"{round(speed * 100)}"


def run(tables: dict, runs: Path) -> Path:
    """Bring a recipe of these tables about; returns where its runs are."""
    run_recipe(loads(dumps(tables)), runs)
    return runs / tables["name"]


# The frontier


def frontier(options: argparse.Namespace) -> None:
    seeds: dict[int, list[dict]] = {}
    work = opened(options)
    for seed in options.seeds:
        tables = recipe(options.work, work, options.speeds, seed)
        folder = run(tables, options.runs)
        run(with_children(tables, work, options.speeds, folder), options.runs)
        seeds[seed] = rows_of(work, options.speeds, folder / "compare")
        report(options.work, seeds)


def arguments(parser: argparse.ArgumentParser, speeds: Sequence[float]) -> None:
    parser.add_argument("work", nargs="?", choices=WORKS)
    parser.add_argument("--speeds", type=float, nargs="+", default=speeds)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs") / "benchmark")


def opened(options: argparse.Namespace) -> Work:
    if options.work is None:
        skip(f"takes an hour; name a parent ({', '.join(WORKS)}) to run it")
    return trained(options.work, options.runs)


def recipe(name: str, work: Work, speeds: Sequence[float], seed: int) -> dict:
    """Everything up to the races, as a recipe's tables."""
    tables: dict = {"name": f"{name}-{seed}", "seed": seed}
    tables |= {"parent": work.parent, "data": work.data}
    tables["bld"] = {"space": SPACE, "train": work.train(work.bld, 2e-3)}
    tables["score"] = {"tokens": 8192, "sequence_length": work.length}
    tables["cost"] = {"scenario": {"batch": 8, "prompt": 64, "new": 64}}
    for speed in speeds:
        at = label(speed)
        constraints = {"throughput": f"{speed:g}x"}
        tables[f"search-{at}"] = {
            "constraints": constraints,
            "solutions": 2,
            "conditional": {"rounds": 3, "tokens": 2048, "sequence_length": work.length},
            "prices": False,
        }
        for method in BASELINES:
            tables[f"search-{method}-{at}"] = {"method": method, "constraints": constraints}
        searches = [f"search-{at}", *(f"search-{method}-{at}" for method in BASELINES)]
        tables[f"race-{at}"] = {
            "searches": searches,
            "train": work.train(work.kd // 4, work.lrs[0]),
            "rungs": 3,
            "lrs": list(work.lrs),
            "cosine": 0.1,
        }
    return tables


def with_children(tables: dict, work: Work, speeds: Sequence[float], runs: Path) -> dict:
    """The same recipe with a child and its KD for the winner and every baseline of each race."""
    tables, models = dict(tables), []
    for speed in speeds:
        at = label(speed)
        rates = best_rates(read_table(runs / f"race-{at}", "race"))
        winner = read_json(runs / f"race-{at}", "architecture")
        field = {"": (f"race-{at}", winner["lr"])}
        field["first-"] = (f"search-{at}", rates[f"search-{at}.1"])
        for method in BASELINES:
            rate = rates.get(f"search-{method}-{at}.1", winner["lr"])
            field[f"{method}-"] = (f"search-{method}-{at}", rate)
        for prefix, (architecture, lr) in field.items():
            tables[f"child-{prefix}{at}"] = {"architecture": architecture}
            tables[f"kd-{prefix}{at}"] = {"train": work.train(work.kd, lr), "cosine": 0.1}
            models.append(f"kd-{prefix}{at}")
    scenario = {"batch": 8, "prompt": 64, "new": 64}
    tables["compare"] = {"models": models, "scenario": scenario, "sequence_length": work.length}
    return tables


def rows_of(work: Work, speeds: Sequence[float], folder: Path) -> list[dict]:
    """A row a speed and method: what it was before and after KD, and its measured speed."""
    compared = {row["model"]: row for row in read_table(folder, "compare")}
    found = []
    for speed in speeds:
        at = label(speed)
        race = read_table(folder.parent / f"race-{at}", "race")
        winner = read_json(folder.parent / f"race-{at}", "architecture")
        entries = {"": winner["name"], "first": f"search-{at}.1"}
        entries |= {method: f"search-{method}-{at}.1" for method in BASELINES}
        for method, entry in entries.items():
            row = compared[f"kd-{method}-{at}" if method else f"kd-{at}"]
            raced = next((one for one in race if one["candidate"] == entry), {})
            found.append(
                {
                    "speed": speed,
                    "method": method or "raced",
                    "won": winner["name"] if not method else "",
                    "meets": raced.get("meets", True),
                    "kl_before": raced.get("kl_before"),
                    **{key: row[key] for key in ("kl", "heldout_loss", "agreement", "speedup")},
                    "promised": row["promised"],
                }
            )
    return found


def report(name: str, seeds: dict[int, list[dict]]) -> None:
    """A table over the seeds: mean, and the least and greatest in brackets."""
    told = []
    for rows in zip(*seeds.values(), strict=True):
        first = rows[0]
        reach = "" if all(row["meets"] for row in rows) else " (cannot reach it)"

        def over(key: str, form: str, scale: float = 1, rows: Sequence[dict] = rows) -> str:
            return spread([None if row[key] is None else scale * row[key] for row in rows], form)

        told.append(
            {
                "target": f"{first['speed']:g}x",
                "method": first["method"] + reach,
                "KL after KD": over("kl", ".3f"),
                "KL before": over("kl_before", ".3f"),
                "held-out loss": over("heldout_loss", ".3f"),
                "agreement": over("agreement", ".1f", 100) + " %",
                "measured": over("speedup", ".2f") + "x",
                "promised": over("promised", ".2f") + "x",
            }
        )
    table(told, f"## {name}")
    print("\nWon the race:\n")
    for seed, rows in seeds.items():
        for row in rows:
            if row["won"]:
                print(f"- seed {seed}, {row['speed']:g}x: {row['won']}", flush=True)


# Ablations


SCORES = {"kl": "kl", "lm_loss": "lm_loss", "cosine": "cosine"}


LIBRARIES = ("pruned", "longer", "coupled")


def ablations(options: argparse.Namespace) -> None:
    work = opened(options)
    seeds: dict[int, dict[str, dict]] = {}
    for seed in options.seeds:
        base = options.runs / f"{options.work}-{seed}"
        if not (base / "bld").exists():
            skip(f"{base} is not here: run `puzzle.py frontier {options.work}` first")
        folder = run(ablation(options.work, work, options.speeds, seed, base), options.runs)
        seeds[seed] = {row["model"]: row for row in read_table(folder / "compare", "compare")}
    rows = []
    for speed in options.speeds:
        for variant in (*SCORES, *LIBRARIES):
            row = {"target": f"{speed:g}x", "variant": variant}
            for kind, head in (("child", "KL before KD"), ("kd", "KL after KD")):
                name = f"{kind}-{variant}-{label(speed)}"
                row[head] = spread([found[name]["kl"] for found in seeds.values()])
            rows.append(row)
    table(rows, f"## {options.work}")


def ablation(name: str, work: Work, speeds: Sequence[float], seed: int, base: Path) -> dict:
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


if __name__ == "__main__":
    runs = Path(tempfile.gettempdir()) / f"puzzle-smoke-{os.getpid()}"
    TOY = {"work": "toy", "speeds": [1.3], "seeds": [0], "runs": runs}
    try:
        harness.main(
            __doc__,
            {
                "frontier": Command(
                    frontier, partial(arguments, speeds=[1.25, 1.5, 2.0, 3.0]), TOY
                ),
                "ablations": Command(ablations, partial(arguments, speeds=[1.5, 2.0]), TOY),
            },
        )
    finally:
        shutil.rmtree(runs, ignore_errors=True)
