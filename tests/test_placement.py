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


def fresh(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_stage_computes_on_the_device(tmp_path: Path):
    done = fresh("-m", "tests.pretend", str(RECIPE), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert len(counts) == RECIPE.read_text().count("\n[")
    assert {name for name, count in counts.items() if not count} <= STILL


def test_a_tensor_left_on_the_cpu_is_refused():
    done = fresh(
        "-c",
        "import torch; from tests.pretend import device, pretended; device()\n"
        "with pretended():\n"
        "    torch.ones(3, device=device()) + torch.ones(3)",
    )
    assert "PlacementError: aten::add got a CPU tensor (3,)" in done.stderr
