"""`tessera report`: what came of a recipe's runs, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tessera.cli.common import Json, complain, guarded, print_json


@guarded
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
    from tessera.report.page import markdown as as_markdown
    from tessera.runs.files import atomic_write

    runs, found = page.sections(path)
    name = path.resolve().name
    done = sum(run.manifest.status == "done" for run in runs.all)
    told = f"{done} of {len(runs.all)} stages done; begun {runs.all[0].manifest.started[:10]}."
    if as_json:
        print_json({"path": str(path), "sections": page.plain(found)})
        return
    if markdown:
        text = as_markdown(name, told, found)
    else:
        text = page.html(name, told, found)
        single = (path / "run.json").is_file()
        out = out or (path.parent / f"report-{name}.html" if single else path / "report.html")
    if out is None or str(out) == "-":
        print(text, end="")
        return
    atomic_write(out, text)
    complain(f"The report is {out} ({len(text.encode()) / 1000:,.0f} kB)")
