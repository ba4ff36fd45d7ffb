"""`tessera serve` and `tessera chat`: a model for other programs, and for a person."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from tessera.cli.common import MODEL, complain, guarded


@guarded
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    host: Annotated[str, typer.Option(help="Where to listen; others need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any.")] = 8000,
    engine: Annotated[
        str, typer.Option(help="torch, or vllm for an exported directory.")
    ] = "torch",
    name: Annotated[str, typer.Option(help="What clients call it; the directory's name.")] = "",
    key_file: Annotated[
        str, typer.Option(metavar="FILE", help="API keys, one a line; or TESSERA_API_KEY.")
    ] = "",
    batch: Annotated[int, typer.Option(min=1, help="Samples decoded together.")] = 32,
    queue: Annotated[int, typer.Option(min=1, help="Samples that may wait; then 429.")] = 256,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds of a request.")] = 600.0,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="What requests have left after SIGTERM.")
    ] = 30.0,
    max_body_kib: Annotated[int, typer.Option(min=1, help="Of a request.")] = 1024,
    prefix_cache: Annotated[
        int, typer.Option(min=0, help="Tokens of prompts kept for those that begin alike.")
    ] = 0,
    int8: Annotated[bool, typer.Option("--int8", help="Weights in int8, on a CPU.")] = False,
    web: Annotated[bool, typer.Option("--web", help="A page to chat on, at /.")] = False,
) -> None:
    """Serve a model with the OpenAI API: /v1/chat/completions, /v1/completions, /v1/models.

    The switch is said by the system prompt `detailed thinking on`, by reasoning_effort, by
    chat_template_kwargs.enable_thinking or by /no_think. Loopback alone unless a key is given.
    """
    settings = {
        "host": host,
        "port": port,
        "name": name,
        "key_file": key_file,
        "batch": batch,
        "queue": queue,
        "timeout": timeout,
        "drain_seconds": drain_seconds,
        "max_body_kib": max_body_kib,
        "prefix_cache": prefix_cache,
        "int8": int8,
        "web": web,
    }
    _served(model, engine, settings)


def _served(model: str, engine: str, settings: dict[str, Any]) -> None:
    if engine not in ("torch", "vllm"):
        raise typer.BadParameter(f"--engine {engine}: give torch or vllm")
    api = _api()
    config = api.ServeConfig(**settings)
    if engine == "torch":
        api.serve(model, config)
        return
    from tessera.serve.vllm import command

    found = command(model, config)
    if found.note:
        complain(found.note)
    complain(" ".join(found.arguments))
    os.execvpe(found.arguments[0], found.arguments, {**os.environ, **found.environment})


def _api() -> Any:
    """The server's module. Raises ModuleNotFoundError's counterpart that names the extra."""
    try:
        from tessera.serve import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in (
            "fastapi",
            "uvicorn",
            "starlette",
            "prometheus_client",
        ):
            raise typer.BadParameter(
                f"serving needs {error.name}, which is not installed: pip install 'tessera[serve]'"
            ) from None
        raise
    return app


@guarded
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    thinking: Annotated[str, typer.Option(help="on or off, to begin with.")] = "on",
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 2048,
    thinking_budget: Annotated[
        int | None, typer.Option(min=0, help="Tokens after which a thought is closed.")
    ] = None,
    web: Annotated[bool, typer.Option("--web", help="A page, on and off side by side.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page.")] = 8000,
) -> None:
    """Talk to a model, in the terminal or with --web on a page of this machine."""
    if web:
        _served(model, "torch", {"port": port, "web": True})
        return
    if thinking not in ("on", "off"):
        raise typer.BadParameter(f"--thinking {thinking}: give on or off")
    from tessera.serve import chat as terminal

    terminal.chat(model, thinking, max_tokens, thinking_budget)  # type: ignore[arg-type]
