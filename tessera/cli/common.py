"""What every command has in common: how it fails, how it speaks, and words that return.

Exit codes: 0 done, 1 failed, 2 the user's words or files are off (the reason on stderr, no
traceback), 130 interrupted.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from tessera.runs.files import advice_on

MODEL = "a run directory, a Hugging Face directory or a hub id"
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def _exit_code(error: Exception) -> int | None:
    """The code for an error that tessera raised on purpose; None for a mistake in tessera."""
    if not type(error).__module__.startswith("tessera."):
        return None
    return getattr(error, "exit_code", 2 if isinstance(error, ValueError) else 1)


def guarded(function: Callable[..., None]) -> Callable[..., None]:

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt:
            complain("interrupted; what was done is kept, the same command goes on from there")
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader, `head` say, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:
            complain(f"error: {_told(error)}")
            raise typer.Exit(1) from None
        except Exception as error:
            code = _exit_code(error)
            if code is None:
                raise
            complain(f"error: {error}")
            raise typer.Exit(code) from None

    return guarded


def _told(error: OSError) -> str:
    """The system's words without its number, and what to do about a full disk."""
    said = error.strerror or str(error)
    where = f"{error.filename}: " if error.filename else ""
    return where + said + advice_on(error)


def complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=1, default=str))
