"""The words on the command line, turned into calls.

Exit codes: 0 done, 1 failed, 2 the user's words or files are off (the reason on stderr, no
traceback), 130 interrupted. Every import that costs time is inside the command that needs it, so
`tessera --help` answers in well under half a second, without torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tessera.cli.common import MODEL, Json
from tessera.cli.common import complain as _complain
from tessera.cli.common import guarded as _guarded
from tessera.cli.common import print_json as _print_json
from tessera.cli.data import data
from tessera.cli.evaluate import evaluate
from tessera.cli.export import export
from tessera.cli.report import report
from tessera.cli.serve import chat, serve

if TYPE_CHECKING:
    from tessera.data.tokenizer import Tokenizer
    from tessera.runs.plan import Step

app = typer.Typer(
    name="tessera",
    help="Turns an open Llama-class checkpoint into an efficient reasoning model.",
    epilog="Begin with: tessera run recipes/quickstart.toml. "
    "Exit codes: 0 done, 1 failed, 2 the words or files given are off, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Runs = Annotated[Path, typer.Option("--runs", help="Where run directories are.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Instead of what the recipe says, e.g. parent.path=MODEL kd.train.lr=3e-4",
    ),
]
Redo = Annotated[
    list[str] | None,
    typer.Option(
        help="Make this stage's run, and all made from it, anew; each is kept until its own stage "
        "has made another. May be repeated."
    ),
]
RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A TOML file with one table a stage.")
]


app.add_typer(data, name="data")
app.command("eval")(evaluate)
app.command("export")(export)
app.command("serve")(serve)
app.command("chat")(chat)
app.command("report")(report)


def main() -> None:
    """The entry point of the `tessera` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a mosaic's bars on a Latin-1 terminal
    app()


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """A function as a command whose expected errors end in a sentence and an exit code."""
    return app.command()(_guarded(function))


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"tessera {version('tessera')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    pass


@_command
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    only: Annotated[
        list[str] | None, typer.Option(help="Run this stage alone; may be repeated.")
    ] = None,
    redo: Redo = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only results.")] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe: finished stages are skipped, unfinished ones go on where they stopped.

    A recipe that changed under a finished run is refused with a diff; --redo says which to redo.
    """
    from tessera import dist, pipeline
    from tessera.report import show
    from tessera.runs.recipe import load
    from tessera.runs.run import is_done

    plan = load(recipe, overrides or ())
    steps = pipeline.run_recipe(plan, runs, only=only, redo=redo or (), quiet=quiet)
    if not dist.is_main():
        return
    shown = ("table", "frontier")
    compared = [step.path for step in steps if step.stage.gives in shown and is_done(step.path)]
    tables = show.tables(compared[-1]) if compared else {}
    if as_json:
        _print_json({"runs": [str(step.path) for step in steps], "tables": tables})
        return
    for name, rows in tables.items():
        print(f"{show.render_named(name, rows)}\n")
    _complain(
        f"The runs are in {runs / plan.name}; look at one with: tessera show {steps[-1].path}"
    )


@_command
def quickstart(
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    fast: Annotated[
        bool, typer.Option("--fast", help="Less of everything: the path in 2 to 5 minutes.")
    ] = False,
    task: Annotated[
        str, typer.Option(help="The problems: calc (arithmetic) or hop (a chain of lookups).")
    ] = "calc",
    redo: Redo = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the table.")] = False,
    as_json: Json = False,
) -> None:
    """Run the whole path on a toy, in minutes on a CPU, and print what came of it.

    Ctrl-C and the same command again: it goes on.
    """
    from tessera import pipeline
    from tessera.cli import quickstart as shown
    from tessera.table import terminal_width

    plan = shown.recipe(task, fast, overrides or ())
    shown.use_one_thread()
    pipeline.run_recipe(plan, runs, redo=redo or (), quiet=quiet)
    home = runs / plan.name
    rows, page = shown.table(home), shown.write_report(home)
    if as_json:
        _print_json(rows)
        return
    print(f"\n{shown.rendered(rows, terminal_width())}\n")
    next_steps = shown.next_steps(home, task)
    _complain(f"The report is {page}, everything else in {home}. Next:\n{next_steps}")


@_command
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Resolve a recipe and say what running it would do; runs nothing.

    What it prints is a recipe too, every default spelled out.
    """
    from tessera import pipeline, planning
    from tessera.runs import plan as resolve
    from tessera.runs.recipe import load

    steps = resolve.plan(load(recipe, overrides or ()), runs, (), pipeline.STAGES)
    if as_json:
        needs = [planning.stage_memory(step, steps) for step in steps]
        memory = [needed.as_json() if needed else None for needed in needs]
        more = [
            {"memory": one, "warnings": s.warnings(steps)}
            for s, one in zip(steps, memory, strict=True)
        ]
        _print_json([{**_step_values(s), **one} for s, one in zip(steps, more, strict=True)])
        return
    for step in steps:
        print(f"# {step.name}: {_what_would_happen(step)}")
        if counted := _num_params(step):
            print(f"# {counted:,} parameters in {step.files['path']}")
        if needed := planning.stage_memory(step, steps):
            print(f"# {needed}")
        for note in step.notes():
            print(f"# {note}")
        for warning in step.warnings(steps):
            print(f"# WARNING: {warning}")
        print(resolve.table_text(step))


