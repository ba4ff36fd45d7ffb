"""The quickstarts, of a toy and of a real model: recipes, short forms, and tables of results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tessera.pipeline import STAGES
from tessera.runs.plan import with_defaults
from tessera.runs.recipe import Recipe, RecipeError, load
from tessera.runs.run import is_done, read_table
from tessera.table import AN_ANSWER, Column, Row, cell, count, percent, render_table, times, view

# Families of problems that the toy's runs on, with a question of each; the recipe is for the first.
EXAMPLES = {
    "calc": "start 6 m+3 n*3 o-2 mod 10",
    "hop": "table 4=7 2=4 7=1 1=2 start=4 m n stop",
}
OWN = next(iter(EXAMPLES))
# Tokens of a family's questions that the recipe's own do without.
TOKENS = {"hop": ("table", " stop")}
HARD = "@6"  # steps, behind the family's name
QUESTION = "I have 6 eggs. I buy 4. I sell 3. I find 2. How many eggs do I have?"
PARTS = ("search", "reasoning")
QUALITY = ("kl", "heldout_loss", "agreement")  # of a comparison, which is about text


@dataclass(frozen=True)
class Quickstart:
    """A recipe, and the table of what came of it.

    fast: overrides for less of everything: worse figures, the same path. rows: name in the table,
    runs of evaluations, row of the comparison, mode of reasoning. shown: columns, each with the end
    of a task's name; of the last one also `tokens` and `obedience`. threads: torch's own if None.
    reasoning: the first stage that the part "reasoning" begins with; child: what it reads of the
    part before, the parent in its place.
    """

    recipe: str
    fast: tuple[str, ...]
    rows: tuple[tuple[str, str, str, str], ...]
    shown: Mapping[str, str]
    view: tuple[Column, ...]
    threads: int | None = None
    reasoning: str = ""
    child: str = "kd"

    @property
    def path(self) -> Path:
        """The recipe, beside the package in a clone and inside of it when installed."""
        package = Path(__file__).parents[1]
        for folder in (package.parent / "recipes", package / "recipes"):
            if (folder / self.recipe).is_file():
                return folder / self.recipe
        raise RecipeError(
            f"recipes/{self.recipe} is not with this installation; clone the repository"
        )

    def read(self, fast: bool, overrides: Sequence[str], suffix: str = "") -> Recipe:
        name = f"name={Path(self.recipe).stem}{suffix}{'-fast' if fast else ''}"
        return load(self.path, [*(self.fast if fast else ()), name, *overrides])

    def use_threads(self) -> None:
        if self.threads:
            import torch

            torch.set_num_threads(self.threads)

    def table(self, home: Path) -> list[dict[str, Any]]:
        """A row for each model of a finished quickstart; the columns are those of `view`."""
        compared = read_table(home / "compare", "compare") if is_done(home / "compare") else []
        timed = {row["model"]: row for row in compared}
        keys = {column.key for column in self.view}
        rows = []
        for name, runs, speed, mode in self.rows:
            done = [home / run for run in runs.split() if is_done(home / run)]
            found = [row for run in done for row in read_table(run, "eval") if row["mode"] == mode]
            if not found:
                continue
            row, told = {"model": name}, mode in ("on", "off")
            last: Row = {}
            for column, task in self.shown.items():
                last = next((one for one in found if one["task"].endswith(task)), {})
                row |= {column: last.get("value"), f"{column}_stderr": last.get("stderr")}
            row |= {
                "tokens": last.get("tokens"),
                "obedience": last.get("obedience") if told else None,
            }
            own = {k: v for k, v in timed.get(speed, {}).items() if k in keys - row.keys()}
            rows.append(row | {k: None if told and k in QUALITY else v for k, v in own.items()})
        return rows

    def rendered(self, rows: Sequence[Row], width: int | None = None) -> str:
        """The table as text, each share with its standard error behind it."""
        shown = []
        for row in rows:
            kept = {key: value for key, value in row.items() if not key.endswith("_stderr")}
            for key in (key for key in self.shown if row[key] is not None):
                kept[key] = f"{100 * row[key]:5.1f} ±{100 * (row[f'{key}_stderr'] or 0.0):.1f}%"
            shown.append(kept)
        return render_table(shown, None, self.view, width)


# One thread: two spend 1.7 times the CPU time on the toy's small products for the same wall time,
# and costs measured by the wall led to children with one attention layer, which no KD mends.
TOY = Quickstart(
    recipe="quickstart.toml",
    threads=1,
    fast=(
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
    ),
    rows=(
        ("parent", "eval-parent", "parent", "text"),
        ("child, as assembled", "eval-child", "child", "text"),
        ("child, distilled", "eval-kd", "kd", "text"),
        ("layers dropped, distilled", "eval-dropped", "kd-dropped", "text"),
        ("after SFT, thinking on", "eval-sft", "kd", "on"),
        ("after SFT, thinking off", "eval-sft", "kd", "off"),
        ("after RL, thinking on", "eval-grpo", "kd", "on"),
        ("after RL, thinking off", "eval-grpo", "kd", "off"),
    ),
    shown={"easy": "@3", "hard": HARD},
    view=view(
        "model easy hard tokens obedience speedup decode_tokens_per_second parameters "
        "kv_bytes_per_token",
        easy=("right,|easy", cell),
        hard=("right,|hard", cell),
        tokens=("tokens|an answer", "{:.1f}".format),
        obedience=("obeys the|switch", percent),
        speedup=("genera-|tion", times),
        decode_tokens_per_second=("tokens/s|decoding", count),
    ),
)
SMOLLM2 = Quickstart(
    recipe="smollm2-135m.toml",
    reasoning="answers",
    fast=(
        "defaults.scenario={batch=8,prompt=32,new=16}",
        "defaults.max_tokens=32",
        "defaults.microbatch_tokens=1024",
        "defaults.train.tokens_per_step=1024",
        "defaults.train.microbatch_tokens=1024",
        'curate.steps=[{step="blend",weights={prompts=1},rows=64},'
        '{step="generate",teacher="parent",mode="off",top_p=1.0,max_tokens=64,truncated="keep"}]',
        "bld.train.steps=2",
        "bld.calibration_tokens=1024",
        "score.tokens=1024",
        "cost.rounds=3",
        "cost.wholes=0",
        "search.solutions=1",
        "race.train.steps=1",
        "kd.train.steps=3",
        "kd-dropped.train.steps=3",
        "compare.rounds=3",
        "compare.tokens=1024",
        "answers.sources=[{tasks={wish=16}}]",
        'answers.steps=[{step="generate",teacher="parent",mode="off",max_tokens=48,'
        'truncated="keep"}]',
        "data-chat.sources.on={tasks={story=60},format='chat',reasoning='on',heldout=4}",
        "data-chat.sources.off={tasks={story=60},format='chat',reasoning='off',heldout=4}",
        "data-chat.sources.open.heldout=2",
        "sft.train.steps=3",
        "profile.tasks={story=8}",
        "profile.samples=2",
        "profile.drop_to=-1.0",
        "grpo.prompts_per_rollout=2",
        "grpo.samples=4",
        "grpo.train.steps=2",
        *(f"eval-{one}.limit=8" for one in ("parent", "child", "kd", "dropped", "sft", "grpo")),
        *(f"rest-{one}.limit=8" for one in ("sft", "grpo")),
    ),
    rows=(
        ("parent", "eval-parent", "parent", "none"),
        ("child, as assembled", "eval-child", "child", "none"),
        ("child, distilled", "eval-kd", "kd", "none"),
        ("layers dropped, distilled", "eval-dropped", "kd-dropped", "none"),
        ("after SFT, thinking on", "eval-sft rest-sft", "kd", "on"),
        ("after SFT, thinking off", "eval-sft rest-sft", "kd", "off"),
        ("after RL, thinking on", "eval-grpo rest-grpo", "kd", "on"),
        ("after RL, thinking off", "eval-grpo rest-grpo", "kd", "off"),
    ),
    shown={"strict": "wish", "right": "story"},
    view=view(
        "model speedup kl heldout_loss agreement strict right obedience tokens parameters "
        "kv_bytes_per_token",
        strict=("instructions|followed", cell),
        right=("problems|right", cell),
        tokens=AN_ANSWER,
    ),
)
MODELS = {"toy": TOY, "smollm2": SMOLLM2}


def recipe(task: str = OWN, fast: bool = False, overrides: Sequence[str] = ()) -> Recipe:
    """The toy's recipe, short or not, on that family of problems. Raises RecipeError."""
    if task not in EXAMPLES:
        raise RecipeError(f"--task {task}: the quickstart runs on {' or '.join(EXAMPLES)}")
    plan = TOY.read(fast, overrides, "" if task == OWN else f"-{task}")

    def change(text: str) -> str:
        return task + text.removeprefix(OWN) if text == OWN or text.startswith(f"{OWN}@") else text

    tables = {spec.name: _changed(spec.table, change) for spec in plan.stages}
    tokens = tables["data"]["tokenizer"]["tokens"]
    answers = tokens.index("Work:")
    tokens[answers:answers] = TOKENS.get(task, ())
    return replace(plan, stages=tuple(replace(s, table=tables[s.name]) for s in plan.stages))


def real(part: str | None = None, fast: bool = False, overrides: Sequence[str] = ()) -> Recipe:
    """SmolLM2's recipe or a part of it, the parent in the child's place in "reasoning" alone."""
    alone = part == "reasoning"
    plan = with_defaults(SMOLLM2.read(fast, overrides, "-reasoning" if alone else ""), STAGES)
    folder, names = SMOLLM2.path.parents[1], [spec.name for spec in plan.stages]
    first = names.index(SMOLLM2.reasoning) if SMOLLM2.reasoning in names else len(names)
    kept = names[:first] if part == "search" else names
    if alone:
        kept = [name for name in ("parent", "eval-parent") if name in names] + names[first:]

    def change(text: str) -> str:
        if text.startswith("recipes/") and not Path(text).exists():
            return str(folder / text)
        return "parent" if alone and text == SMOLLM2.child else text

    stages = [replace(s, table=_changed(s.table, change)) for s in plan.stages if s.name in kept]
    return replace(plan, stages=tuple(stages))


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """A table with all of its texts and keys changed."""
    if isinstance(value, dict):
        return {change(key): _changed(one, change) for key, one in value.items()}
    if isinstance(value, list):
        return [_changed(one, change) for one in value]
    return change(value) if isinstance(value, str) else value
