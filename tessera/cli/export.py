"""`tessera export`: a model as a directory that other software loads, and who can load it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tessera.cli.common import MODEL, Json, guarded, print_json


@guarded
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="[OUT]",
            help="The directory to write; left out, nothing is written and every engine is told "
            "of: what it loads, or which layers it refuses.",
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            help="decilm (any mixture of layers, for vLLM), gguf (for llama.cpp), hf (stock "
            "Llama, Mistral or Qwen, for models whose layers are all equal), padded (any mixture "
            "as a plain Llama, with zeros), puzzletron or megatron (NVIDIA's tools), per_layer "
            "(transformers' per_layer_config, which nothing runs yet)."
        ),
    ] = "decilm",
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="Refuse unless this engine can load it, instead of the one the format is for; "
            "may be repeated. vllm, vllm-cpu, vllm-plugin, llama.cpp, sglang or "
            "transformers."
        ),
    ] = None,
    fp8: Annotated[
        bool,
        typer.Option("--fp8", help="Round the projections to FP8 (decilm, hf and padded)."),
    ] = False,
    check: Annotated[bool, typer.Option(help="Read it back and compare with the source.")] = True,
    as_json: Json = False,
) -> None:
    """Write a model as a directory that stock serving engines load, or say which would."""
    if out is None:
        _tell(model, as_json)
        return
    from tessera.export.write import export_model

    quantize = "fp8" if fp8 else None
    report = export_model(model, out, format, check=check, engines=engine, quantize=quantize)
    if as_json:
        print_json(report.as_json())
    else:
        print("\n".join(report.lines()))


def _tell(model: str, as_json: bool) -> None:
    """Who can load a model, in which format, and what stands against it."""
    from tessera.export.engines import ENGINES, FORMATS, format_refusals, refusals
    from tessera.model.source import load_config, resolve

    config = load_config(resolve(model))
    formats = {form: format_refusals(config, form) for form in FORMATS}
    engines = {engine: refusals(config, engine) for engine in ENGINES}
    if as_json:
        print_json({"engines": engines, "formats": formats})
        return
    for title, found in (
        ("engines", {ENGINES[engine]: why for engine, why in engines.items()}),
        ("formats", formats),
    ):
        print(title)
        for name, reasons in found.items():
            print(f"  {name}: {'; '.join(reasons) or 'yes'}")