def _step_values(step: Step) -> dict[str, Any]:
    values = {"name": step.name, "stage": step.stage.name, "action": step.action}
    inputs = {"inputs": step.inputs, "config": step.resolved}
    return {**values, **inputs, "num_params": _num_params(step)}


def _what_would_happen(step: Step) -> str:
    from tessera.runs.plan import explain_change

    if step.action == "changed":
        return "the recipe has changed under this run\n# " + explain_change(step).replace(
            "\n", "\n# "
        )
    return {
        "run": "would run",
        "resume": "would go on",
        "skip": "is done",
        "redo": "would be redone",
    }[step.action]


def _num_params(step: Step) -> int | None:
    """Parameters of the checkpoint that a stage imports, where it can be read here."""
    from tessera.model.source import model_config

    path = step.files.get("path")
    if step.stage.name != "parent" or not isinstance(path, Path):
        return None
    return model_config(path).num_params()


@_command
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
    """Say what a recipe's trainings take on a cluster: memory by part, layout, time; runs nothing.

    Times are a roofline of data sheets: a bound to compare by, not a promise.
    """
    from tessera import pipeline, planning
    from tessera.model.source import model_config
    from tessera.planning import parent_of, parse_cluster
    from tessera.runs.plan import with_defaults
    from tessera.runs.recipe import load

    machines = parse_cluster(cluster, network * 1e9 / 8)
    read = with_defaults(load(recipe, overrides or ()), pipeline.STAGES)
    parent = parent_of(read, config)
    jobs = planning.jobs(read, pipeline.STAGES, parent, model_config(child) if child else None)
    plans = [planning.best(job, machines) for job in jobs]
    if as_json:
        _print_json([found.as_json() for found in plans])
        return
    print("\n\n".join(planning.render_plan(plan, price) for plan in plans))
    if others := planning.unplanned(read):
        _complain(f"no plan is made of {', '.join(others)}")


@_command
def show(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="A run, a recipe's runs, a model directory or a config.json."
        ),
    ],
    samples: Annotated[
        bool, typer.Option("--samples", help="What a policy wrote, best and worst, and its worth.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print the mosaic, parameters, KV bytes a token, lineage and tables."""
    from tessera.report import show as view
    from tessera.runs.files import RunError

    if samples:
        rows = view.samples(path)
        if as_json:
            _print_json(rows)
        else:
            print(view.render_samples(rows))
        return
    found = view.describe(path)
    if as_json:
        _print_json(found)
        return
    try:
        config = None if "runs" in found else view.model_config(path)
    except RunError:
        config = None
    print(view.render(found, config))


@_command
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run or a model directory.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    as_json: Json = False,
) -> None:
    """Print where two architectures differ, layer by layer, and by how much in size and cost."""
    from tessera.report import explain

    found = explain.diff(a, b)
    if as_json:
        _print_json(found)
    else:
        print(explain.render_diff(found))


@_command
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token every time.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this mass.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    thinking: Annotated[
        str | None,
        typer.Option(help="on or off: ask through the model's chat template, the switch said."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the text a model goes on with after a prompt, or its answer to a question."""
    from tessera.data.tokenizer import load_tokenizer
    from tessera.generate.engine import SamplingParams
    from tessera.generate.torch_engine import TorchEngine
    from tessera.model.checkpoint import load_model
    from tessera.model.source import resolve

    tokenizer = load_tokenizer(resolve(model))
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_token_ids=tokenizer.eos_ids,
        seed=seed,
    )
    if thinking is None:
        ids = tokenizer.encode(prompt, bos=True)
    else:
        ids = _asked(tokenizer, prompt, thinking)
    completion = TorchEngine(load_model(model, frozen=True)).generate([ids], params)[0][0]
    # Decoded together: a SentencePiece text's first space belongs to what stands before it.
    before = prompt if thinking is None else tokenizer.decode(ids)
    text = tokenizer.decode([*ids, *completion.token_ids]).removeprefix(before)
    if as_json:
        tokens = {"token_ids": completion.token_ids, "logprobs": completion.logprobs}
        _print_json(
            {"prompt": prompt, "text": text, "finish_reason": completion.finish_reason, **tokens}
        )
    else:
        print(prompt + text if thinking is None else text)


def _asked(tokenizer: Tokenizer, question: str, thinking: str) -> list[int]:
    """The ids that ask a question through the chat template."""
    from tessera.data.chat import ChatEncoder

    if thinking not in ("on", "off"):
        raise typer.BadParameter(f"--thinking {thinking}: give on or off")
    messages = [{"role": "user", "content": question}]
    return ChatEncoder.of(tokenizer).prompt(messages, thinking)  # type: ignore[arg-type]
