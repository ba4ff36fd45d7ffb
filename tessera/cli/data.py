"""`tessera data …`: looking at training data, and writing it, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tessera.cli.common import MODEL, Json, complain, guarded, print_json

if TYPE_CHECKING:
    from tessera.data.chat import Document

data = typer.Typer(help="Look at training data before it is trained on.", no_args_is_help=True)


@data.command("audit")
@guarded
def audit_data(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Chats: .jsonl, .json or .parquet, any dialect.")
    ],
    tokenizer: Annotated[str, typer.Option(metavar="MODEL", help=f"Whose to take: {MODEL}.")],
    row: Annotated[
        list[int] | None, typer.Option(min=1, help="Print this row; may be repeated.")
    ] = None,
    turns: Annotated[str, typer.Option(help="Train all answers of a chat, or the last.")] = "all",
    switch: Annotated[
        str,
        typer.Option(help='"detailed thinking", "/no_think" or a variable of the template.'),
    ] = "detailed thinking",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")] = None,
    as_json: Json = False,
) -> None:
    """Check which tokens of a set of chats are trained, and print rows with those in colour.

    Exits with 1 where a check fails or a row is refused. Without --row the first row is printed.
    """
    from tessera.data import audit
    from tessera.data.chat import ChatEncoder
    from tessera.data.tokenizer import load_tokenizer
    from tessera.model.source import resolve

    if turns not in ("all", "last"):
        raise typer.BadParameter(f'--turns {turns}: give "all" or "last"')
    home = Path(tokenizer) if Path(tokenizer).exists() else resolve(tokenizer)
    encoder = ChatEncoder.of(load_tokenizer(home), turns, switch)  # type: ignore[arg-type]
    kept: dict[int, list[Document] | str] = {}

    def keep(number: int, documents: list[Document] | str) -> None:
        if number in (row or [1]):
            kept[number] = documents

    report = audit.audit(file, encoder, limit, keep)
    if absent := sorted(set(row or ()) - set(kept)):
        raise typer.BadParameter(f"--row {absent[0]}: {file} has no such row among those read")
    if as_json:
        print_json(report.as_json())
    else:
        audit.print_rows(kept, encoder)
        print("\n".join(report.lines()))
    if not report.clean:
        raise typer.Exit(1)


@data.command("curate")
@guarded
def curate_data(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A recipe with tables of stage curate.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE …]", help="e.g. curate.max_bad=0.1")
    ] = None,
    runs: Annotated[Path, typer.Option(metavar="DIR", help="Where runs are kept.")] = Path("runs"),
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only results.")] = False,
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
        where = step.path / "chats", step.path / "removed"
        complain("The rows are in {}, what was left out in {}".format(*where))


@data.command("tasks")
@guarded
def write_tasks(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="calc, hop, sort, compare or gym/NAME.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .jsonl file to write.")],
    count: Annotated[int, typer.Option(min=1, help="Problems; each gives two rows.")] = 1000,
    split: Annotated[str, typer.Option(help="train or heldout: no question is in both.")] = "train",
    level: Annotated[int | None, typer.Option(min=1, help="One difficulty, not all.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    dialect: Annotated[
        str, typer.Option(help="nemotron, nemotron-rendered, openai, sharegpt or alpaca.")
    ] = "nemotron",
) -> None:
    """Write problems with answers as rows of chats, with the thought and without it."""
    from tessera.data.dialects import write_rows
    from tessera.data.problems import problem_rows

    if split not in ("train", "heldout"):
        raise typer.BadParameter(f'--split {split}: give "train" or "heldout"')
    chats = problem_rows(name, count, seed, split, level)  # type: ignore[arg-type]
    complain(f"{write_rows(out, chats, dialect):,} rows in {out}")
