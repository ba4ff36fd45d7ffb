"""What every test may ask for. Tests run on the CPU, on one thread, without a network."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts background jobs deaf to Ctrl-C, and what tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real checkpoints and text, kept beside the repository; tests that need them skip without."""
    path = REPOSITORY.parent / "shared"
    if not (path / "models").is_dir():
        pytest.skip("needs the real checkpoints and text of ../shared, which are not here")
    return path
