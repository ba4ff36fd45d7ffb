"""`tessera eval`: what a model can do, with reasoning on and off."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.cli.common import MODEL, Json, complain, guarded, print_json

TASKS = (
    "gsm8k, math500, aime24, gpqa, ifeval, humaneval, mbpp, bfcl_live, bfcl_multi_turn, mt_bench, "
    "arena_hard, judgebench, perplexity, needle@4096, calc@6, gym/NAME and more; several with "
    "commas."
)


@guarded
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help=f"{MODEL}; with --endpoint, its name there.")
    ],
    task: Annotated[list[str], typer.Option(help=TASKS)],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[TASK=]PLACE",
            help="A directory of the tasks' files, a file, a dataset of the hub "
            '(ID[:SUBSET[:SPLIT]]), or "hub" for the task\'s own; may be repeated.',
        ),
    ] = None,
    thinking: Annotated[str, typer.Option(help="on, off or both.")] = "both",
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many items.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Of each item, reasoning on.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="Reasoning on; off is greedy.")] = 0.6,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Reasoning on.")] = 0.95,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer; 32,768 for benchmarks.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask this server: http://…/v1.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="MODEL@URL", help="Who judges mt_bench and arena_hard.")
    ] = None,
    key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="The API key of endpoint and judge.")
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where answers and verdicts are kept.")
    ] = Path("runs/eval"),
    rescore: Annotated[
        bool, typer.Option("--rescore", help="Judge the kept answers anew.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the table.")] = False,
    as_json: Json = False,
) -> None:
    """Ask a model the tasks' questions and print accuracy, tokens and obedience of each mode.

    The same command again asks only what is missing; more samples or items add to what is there.
    """
    from tessera.eval.evaluate import EvalConfig, evaluate
    from tessera.model.source import resolve
    from tessera.runs.files import Lock
    from tessera.runs.recipe import validate
    from tessera.table import VIEWS, render_table, terminal_width

    table: dict[str, Any] = {
        "tasks": [name for words in task for name in words.split(",") if name],
        "data": _places(data or []),
        "thinking": thinking,
        "limit": limit,
        "max_tokens": max_tokens,
        "on": {"temperature": temperature, "top_p": top_p, "samples": samples},
    }
    if endpoint:
        table["endpoint"] = {"url": endpoint, "model": model, "key_file": key_file}
    if judge:
        name, _, url = judge.rpartition("@")
        table["judge"] = {"url": url, "model": name, "key_file": key_file}
    config = validate(EvalConfig, table, "eval")
    folder = out / Path(model).name
    lock = Lock(folder)
    try:
        if rescore:
            (folder / "verdicts.jsonl").unlink(missing_ok=True)
        home = None if endpoint else resolve(model)
        rows, groups = evaluate(config, folder, home, seed, quiet=quiet)
    finally:
        lock.release()
    if as_json:
        print_json({"eval": rows, "groups": groups})
        return
    for name, found in (("eval", rows), ("eval_groups", groups)):
        if found:
            print(f"{render_table(found, None, VIEWS[name], terminal_width())}\n")
    complain(f"The answers are in {folder / 'records.jsonl'}, what was found in verdicts.jsonl")


def _places(words: list[str]) -> dict[str, str] | str:
    """One place for all, or one for each task that is named. `TASK=` is told by a known name."""
    apart = dict(word.split("=", 1) for word in words if "=" in word)
    whole = [word for word in words if "=" not in word]
    if len(whole) > 1 or (whole and apart):
        raise typer.BadParameter("--data: one place for all tasks, or TASK=PLACE for each")
    return whole[0] if whole else apart or ""
