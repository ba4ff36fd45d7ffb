"""The `tessera` command."""

from __future__ import annotations

from typing import Annotated

import typer

import tessera.cli.run  # noqa: F401  (its commands are first in the help)
from tessera.cli import look, use  # noqa: F401
from tessera.cli.common import app, data, open_streams

app.add_typer(data, name="data")


def main() -> None:
    """The entry point of the `tessera` command."""
    open_streams()
    app()


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
