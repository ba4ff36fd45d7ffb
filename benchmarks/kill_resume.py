"""It must not break: the same command again, after whatever stopped it, gives the same child.

    python benchmarks/kill_resume.py [RECIPE] [--kills 10] [--only killed locked full]

killed   `kill -9` at random moments of the recipe, then the same command again
locked   a second process on the runs of a first refuses, and disturbs nothing
full     the disk fills up while writing (a tmpfs, which takes root), then gets some more space

Each ends with the runs of an undisturbed recipe: every byte of every file, but for times,
process ids and logs, and no file more. The recipe must not measure time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from harness import Command, table

RECIPE = Path(__file__).with_suffix(".toml")


WORKING = re.compile(r"^\[\d+/\d+\] (\S+): (running|going on)", re.MULTILINE)


TIMES = {"started", "finished", "seconds", "cpu_seconds"}


class Broken(Exception):
    """What was promised did not hold."""


@dataclass(frozen=True)
class Bench:
    """The recipe, where it may write, and what an undisturbed run of it gave."""

    recipe: Path
    folder: Path
    undisturbed: dict[str, object]
    seconds: float


def check(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.smoke:
            text = re.sub(r"\bsteps = \d+", "steps = 6", options.recipe.read_text())
            options.recipe = folder / "toy.toml"
            options.recipe.write_text(text.replace("calc = 1500, sort = 500", "calc = 300"))
        begun = time.monotonic()
        finish(options.recipe, folder / "undisturbed")
        seconds = time.monotonic() - begun
        bench = Bench(options.recipe, folder, contents(folder / "undisturbed"), seconds)
        checks: dict[str, Callable[[], str]] = {
            "killed": lambda: killed(bench, options.kills, random.Random(options.seed)),
            "locked": lambda: locked(bench),
            "full": lambda: full(bench, options.grow),
        }
        rows = [{"check": one, "outcome": checks[one]()} for one in options.only]
    table(rows, f"undisturbed: {len(bench.undisturbed)} files in {seconds:.0f} s")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, nargs="?", default=RECIPE)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--grow", type=int, default=1536, help="full: KiB more each time")
    every = ["killed", "locked", "full"]
    parser.add_argument("--only", nargs="+", choices=every, default=every)


def killed(bench: Bench, kills: int, moments: random.Random) -> str:
    """Kills until `kills` have landed; where the recipe got done in between, it begins anew."""
    runs, stages = bench.folder / "killed", []
    while len(stages) < kills:
        pause = moments.uniform(0, 0.4 * bench.seconds)
        process = start(bench.recipe, runs)
        wait_for_work(process, runs)
        try:
            expect(process.wait(pause) == 0, log_of(runs).read_text())
            compare(bench, runs)
            runs = bench.folder / f"killed-{len(stages)}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            stages.append(last_stage(log_of(runs).read_text()))
            print(f"  killed in {stages[-1]} after {pause:.1f} s", file=sys.stderr, flush=True)
    finish(bench.recipe, runs)
    compare(bench, runs)
    return f"{kills} kills ({counted(stages)}); every file as undisturbed"


def locked(bench: Bench) -> str:
    """A second process while the first trains: exit code 2, a sentence that names the first."""
    runs = bench.folder / "locked"
    first = start(bench.recipe, runs)
    wait_for_work(first, runs, after="data")
    second = run(bench.recipe, runs)
    expect(second.returncode == 2, f"the second ended with {second.returncode}:\n{second.stderr}")
    told = f"in use by process {first.pid}" in second.stderr and "Traceback" not in second.stderr
    expect(told, f"the second said:\n{second.stderr}")
    expect(first.wait() == 0, f"the first ended with {first.returncode}")
    compare(bench, runs)
    reason = second.stderr.strip().splitlines()[-1]
    return "the second ended with 2: " + reason.replace(str(runs), "RUNS").replace(
        str(first.pid), "PID"
    )


def full(bench: Bench, grow: int) -> str:
    """A small disk that grows by `grow` KiB whenever the recipe has failed on it."""
    home = bench.folder / "full"
    home.mkdir()
    if not mount(home, "size=64k"):
        return "not done: mounting a tmpfs takes root"
    try:
        stages: list[str] = []
        for size in range(grow, 100 * grow, grow):
            expect(mount(home, f"remount,size={size}k"), "remount failed")
            done = run(bench.recipe, home / "runs")
            if done.returncode == 0:
                break
            clear = "No space left on device" in done.stderr and "Traceback" not in done.stderr
            expect(
                done.returncode == 1 and clear,
                f"exit code {done.returncode}:\n{done.stderr[-2000:]}",
            )
            stages.append(last_stage(done.stderr))
            print(f"  full at {size} KiB in {stages[-1]}", file=sys.stderr, flush=True)
        compare(bench, home / "runs")
    finally:
        subprocess.run(["umount", str(home)], check=False)
    return (
        f"{len(stages)} times full ({counted(stages)}), each with exit code 1 and a sentence; "
        "then every file as undisturbed"
    )


def counted(stages: list[str]) -> str:
    return ", ".join(f"{stages.count(name)} in {name}" for name in dict.fromkeys(stages))


def command(recipe: Path, runs: Path) -> list[str]:
    return [sys.executable, "-m", "tessera", "run", str(recipe), "--runs", str(runs)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(recipe: Path, runs: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(recipe, runs), env=environment(), capture_output=True, text=True, check=False
    )


def finish(recipe: Path, runs: Path) -> None:
    done = run(recipe, runs)
    expect(done.returncode == 0, f"ended with {done.returncode}:\n{done.stderr[-2000:]}")


def log_of(runs: Path) -> Path:
    return runs.with_suffix(".stderr")


def start(recipe: Path, runs: Path) -> subprocess.Popen[bytes]:
    """Begins the recipe; what it says goes to a file beside its runs."""
    with log_of(runs).open("wb") as log:
        return subprocess.Popen(
            command(recipe, runs), env=environment(), stdout=subprocess.DEVNULL, stderr=log
        )


def wait_for_work(process: subprocess.Popen[bytes], runs: Path, after: str = "") -> None:
    """Returns once a stage other than `after` has begun, or the process has ended."""
    while process.poll() is None and last_stage(log_of(runs).read_text()) in ("", after):
        time.sleep(0.01)


def last_stage(said: str) -> str:
    return (WORKING.findall(said) or [("", "")])[-1][0]


def compare(bench: Bench, runs: Path) -> None:
    """Raises Broken naming the files that differ from the undisturbed run's."""
    found, wanted = contents(runs), bench.undisturbed
    differing = sorted(k for k in found.keys() & wanted.keys() if found[k] != wanted[k])
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    expect(
        not (differing or missing or extra),
        f"different: {differing}\nmissing: {missing}\nleft over: {extra}",
    )


def contents(runs: Path) -> dict[str, object]:
    """Every file of the runs under its relative name, without what may differ: times and logs."""
    return {
        str(path.relative_to(runs)): _content(path)
        for path in sorted(runs.rglob("*"))
        if path.is_file() and path.name not in (".lock", "log.txt", "timings.jsonl")
    }


def _content(path: Path) -> object:
    if path.name not in ("run.json", "architecture.json"):
        return path.read_bytes()
    return _without_times(json.loads(path.read_text()))


def _without_times(value: Any) -> Any:
    """Without times at any depth: a manifest also holds when each of its inputs began."""
    if not isinstance(value, dict):
        return value
    return {key: _without_times(one) for key, one in value.items() if key not in TIMES}


def mount(home: Path, options: str) -> bool:
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(home)]
    try:
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def expect(holds: bool, what: str) -> None:
    if not holds:
        raise Broken(what)


if __name__ == "__main__":
    harness.main(__doc__, Command(check, arguments, {"kills": 1, "only": ["killed", "locked"]}))
