"""The frontier, raced: at each speed the raced child beside the simple methods, over seeds.

    python benchmarks/puzzle.py stories260k|char|deep [--speeds 1.25 1.5 2 3] [--seeds 0 1 2]

One recipe a seed: a library, scores, costs; for each measured speed a search of several diverse
solutions (one of them by conditional re-scoring) and the uniform, dropped-layers and
dropped-attention baselines at the same budget, all in one race by successive halving. Then the
winner, the search's first solution (what there is without a race) and every baseline get the same
KD tokens, each at the learning rate that served it best in the race's first rung, and are timed
through the engine beside the parent. Printed: mean and range over the seeds, which vary the order
of the data, the library and the distillation; the parent stays. Everything lands in --runs, so a
killed benchmark goes on, and a second look costs nothing.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tessera.pipeline import run_recipe
from tessera.runs.recipe import dumps, loads
from tessera.runs.run import read_json, read_table

SHARED = Path(__file__).parents[2] / "shared"
STORIES = SHARED / "data" / "tinystories" / "train_head_2316_stories.txt"
BASELINES = ("uniform", "dropped", "dropped-attention")
HEADINGS = (
    *("target", "method", "KL after KD", "KL before", "held-out loss", "agreement"),
    *("measured", "promised"),
)
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
            "microbatch_tokens": 2048,
            "sequence_length": self.length,
            "lr": lr,
        }


def real() -> dict:
    """The data table of the pretrained checkpoints, which end a story by predicting <s>."""
    return {"model": "parent", "end": "bos", "heldout": 0.08, "paths": [str(STORIES)]}


WORKS = {
    "stories260k": Work(
        {"path": str(SHARED / "models" / "stories260k")}, real(), 60, 80, (4e-4, 1.5e-3)
    ),
    "char": Work(
        {"path": str(SHARED / "models" / "tinystories-char-940k")},
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
}


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


def report(name: str, seeds: dict[int, list[dict]]) -> str:
    """A Markdown table over the seeds: mean, and the least and greatest in brackets."""
    lines = [
        f"## {name}\n",
        f"| {' | '.join(HEADINGS)} |",
        "|--:|---|" + "--:|" * (len(HEADINGS) - 2),
    ]
    for rows in zip(*seeds.values(), strict=True):
        first = rows[0]
        reach = "" if all(row["meets"] for row in rows) else " (cannot reach it)"
        cells = [f"{first['speed']:g}x", first["method"] + reach]
        cells += [spread([row[key] for row in rows], ".3f") for key in ("kl", "kl_before")]
        cells += [spread([row["heldout_loss"] for row in rows], ".3f")]
        cells += [spread([100 * row["agreement"] for row in rows], ".1f") + " %"]
        cells += [
            spread([row[key] for row in rows], ".2f") + "x" for key in ("speedup", "promised")
        ]
        lines.append(f"| {' | '.join(cells)} |")
    won = [
        f"- seed {seed}, {row['speed']:g}x: {row['won']}"
        for seed, rows in seeds.items()
        for row in rows
        if row["won"]
    ]
    return "\n".join([*lines, "", "Won the race:", "", *won])


def spread(values: Sequence[float | None], form: str) -> str:
    """`0.121 [0.118, 0.126]`."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean, low, high = statistics.mean(known), min(known), max(known)
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]" if len(known) > 1 else f"{mean:{form}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", nargs="?", choices=WORKS)
    parser.add_argument("--speeds", type=float, nargs="+", default=[1.25, 1.5, 2.0, 3.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs") / "benchmark")
    options = parser.parse_args()
    if options.work is None:
        print(f"skipped: takes an hour; name a parent ({', '.join(WORKS)}) to run it")
        return
    work, seeds = trained(options.work, options.runs), {}
    for seed in options.seeds:
        tables = recipe(options.work, work, options.speeds, seed)
        folder = run(tables, options.runs)
        run(with_children(tables, work, options.speeds, folder), options.runs)
        seeds[seed] = rows_of(work, options.speeds, folder / "compare")
        print(report(options.work, seeds), flush=True)


if __name__ == "__main__":
    main()
