"""Speeds promised from words priced in vLLM, against whole models measured in vLLM.

    python benchmarks/vllm_cost.py COSTS PARENT MODEL [MODEL ...] [--starts 3]

COSTS is a finished run of stage `cost_vllm`, PARENT and MODEL are runs or directories of models
whose words it priced. Each model is exported and timed in that run's first scenario, in `--starts`
processes of its own that alternate over the models: what varies between starts is most of the
noise. Promised are sums over the model's words and the base, and nothing is fitted.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tessera.export.padding import expressible
from tessera.export.write import export_model
from tessera.model.config import ModelConfig
from tessera.model.source import load_config
from tessera.puzzle.cost import Seconds
from tessera.puzzle.cost_table import CostTable, read_costs
from tessera.puzzle.vllm_cost import (
    VLLMCostConfig,
    cache_bytes,
    drive,
    job,
    prefill_and_step,
    served,
)
from tessera.runs.run import read_json, read_manifest
from tessera.vllm.engine import find_python


def main() -> None:
    options = parse()
    if not options.models:
        print("skipped: give a finished run of stage cost_vllm, its parent, and children")
        return
    config = VLLMCostConfig.model_validate(read_manifest(options.costs).config)
    told = read_json(options.costs, "scenarios")
    label, scenario = config.priced()[0]
    table = read_costs(options.costs).tables[label, scenario.batch]
    models = {path.name: load_config(path) for path in (options.parent, *options.models)}
    places = {path.name: path for path in (options.parent, *options.models)}
    print(
        f"{told['engine']}, {told['device']}, {config.dtype}, "
        f"{'eager' if config.enforce_eager else 'compiled'}, seconds of the {told['clock']}; "
        f"batch {scenario.batch}, {scenario.prompt} prompt + {scenario.new} new tokens\n"
    )
    print_words(table, models[options.parent.name])
    found: dict[str, list[list[Seconds]]] = {key: [] for key in models}
    with tempfile.TemporaryDirectory() as scratch:
        for key, place in places.items():
            export_model(place, Path(scratch) / key, "decilm", check=False)
        for _ in range(options.starts):
            for key, model in models.items():
                found[key].append(timed(config, Path(scratch) / key, model))
    print_models(table, models, found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("costs", type=Path, nargs="?", help="a finished run of stage cost_vllm")
    parser.add_argument("parent", type=Path, nargs="?")
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--starts", type=int, default=3, help="processes a model is timed in")
    return parser.parse_args()


def timed(config: VLLMCostConfig, directory: Path, model: ModelConfig) -> list[Seconds]:
    """Rounds of an exported model in the first scenario, in a new process."""
    asked = job(config, directory, model.vocab_size)
    cache = cache_bytes(config, expressible(model))
    return drive(find_python(config.python), asked, config.threads, cache)["seconds"][0]


def print_words(table: CostTable, parent: ModelConfig) -> None:
    """Milliseconds of every word."""
    print("| word | served as | prefill, ms | decode step, ms |\n|---|---|--:|--:|")
    for key, columns in [(("base", "base"), table.base), *table.words.items()]:
        as_word = key[1] if key[0] == "base" else served(parent, key)[1]
        named = key[1] if key[0] == "base" else f"{key[0]} {key[1]}"
        prefill, decode = (1000 * columns[f"{c}_seconds"] for c in ("prefill", "decode"))
        print(f"| {named} | {as_word} | {prefill:.3f} | {decode:.4f} |")


def print_models(
    table: CostTable, models: dict[str, ModelConfig], found: dict[str, list[list[Seconds]]]
) -> None:
    """Promised and measured, in milliseconds and as speed-ups over the parent."""
    new = table.scenario.new

    def latency(rounds: list[Seconds]) -> float:
        prefill, decode = prefill_and_step(rounds, new)
        return prefill + (new - 1) * decode

    measured = {key: latency(sum(starts, [])) for key, starts in found.items()}
    promised = {key: table.total(model.words)["seconds"] for key, model in models.items()}
    parent = next(iter(models))
    print(
        "\n| model | latency promised, ms | measured (each start) | promised / measured "
        "| speed-up promised | measured |\n|---|--:|--:|--:|--:|--:|"
    )
    for key, starts in found.items():
        each = ", ".join(f"{1000 * latency(rounds):.0f}" for rounds in starts)
        print(
            f"| {key} | {1000 * promised[key]:.0f} | {1000 * measured[key]:.0f} ({each}) "
            f"| {promised[key] / measured[key]:.2f} | {promised[parent] / promised[key]:.2f} "
            f"| {measured[parent] / measured[key]:.2f} |"
        )


if __name__ == "__main__":
    main()
