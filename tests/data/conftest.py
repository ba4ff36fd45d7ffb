"""A data run, made by the stage itself."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tessera.data.config import DataConfig
from tessera.data.prepare import stage
from tessera.runs.run import Run

Prepare = Callable[..., Path]


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    """`prepare("name", paths=…, …)` runs the stage and returns its directory."""

    def run_stage(
        name: str = "data", *, seed: int = 0, model: Path | None = None, **table: Any
    ) -> Path:
        config = DataConfig(**table)
        dumped, inputs = config.model_dump(mode="json"), {"model": model}
        where = tmp_path / "runs" / name
        with Run.open(
            where, stage="data", config=dumped, inputs=inputs, seed=seed, quiet=True
        ) as run:
            stage(config, run, inputs)
            run.finish()
        return where

    return run_stage


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    """60 short documents of 1 to 60 words, all different."""
    words = "the cat saw a red ball and ran to mom who said no one day in sun".split()
    documents = [" ".join(words[(i + k) % 16] for k in range(1 + i)) for i in range(60)]
    file = tmp_path / "stories.txt"
    file.write_text("\n<|endoftext|>\n".join(documents) + "\n<|endoftext|>\n")
    return file


def kill_stage(where: Path, table: dict[str, Any], waits: Sequence[float]) -> None:
    """Runs the stage into `where` in a process of its own, killed after each of these seconds."""
    code = (
        "from pathlib import Path\n"
        "from tessera.runs.run import Run; from tessera.data.config import DataConfig\n"
        "from tessera.data.prepare import stage\n"
        f"c = DataConfig(**{table!r}); print('ready', flush=True)\n"
        f"with Run.open(Path({str(where)!r}), stage='data', quiet=True,\n"
        "    config=c.model_dump(mode='json'), inputs={'model': None}, seed=0) as run:\n"
        "    stage(c, run, {'model': None}); run.finish()\n"
    )
    for wait in waits:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(wait)
        process.kill()
        process.communicate()
