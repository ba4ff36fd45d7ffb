"""What the quickstart shows: its recipe, its short form, and the table of what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tessera.disk import atomic_write
from tessera.manifest import is_done, read_table
from tessera.recipe import RecipeError
from tessera.report import build, html
from tessera.table import Column, cell, count

NAME = "quickstart.toml"
# Less of everything, for a look in under two minutes: the figures are worse, the path is the same.
FAST = (
    "name=quickstart-fast",
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
    *(f"eval-{one}.limit=100" for one in ("parent", "child", "kd", "dropped", "sft", "grpo")),
)
# Name in the table, the run of its evaluation, the row of the comparison, the mode asked in.
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


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"


VIEW = (
    Column("model", ("model",), cell),
    Column("easy", ("right,", "easy"), _share),
    Column("hard", ("right,", "hard"), _share),
    Column("tokens", ("tokens", "an answer"), lambda value: f"{value:.1f}"),
    Column("obedience", ("obeys the", "switch"), _share),
    Column("speedup", ("genera-", "tion"), lambda value: f"{value:.2f}x"),
    Column("tokens_per_second", ("tokens/s", "decoding"), count),
    Column("parameters", ("params",), count),
    Column("kv_bytes_per_token", ("KV bytes", "a token"), count),
)


def recipe_path() -> Path:
    """The recipe, beside the package in a clone and inside of it when installed."""
    package = Path(__file__).parent
    for folder in (package.parent / "recipes", package / "recipes"):
        if (folder / NAME).is_file():
            return folder / NAME
    raise RecipeError(f"recipes/{NAME} is not with this installation; clone the repository")


def use_one_thread() -> None:
    """Keeps torch to one thread: the toy's products are too small to share.

    Two threads spend 1.7 times the CPU time for the same wall time, and costs measured by the wall
    led the search to children with one attention layer, which distillation cannot mend.
    """
    import torch

    torch.set_num_threads(1)


def table(home: Path) -> list[dict[str, Any]]:
    """What became of each model of a finished quickstart; the columns are those of `VIEW`."""
    speeds = {row["model"]: row for row in read_table(home / "compare", "compare")}
    rows = []
    for name, run, speed, mode in ROWS:
        if not is_done(home / run):
            continue
        found = [row for row in read_table(home / run, "eval") if row["mode"] == mode]
        easy, hard = (next(r for r in found if r["task"].endswith(level)) for level in ("@3", "@6"))
        timed = speeds[speed]
        rows.append(
            {
                "model": name,
                "easy": easy["value"],
                "hard": hard["value"],
                "tokens": hard["tokens"],
                "obedience": hard["obedience"] if mode != "text" else None,
                "speedup": timed["speedup"],
                "tokens_per_second": timed["decode_tokens_per_second"],
                "parameters": timed["parameters"],
                "kv_bytes_per_token": timed["kv_bytes_per_token"],
            }
        )
    return rows


def write_report(home: Path) -> Path:
    """Writes the page of a finished quickstart; returns where it is."""
    page = home / "report.html"
    _, found = build.sections(home)
    atomic_write(page, html.page(home.name, "What the quickstart made.", found))
    return page


def next_steps(home: Path) -> str:
    """What to try after it."""
    return (
        f"tessera chat {home / 'grpo'}        and ask: start 6 m+3 n*3 o-2 mod 10\n"
        f"tessera serve {home / 'grpo'} --web\n"
        "tessera run recipes/checkpoint.toml parent.path=MODEL data.paths='[\"DOCUMENTS.jsonl\"]'"
    )
