"""Stages that count instead of computing, and a table of them like the real one."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tessera.pipeline import run_recipe
from tessera.runs.plan import Input, Stage
from tessera.runs.recipe import Config, loads
from tessera.runs.run import Run, read_json, read_metrics


class MakeConfig(Config):
    value: int = 1
    path: str | None = None
    fail: bool = False


class CountConfig(Config):
    steps: int = 5
    pause: float = 0.0
    stop_at: int | None = None


def make(config: MakeConfig, run: Run, inputs: dict[str, Input]) -> None:
    """Gives a model: its value and those of what it was made from, added up."""
    if config.fail:
        raise RuntimeError("as asked")
    below = [read_json(path, "value") for path in inputs.values() if isinstance(path, Path)]
    run.write_json("value", config.value + sum(below))


def count(config: CountConfig, run: Run, inputs: dict[str, Input]) -> None:
    """Counts to `steps` one metrics line at a time, its state the number of lines before."""
    state = run.state_path / "step"
    start = int(state.read_text()) if state.exists() else 0
    run.rewind(start)
    run.state_path.mkdir(exist_ok=True)
    for step in range(start + 1, config.steps + 1):
        run.log(step, value=step * step)
        time.sleep(config.pause)
        run.write_file("state/step", str(step))
        if step == config.stop_at and start == 0:
            raise KeyboardInterrupt
    run.write_json("value", sum(row["value"] for row in read_metrics(run.path)))


def table(config: MakeConfig, run: Run, inputs: dict[str, Input]) -> None:
    models = inputs["models"]
    assert isinstance(models, list)
    rows = [{"model": path.name, "value": read_json(path, "value")} for path in models]
    run.write_table("compare", rows)


HERE = "tests.pipeline_stages"
ROWS = (
    Stage("data", "model=", "data", HERE, "MakeConfig", "make"),
    Stage("parent", "data?", "model", HERE, "MakeConfig", "make", ("path",)),
    Stage("kd", "model teacher data", "model", HERE, "CountConfig", "count"),
    Stage("child", "parent", "model", HERE, "MakeConfig", "make"),
    Stage("compare", "parent models*", "table", HERE, "MakeConfig", "table"),
)
STAGES = {row.name: row for row in ROWS}

if __name__ == "__main__":  # python -m tests.pipeline_stages RUNS_DIR RECIPE_TEXT [REDO ...]
    run_recipe(loads(sys.argv[2]), sys.argv[1], redo=sys.argv[3:], quiet=True, stages=STAGES)
