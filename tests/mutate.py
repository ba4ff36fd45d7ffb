"""Mutation testing of the formulas, by mutmut: `make mutate`, or `python tests/mutate.py -h`.

One-line errors are put into the files of `[tool.mutmut]` in pyproject.toml, each into a copy of the
tree in build/mutate, and the tests that reach the changed function run on it. A sample of them, of
a fixed seed and in every file a share of its own, must be noticed. Texts of errors are left as they
are, and so are stages, which read and write files: neither is a formula.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "build" / "mutate"
LEAST = 0.9  # of the sample
# mutmut passes decorated functions by; these are applied behind the function instead.
WRAPPERS = ("torch.no_grad()", "classmethod", "property")
STAGES = ("stage", "sft", "cpt", "pretrain", "rpo")
SURVIVED = (0, 33)  # mutmut's exit codes: the tests pass; no test reaches it


def prepared(source: str) -> str:
    """The source as mutmut is to see it; it means the same."""
    lines = source.split("\n")
    for node in sorted(ast.walk(ast.parse(source)), key=lambda n: -getattr(n, "lineno", 0)):
        if isinstance(node, ast.Raise):
            for number in range(node.lineno - 1, node.end_lineno or 0):
                lines[number] += "  # pragma: no mutate"
        if not isinstance(node, ast.FunctionDef):
            continue
        words = [ast.unparse(one) for one in node.decorator_list]
        if node.name in STAGES and not node.col_offset:
            lines[node.lineno - 1] += "  # pragma: no mutate block"
        elif words and set(words) <= set(WRAPPERS):
            for one in node.decorator_list:
                lines[one.lineno - 1] = ""
            wrapped = "(".join([*words, node.name]) + ")" * len(words)
            lines.insert(node.end_lineno or 0, f"{' ' * node.col_offset}{node.name} = {wrapped}")
    return "\n".join(lines)


def prepare(paths: list[str]) -> None:
    shutil.rmtree(PLACE, ignore_errors=True)
    for folder in ("tessera", "tests", "benchmarks", "recipes"):
        shutil.copytree(ROOT / folder, PLACE / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, PLACE)
    for path in paths:
        (PLACE / path).write_text(prepared((ROOT / path).read_text(encoding="utf-8")), "utf-8")


def mutmut(*words: str, needed: bool = True) -> str:
    command = [sys.executable, "-m", "mutmut", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)  # the copy is what runs
    done = subprocess.run(command, cwd=PLACE, env=environment, capture_output=True, text=True)
    if done.returncode and needed:
        sys.exit(done.stdout[-4000:] + done.stderr[-4000:])
    return done.stdout


def known(path: str) -> dict[str, int | None]:
    """Exit code of each mutant of a file, None where it did not run."""
    file = PLACE / "mutants" / f"{path}.meta"
    return json.loads(file.read_text(encoding="utf-8"))["exit_code_by_key"] if file.exists() else {}


def sample(paths: list[str], count: int, seed: int) -> dict[str, list[str]]:
    mutants = {path: sorted(known(path)) for path in paths}
    total = sum(map(len, mutants.values()))
    return {
        path: random.Random(f"{seed} {path}").sample(own, round(count * len(own) / total))
        for path, own in mutants.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=250, help="mutants in the sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a part of the files' names")
    parser.add_argument("--processes", type=int, default=1)
    given, started = parser.parse_args(), time.monotonic()
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mutmut"]
    paths = [path for path in config["source_paths"] if given.only in path]
    prepare(config["source_paths"])
    # Makes the mutants, and learns which tests reach them; there is none of that name to run.
    mutmut("run", "--max-children", "1", "none", needed=False)
    chosen = sample(paths, given.count, given.seed)
    names = [name for own in chosen.values() for name in own]
    mutmut("run", "--max-children", str(given.processes), *names)
    left = []
    print("| file | mutants | sampled | killed |\n|---|--:|--:|--:|")
    for path, own in chosen.items():
        codes = known(path)
        lived = [name for name in own if codes[name] in SURVIVED]
        print(f"| {path} | {len(codes)} | {len(own)} | {len(own) - len(lived)} |", flush=True)
        left += lived
    score = 1 - len(left) / len(names)
    for name in left:
        shown = mutmut("show", name).split("\n")
        print(f"\n{name}", *(line for line in shown if line[:2] in ("- ", "+ ")), sep="\n")
    minutes = (time.monotonic() - started) / 60
    print(f"\n{len(names) - len(left)} of {len(names)}: {score:.1%}, in {minutes:.0f} minutes")
    sys.exit(score < LEAST)


if __name__ == "__main__":
    main()
