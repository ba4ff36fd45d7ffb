"""Recipes of a small library in as many processes as there are, for test_ranges.py."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tessera.puzzle import bld
from tessera.runs.files import RunError
from tests.objectives.recipes import run


def bring(
    runs: str, text: str, stop: tuple[int, int] | None = None, refused: str | None = None
) -> None:
    """Runs a recipe; `stop`: it is interrupted before that step (from 0) of that part of it."""
    plain = bld.Trainer

    class Stopping(plain):  # type: ignore[misc, valid-type]
        def train_step(self, step: int) -> Any:
            if stop is not None and (self.before, step) == tuple(stop):
                raise KeyboardInterrupt
            return super().train_step(step)

    bld.Trainer = Stopping  # type: ignore[misc]
    try:
        with contextlib.suppress(KeyboardInterrupt):
            with pytest.raises(RunError, match=refused) if refused else contextlib.nullcontext():
                run(Path(runs), text)
    finally:
        bld.Trainer = plain  # type: ignore[misc]


def main() -> None:
    port = int(os.environ["MASTER_PORT"])
    for number, job in enumerate(json.loads(sys.argv[1])):
        os.environ["MASTER_PORT"] = str(port + number)  # a job that has ended may hold the last one
        bring(**job)


if __name__ == "__main__":
    main()
