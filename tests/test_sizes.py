"""Functions of at most 80 lines: what is longer does two things."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [p for folder in ("tessera", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))]


def test_no_function_is_over_80_lines():
    long = {
        f"{file.relative_to(ROOT)}:{node.name}": size
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (size := (node.end_lineno or 0) - node.lineno + 1) > 80
    }
    assert long == {}
