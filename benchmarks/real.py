"""Children of SmolLM2 beside simple methods, at equal measured speed and equal distillation.

    python benchmarks/real.py [--home runs/smollm2-135m] [--points 1.25 1.5] [--limit 433]

HOME is what `make real` made (PART=search is enough); its parent, library, scores, costs and texts
are used as they are, and runs go to HOME-frontier. At each point the simple methods come first;
the search is then held to the highest speed that one of them promises there, so that the child is
as fast as any; `--at 1.268` adds a child of that promised speed, of one simple method alone. All
are distilled as [kd] says, timed in pairs with the parent, and asked: IFEval (with shared/data),
requests and word problems that no training has seen.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
from harness import DATA, Command, need, table, tiny_model

from tessera.cli import quickstart
from tessera.pipeline import run_recipe
from tessera.puzzle.cost_table import share_of
from tessera.runs.recipe import Recipe, StageSpec
from tessera.runs.run import read_json, read_manifest, read_table

SIMPLE = ("uniform", "dropped", "dropped-attention")
SCORES = {"ifeval": "prompt_strict", "wish": "prompt_strict", "story": "accuracy"}
LAST = {"kl": "KL", "heldout_loss": "loss", "agreement": "agreement", "parameters": "parameters"}


# The shortest form, of a random model, whose texts nobody can read.
TOY = ["data.max_bad=0.9", "defaults.max_tokens=4", "kd.train.steps=1", "race.train.steps=1"]


def toy(scratch: Path) -> Path:
    """What `make real PART=search` makes, at toy size."""
    path = f"parent.path={tiny_model(scratch / 'model', 4)}"
    recipe = quickstart.real("search", True, [*TOY, path])
    run_recipe(recipe, scratch, quiet=True)
    return scratch / recipe.name


def stage(name: str, **table: Any) -> StageSpec:
    return StageSpec(name, name.partition("-")[0], table)


def search(home: Path, name: str, method: str, share: float) -> StageSpec:
    return stage(
        f"search-{name}",
        method=method,
        constraints={"throughput": f"{share}x"},
        parent=str(home / "parent"),
        scores=str(home / "score"),
        costs=str(home / "cost"),
        library=str(home / "bld"),
    )


def trained(home: Path, name: str, options: argparse.Namespace) -> Iterator[StageSpec]:
    """The child of a search, distilled and asked."""
    kd = read_manifest(home / "kd").config
    kd["train"]["steps"] = options.steps or kd["train"]["steps"]
    inputs = {"parent": str(home / "parent"), "library": str(home / "bld")}
    yield stage(f"child-{name}", architecture=f"search-{name}", **inputs)
    inputs = {"teacher": str(home / "parent"), "data": str(home / "data")}
    yield stage(f"kd-{name}", model=f"child-{name}", **inputs, **kd)
    yield asked(name, f"kd-{name}", home, options)


def asked(name: str, model: str, home: Path, options: argparse.Namespace) -> StageSpec:
    tasks = [task for task in SCORES if task != "ifeval" or options.data]
    data = {"data": str(options.data)} if options.data else {}
    own = read_manifest(home / "eval-parent").config
    kept = {key: own[key] for key in ("dtype", "max_tokens", "none") if own.get(key) is not None}
    return stage(f"eval-{name}", model=model, tasks=tasks, limit=options.limit, **kept, **data)


def names(options: argparse.Namespace, methods: tuple[str, ...]) -> dict[str, tuple[str, float]]:
    return {f"{m}-{round(100 * p)}": (m, p) for p in options.points for m in methods}


def run(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        home = toy(Path(scratch)) if options.smoke else options.home
        need(home / "eval-parent" / "run.json", hint="make real PART=search")
        if options.data and not (options.data / "ifeval").is_dir():
            options.data = None
        tell(home, options)


def tell(home: Path, options: argparse.Namespace) -> None:
    """Runs what is missing, and prints a row for each model."""
    runs, name = home.parent, f"{home.name}-frontier"

    def make(stages: list[StageSpec]) -> None:
        run_recipe(Recipe(name, read_manifest(home / "kd").seed, tuple(stages)), runs)

    simple = names(options, SIMPLE)
    searches = [search(home, key, *one) for key, one in simple.items()]
    make(searches)
    stages = list(searches)
    for point in options.points:
        found = [runs / name / f"search-{k}" for k, (_, p) in simple.items() if p == point]
        promised = [share_of(read_json(one, "architectures")[0], "throughput") for one in found]
        share = round(max(filter(None, promised)), 3)
        stages.append(search(home, f"mip-{round(100 * point)}", "mip", share))
    further = {f"mip-{share}": ("mip", share) for share in options.at}
    stages += [search(home, key, *one) for key, one in further.items()]
    models = {**names(options, ("mip",)), **further, **simple}
    for key in models:
        stages += trained(home, key, options)
    stages.append(asked("parent", str(home / "parent"), home, options))
    compared = read_manifest(home / "compare").config
    inputs = {"parent": str(home / "parent"), "data": str(home / "data")}
    stages.append(stage("compare", models=[f"kd-{key}" for key in models], **inputs, **compared))
    make(stages)
    rows = {row["model"]: row for row in read_table(runs / name / "compare", "compare")}
    shown = []
    for key in (
        "parent",
        *sorted(models, key=lambda one: (models[one][1], models[one][0] != "mip")),
    ):
        row = rows["parent" if key == "parent" else f"kd-{key}"]
        told = {e["task"]: e for e in read_table(runs / name / f"eval-{key}", "eval")}
        line: dict[str, Any] = {"model": key, "speed": f"{row['speedup']:.2f}x"}
        line |= {title: row[column] for column, title in LAST.items()}
        line |= {
            task: f"{one['value']:.1%} ±{one['stderr'] or 0:.1%}" for task, one in told.items()
        }
        shown.append({k: f"{v:.3f}" if isinstance(v, float) else v for k, v in line.items()})
    table(shown)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--home", type=Path, default=Path("runs/smollm2-135m"))
    parser.add_argument("--points", type=float, nargs="+", default=[1.25, 1.5])
    parser.add_argument("--at", type=float, nargs="*", default=[], help="of further children")
    parser.add_argument("--steps", type=int, help="of distillation, instead of the recipe's")
    parser.add_argument("--limit", type=int, default=433, help="items of each task")
    parser.add_argument("--data", type=Path, default=DATA, help="holds ifeval/")


if __name__ == "__main__":
    harness.main(__doc__, Command(run, arguments, {"points": [1.1], "limit": 2, "data": None}))
