"""Stages compute on the accelerator: they run on a device that refuses tensors left on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "tests" / "pretend.toml"
# Those that build or write models without computing.
STILL = {"data", "data-chat", "cost", "search", "search-attention", "child", "child-attention"}
STILL |= {"merge"}


def fresh(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_stage_computes_on_the_device(tmp_path: Path):
    done = fresh("-m", "tests.there", str(RECIPE), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert sum(" " not in name for name in counts) == RECIPE.read_text().count("\n[") + 1
    assert {name for name, count in counts.items() if not count} <= STILL


def test_what_a_device_refuses_is_refused_in_threads_too():
    done = fresh(
        "-c",
        "import threading, torch; from tests.pretend import device, pretended; there = device()\n"
        "mistakes = [lambda: torch.ones(3, device=there) + torch.ones(3),\n"
        "    lambda: torch.ones(3, device=there).numpy(),\n"
        "    lambda: torch.ones(3, device=there).double(),\n"
        "    lambda: torch.empty(3, device=there).normal_(generator=torch.Generator())]\n"
        "with pretended(float64=False):\n"
        "    for one in mistakes:\n"
        "        thread = threading.Thread(target=one); thread.start(); thread.join()",
    )
    for told in (
        "PlacementError: aten::add got a CPU tensor (3,)",
        "TypeError: numpy cannot see a tensor on pretend",
        "PlacementError: pretend has no torch.float64",
        "PlacementError: aten::normal_ got a generator of the CPU",
    ):
        assert told in done.stderr
