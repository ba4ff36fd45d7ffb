"""What every command has in common: how it fails, how it prints, and the arguments several take."""

from __future__ import annotations

import errno
import functools
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.progress import tell
from tessera.runs.files import advice_on

MODEL = "a run directory, a Hugging Face directory or a hub id"
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only results.")]
Switch = Annotated[
    str | None,
    typer.Option(
        "--switch",
        help="How the model is told to think: none, detailed thinking (the system prompt), "
        "/no_think, or a variable of its chat template. By default the model's own: recorded where "
        "it was trained, or read out of the template.",
    ),
]
TemplateKwargs = Annotated[
    str,
    typer.Option(
        "--chat-template-kwargs", metavar="JSON", help="Further variables of the chat template."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="cuda (ROCm's too), xpu, mps or cpu; without it the accelerator that torch finds.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="bfloat16 or float32; auto: bfloat16 on an accelerator, float32 on a CPU.",
    ),
]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Where run directories are.")]
RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A TOML file with one table a stage.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Instead of what the recipe says, e.g. parent.path=MODEL kd.train.lr=3e-4",
    ),
]

app = typer.Typer(
    name="tessera",
    help="Turns an open Llama-class checkpoint into an efficient reasoning model.",
    epilog="Begin with: tessera run recipes/quickstart.toml. "
    "Exit codes: 0 done, 1 failed, 2 the arguments or files given are wrong, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data = typer.Typer(
    help="Look at training data, or write it, before it is trained on.", no_args_is_help=True
)


def command(name: str | None = None, of: typer.Typer = app) -> Callable[..., Callable[..., None]]:
    """Makes a function a command whose expected errors end in a sentence and an exit code."""
    return lambda function: of.command(name)(_guarded(function))


def _guarded(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt:
            complain("interrupted; what was done is kept, the same command goes on from there")
            raise typer.Exit(130) from None
        except MemoryError:
            complain("error: no memory is left; use smaller batches or a smaller model")
            raise typer.Exit(1) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            complain(f"error: {where}{error.strerror or error}{advice_on(error)}")
            raise typer.Exit(1) from None
        except Exception as error:
            if not type(error).__module__.startswith("tessera."):  # a mistake in tessera
                raise
            complain(f"error: {error}")
            code = getattr(error, "exit_code", 2 if isinstance(error, ValueError) else 1)
            raise typer.Exit(code) from None

    return guarded


def choose(option: str, value: str, *allowed: str) -> None:
    """Refuses a value that an option does not take."""
    if value not in allowed:
        raise typer.BadParameter(f"{option} {value}: give {' or '.join(allowed)}")


@contextmanager
def computing(device: str | None, dtype: str = "auto") -> Iterator[None]:
    """`dist.computing_on` what `--device` says. Refuses it, or a `--dtype`, where there is none."""
    from tessera import dist

    choose("--dtype", dtype, "auto", "float32", "bfloat16")
    with dist.computing_on(device):
        yield


def checked_switch(value: str | None) -> str | None:
    """Refuses a `--switch` that names none."""
    from tessera.data.switch import check_switch

    return None if value is None else check_switch(value)


def template_kwargs(value: str) -> dict[str, Any]:
    """What `--chat-template-kwargs` says."""
    import json

    try:
        found = json.loads(value or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise typer.BadParameter(
            f'--chat-template-kwargs {value}: give a JSON object, as \'{{"date_string": "today"}}\''
        )
    return found


def complain(text: str) -> None:
    tell(text)


class _Output(io.FileIO):
    """Stdout or stderr. What nobody reads is dropped: the work goes on, and has its exit code."""

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EPIPE and self.fileno() != STDERR:
                raise
            return len(data)


STDOUT, STDERR = 1, 2


def open_streams() -> None:
    """Makes stdout and stderr such that a closed one, or a closed pipe, ends no work."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        os.set_inheritable(opened, True)  # else the next file opened would be what is printed to
    os.close(opened)
    for number, name in ((STDOUT, "stdout"), (STDERR, "stderr")):
        stream = getattr(sys, name)
        if stream is None or type(stream) is io.TextIOWrapper:  # a test's capture is neither
            out = io.BufferedWriter(_Output(number, "w", closefd=False))
            encoding = stream.encoding if stream else "utf-8"
            lines = number == STDERR or out.raw.isatty()
            # A mosaic's bars on a Latin-1 terminal are replaced.
            made = io.TextIOWrapper(out, encoding, "replace", line_buffering=lines)
            setattr(sys, name, made)


def print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=1, default=str))
