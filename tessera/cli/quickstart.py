"""The quickstart: its recipe, its short form, and the table of its results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tessera.runs.recipe import Recipe, RecipeError, load
from tessera.runs.run import is_done, read_table
from tessera.table import Row, cell, count, percent, render_table, times, view

NAME = "quickstart.toml"
# Families of problems that it runs on, with a question of each; the recipe is for the first.
EXAMPLES = {
    "calc": "start 6 m+3 n*3 o-2 mod 10",
    "hop": "table 4=7 2=4 7=1 1=2 start=4 m n stop",
}
OWN = next(iter(EXAMPLES))
# Tokens of a family's questions that the recipe's own do without.
TOKENS = {"hop": ("table", " stop")}
EASY, HARD = "@3", "@6"  # steps, behind the family's name
EVALUATIONS = ("parent", "child", "kd", "dropped", "sft", "grpo")
# Less of everything, for 2 to 5 minutes: worse figures, the same path.
FAST = (
    "data.tasks={calc=16000}",
    "parent.train.steps=400",
    "bld.train.steps=20",
    "cost.rounds=3",
    "cost.wholes=0",
    "search.solutions=2",
    "race.rungs=1",
    "race.train.steps=10",
    "kd.train.steps=400",
    "kd-dropped.train.steps=100",
    "frontier.points=[2.0]",
    "compare.rounds=3",
    "compare.tokens=4096",
    "sft.train.steps=250",
    "profile.tasks={calc=200}",
    "grpo.train.steps=40",
    *(f"eval-{one}.limit=100" for one in EVALUATIONS),
)
# Name in the table, the run of its evaluation, the row of the comparison, the mode of reasoning.
ROWS = (
    ("parent", "eval-parent", "parent", "text"),
    ("child, as assembled", "eval-child", "child", "text"),
    ("child, distilled", "eval-kd", "kd", "text"),
    ("layers dropped, distilled", "eval-dropped", "kd-dropped", "text"),
    ("after SFT, thinking on", "eval-sft", "kd", "on"),
    ("after SFT, thinking off", "eval-sft", "kd", "off"),
    ("after RL, thinking on", "eval-grpo", "kd", "on"),
    ("after RL, thinking off", "eval-grpo", "kd", "off"),
)


VIEW = view(
    "model easy hard tokens obedience speedup tokens_per_second parameters kv_bytes_per_token",
    easy=("right,|easy", cell),
    hard=("right,|hard", cell),
    tokens=("tokens|an answer", "{:.1f}".format),
    obedience=("obeys the|switch", percent),
    speedup=("genera-|tion", times),
    tokens_per_second=("tokens/s|decoding", count),
)


def recipe_path() -> Path:
    """The recipe, beside the package in a clone and inside of it when installed."""
    package = Path(__file__).parents[1]
    for folder in (package.parent / "recipes", package / "recipes"):
        if (folder / NAME).is_file():
            return folder / NAME
    raise RecipeError(f"recipes/{NAME} is not with this installation; clone the repository")


def recipe(task: str = OWN, fast: bool = False, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe, short or not, on the family's problems. Raises RecipeError for no such family."""
    if task not in EXAMPLES:
        raise RecipeError(f"--task {task}: the quickstart runs on {' or '.join(EXAMPLES)}")
    name = f"quickstart{'' if task == OWN else f'-{task}'}{'-fast' if fast else ''}"
    plan = load(recipe_path(), [*(FAST if fast else ()), f"name={name}", *overrides])
    tables = {spec.name: _for_family(task, spec.table) for spec in plan.stages}
    tokens = tables["data"]["tokenizer"]["tokens"]
    answers = tokens.index("Work:")
    tokens[answers:answers] = TOKENS.get(task, ())
    return replace(plan, stages=tuple(replace(s, table=tables[s.name]) for s in plan.stages))


def _for_family(task: str, value: Any) -> Any:
    """A table with the family instead of the recipe's own: `calc = 500`, "calc@6"."""
    if isinstance(value, dict):
        return {task if k == OWN else k: _for_family(task, v) for k, v in value.items()}
    if isinstance(value, list):
        return [_for_family(task, one) for one in value]
    if isinstance(value, str) and value.startswith(f"{OWN}@"):
        return task + value.removeprefix(OWN)
    return value


def use_one_thread() -> None:
    """Keeps torch to one thread: the toy's products are too small to share.

    Two threads spend 1.7 times the CPU time for the same wall time, and costs measured by the wall
    led the search to children with one attention layer, which distillation cannot mend.
    """
    import torch

    torch.set_num_threads(1)


def table(home: Path) -> list[dict[str, Any]]:
    """A row for each model of a finished quickstart; the columns are those of `VIEW`."""
    speeds = {row["model"]: row for row in read_table(home / "compare", "compare")}
    rows = []
    for name, run, speed, mode in ROWS:
        if not is_done(home / run):
            continue
        found = [row for row in read_table(home / run, "eval") if row["mode"] == mode]
        easy, hard = (next(r for r in found if r["task"].endswith(level)) for level in (EASY, HARD))
        timed = speeds[speed]
        rows.append(
            {
                "model": name,
                "easy": easy["value"],
                "easy_stderr": easy["stderr"],
                "hard": hard["value"],
                "hard_stderr": hard["stderr"],
                "tokens": hard["tokens"],
                "obedience": hard["obedience"] if mode != "text" else None,
                "speedup": timed["speedup"],
                "tokens_per_second": timed["decode_tokens_per_second"],
                "parameters": timed["parameters"],
                "kv_bytes_per_token": timed["kv_bytes_per_token"],
            }
        )
    return rows


def rendered(rows: Sequence[Row], width: int | None = None) -> str:
    """The table as text, each share with its standard error behind it."""
    shown = []
    for row in rows:
        kept = {key: value for key, value in row.items() if not key.endswith("_stderr")}
        for key in ("easy", "hard"):
            kept[key] = f"{100 * row[key]:5.1f} ±{100 * (row[f'{key}_stderr'] or 0.0):.1f}%"
        shown.append(kept)
    return render_table(shown, None, VIEW, width)
