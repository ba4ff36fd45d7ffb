"""Every benchmark runs at toy size: it ends well and prints tables with rows."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = {path.stem: path for path in sorted(FOLDER.glob("*.py")) if path.stem != "harness"}


def _commands(path: Path) -> list[str]:
    """The keys of a script's `harness.main(__doc__, {...})`; one "" where it has one command."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "harness.main":
            (_, commands) = node.args
            if isinstance(commands, ast.Dict):
                return [ast.literal_eval(key) for key in commands.keys if key]
            return [""]
    raise AssertionError(f"{path} does not run harness.main")


# The ablations of the puzzle begin from its frontier: one process runs both.
RUNS = [
    (name, command)
    for name, path in SCRIPTS.items()
    for command in ([""] if name == "puzzle" else _commands(path))
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "command"), RUNS, ids=lambda one: one or "all")
def test_a_benchmark_runs_at_toy_size(name: str, command: str, tmp_path: Path):
    told = tmp_path / "told.json"
    words = [sys.executable, str(SCRIPTS[name]), *filter(None, [command]), "--smoke"]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, "--json", str(told)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    missing = re.search(r"^skipped: (.*)", done.stdout, re.MULTILINE)
    if missing:
        pytest.skip(missing[1])
    assert told.is_file()
    assert re.search(r"^\|[-:|]+\|\n\| .+ \|$", done.stdout, re.MULTILINE), done.stdout


def test_every_command_is_in_its_scripts_docstring():
    for name, path in SCRIPTS.items():
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        for command in _commands(path):
            assert f"benchmarks/{name}.py {command}".strip() in doc, (name, command)
