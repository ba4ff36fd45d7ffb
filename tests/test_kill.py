"""Kills, a second process and a full disk: benchmarks/kill_resume.py with few kills."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "kill_resume.py"


@pytest.mark.slow
def test_the_same_command_again_gives_the_same_child():
    words = [sys.executable, str(SCRIPT), "--kills", "3", "--grow", "3072"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| killed | 3 kills" in done.stdout and "the second ended with 2" in done.stdout
