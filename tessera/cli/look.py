"""Commands that look at what is there: show, verify, diff, report, judge, data audit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tessera.cli.common import (
    MODEL,
    Json,
    Switch,
    checked_switch,
    choose,
    command,
    complain,
    data,
    print_json,
)

if TYPE_CHECKING:
    from tessera.data.chat import Document


@command()
def show(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A run, a recipe's runs, a model directory, a config.json, or the answers that "
            "`tessera eval` keeps.",
        ),
    ],
    samples: Annotated[
        bool,
        typer.Option(
            "--samples",
            help="A policy's best and worst samples, the answers of an eval or a profile, with "
            "what was found of each.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Print the mosaic, parameters, KV bytes a token, lineage and tables."""
    from tessera.model.config import ConfigError
    from tessera.report import show as view
    from tessera.runs.files import RunError

    if samples or (view.answers_of(path) and not (path / "run.json").is_file()):
        rows = view.samples(path)
        print_json(rows) if as_json else print(view.render_samples(rows))
        return
    found = view.describe(path)
    if as_json:
        print_json(found)
        return
    try:
        config = None if "runs" in found else view.model_config(path)
    except (RunError, ConfigError):  # of a damaged config.json, which `found` tells
        config = None
    print(view.render(found, config))


@command()
def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A run, or a recipe's runs.")],
    as_json: Json = False,
) -> None:
    """Read every file of finished runs and compare its checksum with the one in the manifest.

    Exits with 1 where a file is damaged, missing or new, and where a run cannot be verified.
    """
    from tessera.runs import run as runs
    from tessera.runs.files import RunError

    found: dict[str, list[str]] = {}
    for one in [path] if (path / "run.json").exists() else runs.runs_in(path) or [path]:
        try:
            found[str(one)] = runs.verify(one)
        except RunError as error:
            found[str(one)] = [str(error)]
    if as_json:
        print_json(found)
    else:
        for name, problems in found.items():
            print("\n".join(problems) or f"{name}: every file is as it was when the run ended")
    if any(found.values()):
        raise typer.Exit(1)


@command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run or a model directory.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    as_json: Json = False,
) -> None:
    """Print where two architectures differ, layer by layer, and by how much in size and cost."""
    from tessera.report import explain

    found = explain.diff(a, b)
    print_json(found) if as_json else print(explain.render_diff(found))


@command()
def report(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A recipe's runs, or one run of them.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the page goes; - for stdout.")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Markdown without drawings, on stdout.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write one HTML page of everything the runs found; it needs no network and no script.

    By default PATH/report.html; of one run, report-NAME.html beside it: a finished run never
    changes.
    """
    from tessera.report import page
    from tessera.runs.files import atomic_write

    runs, found = page.sections(path)
    for problem in dict.fromkeys(runs.problems):
        complain(problem)
    name = path.resolve().name
    done = sum(run.manifest.status == "done" for run in runs.all)
    summary = f"{done} of {len(runs.all)} stages done; begun {runs.all[0].manifest.started[:10]}."
    if as_json:
        print_json({"path": str(path), "sections": page.plain(found)})
        return
    if markdown:
        text, out = page.markdown(name, summary, found), out or Path("-")
    else:
        text = page.html(name, summary, found)
        single = (path / "run.json").is_file()
        out = out or (path.parent / f"report-{name}.html" if single else path / "report.html")
    if str(out) == "-":
        print(text, end="")
        return
    atomic_write(out, text)
    complain(f"The report is {out} ({len(text.encode()) / 1000:,.0f} kB)")


@command()
def judge(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON lines; - for stdin.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes that judge.")] = 2,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON for each row, as it is judged.")
    ] = False,
) -> None:
    """Say which answers of a file are right, by the checkers of rewards and evaluation, and why.

    A row has `kind`, `answer` and what the kind judges by:

    math, number, exact, equal, choice, format: `gold`. code: `tests`, with `entry_point` where they
    only define check(candidate), or `inputs` and `outputs`. instructions (IFEval):
    `instruction_id_list` and `kwargs`. `want`, a verdict, is compared with the one found.

    A verdict is right, wrong or could-not-judge (an unreadable gold, tests that test nothing, a
    machine too busy to tell). An example of a row:

    {"kind": "math", "answer": "So it is \\\\boxed{8/3}.", "gold": "2 2/3"}
    """
    import json
    import sys

    from tessera.rl import graded
    from tessera.table import render_table, terminal_width

    stream = sys.stdin if str(file) == "-" else file.open(encoding="utf-8", errors="replace")
    with stream:
        rows = graded.read_rows(stream)
    found = []
    for row, outcome in graded.judged(rows, workers):
        found.append((row, outcome))
        if as_json:
            want = {"want": row.want} if row.want else {}
            line = {"line": row.line, "kind": row.kind, "verdict": outcome.verdict, **want}
            print(json.dumps(line | {"score": outcome.score, "reason": outcome.reason}), flush=True)
    if not as_json:
        print(render_table([graded.shown(*one) for one in found], width=terminal_width()))
        print(f"\n{graded.summary(found)}")


@command("audit", data)
def audit_data(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Chats or preference rows in any dialect, JSON or Parquet.",
        ),
    ],
    tokenizer: Annotated[str, typer.Option(metavar="MODEL", help=f"Whose to take: {MODEL}.")],
    row: Annotated[
        list[int] | None, typer.Option(min=1, help="Print this row; may be repeated.")
    ] = None,
    turns: Annotated[str, typer.Option(help="Train all answers of a chat, or the last.")] = "all",
    switch: Switch = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")] = None,
    pairs: Annotated[
        bool | None,
        typer.Option("--pairs/--chats", help="What the rows are; by default what their keys say."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check which tokens of a set of chats are trained, and print rows with those in colour.

    Exits with 1 where a check fails or a row is refused. Without --row the first row is printed.
    """
    from tessera.data import audit
    from tessera.data.chat import ChatEncoder
    from tessera.data.tokenizer import load_tokenizer
    from tessera.model.source import resolve

    choose("--turns", turns, "all", "last")
    home = Path(tokenizer) if Path(tokenizer).exists() else resolve(tokenizer)
    encoder = ChatEncoder.of(load_tokenizer(home), turns, checked_switch(switch))  # type: ignore[arg-type]
    kept: dict[int, list[Document] | str] = {}

    def keep(number: int, documents: list[Document] | str) -> None:
        if number in (row or [1]):
            kept[number] = documents

    found = audit.audit(file, encoder, limit, keep, pairs)
    if absent := sorted(set(row or ()) - set(kept)):
        raise typer.BadParameter(f"--row {absent[0]}: {file} has no such row among those read")
    if as_json:
        print_json(found.as_json())
    else:
        audit.print_rows(kept, encoder)
        print("\n".join(found.lines()))
    if not found.clean:
        raise typer.Exit(1)
