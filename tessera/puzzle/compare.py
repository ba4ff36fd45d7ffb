"""One table of models beside their parent: quality, size and speed, measured in one run.

Each model takes turns with the parent alone, so that other load slows both; its speed-up is the
median of its ratios to the parent in the same round. `promised` is what the search predicted.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from tessera.data.batch import Batch
from tessera.data.config import DataConfig
from tessera.generate.torch_engine import TorchEngine
from tessera.model.context import Context
from tessera.model.parallel import gathered
from tessera.model.placement import ALONE, Layout
from tessera.model.transformer import Transformer
from tessera.progress import Progress
from tessera.puzzle.cost import Seconds, generation_seconds
from tessera.puzzle.cost_table import Scenario, share_of
from tessera.puzzle.score import HeldoutConfig
from tessera.runs.plan import Step
from tessera.runs.run import Run, read_json
from tessera.train.losses import token_statistics

PROMISE_TOLERANCE = 0.10  # beyond it the run says so


class TimingConfig(HeldoutConfig):
    scenario: Scenario = Scenario()
    rounds: int = Field(default=9, ge=3)


class CompareConfig(TimingConfig):
    tokens: int = Field(default=32_768, ge=1)

    def warnings(self, step: Step, steps: Sequence[Step]) -> list[str]:
        chats = {s.name: s.config.holds_chats for s in steps if isinstance(s.config, DataConfig)}
        nearest = next((s.name for s in steps if s.path == step.inputs.get("data")), "")
        if "data" in step.spec.table or not chats.get(nearest):
            return []
        names = list(chats)
        texts = [name for name in names[: names.index(nearest)] if not chats[name]]
        other = f'; say {step.name}.data = "{texts[-1]}" to compare on text' if texts else ""
        return [
            f"loss, KL and agreement are measured on [{nearest}], which holds chats, as the "
            f"nearest data above{other}"
        ]


@torch.no_grad()
def quality(
    parent: Transformer, module: Transformer, batches: Sequence[Batch], layout: Layout = ALONE
) -> dict[str, float]:
    """Mean held-out `loss` (nats a token), `kl` and top-1 `agreement` with the parent. The tensor
    groups of a layout share the batches; each of them holds the models whole."""

    def sums(index: int) -> dict[str, float]:
        batch = batches[index]
        own, theirs = (
            m(batch.tokens, Context(batch.positions, batch.segments)).flatten(0, 1)
            for m in (module, parent)
        )

        def logits(part: slice) -> Tensor:
            return parent.logits(theirs[part])

        found = token_statistics(own, module.head, logits, batch.labels.flatten())
        weight = batch.weight.flatten()
        bar.advance(1, int((batch.segments >= 0).sum()))
        return {key: float(values @ weight) for key, values in found.items()} | {
            "weight": float(weight.sum())
        }

    mine = layout.mine(batches)
    with gathered(parent, module), Progress("held-out text", len(mine), "tokens") as bar:
        rows = layout.share(len(batches), sums)
    total = {key: sum(row[key] for row in rows) for key in rows[0]}
    weight = total.pop("weight")
    return {key: value / weight for key, value in total.items()}


def speeds(
    models: dict[str, Transformer], config: CompareConfig, label: str, quiet: bool = False
) -> dict[str, dict]:
    """Prefill and decode tokens a second of every model, and its speed-up over the first, whose own
    rates are medians over the rounds that it spent beside all others."""
    first, *others = models
    alone: list[Seconds] = []
    ratios: dict[str, float] = {first: 1.0}
    rounds: dict[str, list[Seconds]] = {first: alone}
    pairs = [[first, other] for other in others] or [[first]]
    with Progress(label, len(pairs) * (config.rounds + 1), "generations", quiet=quiet) as bar:
        for keys in pairs:
            timed = in_turn([models[key] for key in keys], config, bar.advance)
            alone += timed[0]
            if len(keys) == 2:
                rounds[keys[1]] = timed[1]
                steps = config.scenario.new - 1
                whole = [[first + steps * step for first, step in one] for one in timed]
                ratios[keys[1]] = statistics.median(a / b for a, b in zip(*whole, strict=True))
    found, work = {}, config.scenario
    for key in models:
        prefill, decode = median(rounds[key])
        found[key] = {
            "prefill_tokens_per_second": work.batch * work.prompt / prefill,
            "decode_tokens_per_second": work.batch / decode,
            "speedup": ratios[key],
        }
    return found


def in_turn(
    models: Sequence[Transformer],
    config: TimingConfig,
    advance: Callable[[int, int], None] = lambda steps, amount: None,
) -> list[list[Seconds]]:
    """(prefill, decode step) of each model in each round, by one engine that takes their weights in
    turn: those of two need not fit beside the models."""
    engine = TorchEngine(models[0])
    found: list[list[Seconds]] = [[] for _ in models]
    for index in range(config.rounds + 1):
        for module, seconds in zip(models, found, strict=True):
            engine.sync(module, index)
            pair = generation_seconds(engine, module.config.vocab_size, config.scenario)
            if index:  # the first round warms up
                seconds.append(pair)
        advance(1, len(models))
    engine.close()
    return found


def median(rounds: Sequence[Seconds]) -> Seconds:
    """Of each column of (prefill, decode step)."""
    prefill, decode = (statistics.median(column) for column in zip(*rounds, strict=True))
    return prefill, decode


def promised_speedup(row: Mapping[str, Any], scenario: Scenario) -> float | None:
    """The throughput over the parent's that a row of a search promises for this scenario; None
    without seconds, for other work, and where child and parent have different batches there."""
    for one in row.get("scenarios", {"": row}).values():
        same = one.get("scenario") == scenario.model_dump()
        if same and one.get("parent_batch", scenario.batch) == scenario.batch:
            return share_of(one, "throughput")
    return None


def stage(config: CompareConfig, run: Run, inputs: dict) -> None:
    """Stage `compare`: write `tables/compare.jsonl`, one row a model, the parent first."""
    paths: dict[str, Path] = {p.name: p for p in (inputs["parent"], *inputs["models"])}
    placement = config.placement(*paths.values())
    layout = placement.layout
    models = {key: placement.load(path, frozen=True) for key, path in paths.items()}
    parent = models[inputs["parent"].name]
    batches = config.heldout(inputs["data"])
    measured = {key: quality(parent, one, batches, layout) for key, one in models.items()}
    if layout.data_rank:
        return  # one tensor group measures alone
    timed = speeds(models, config, run.name, run.quiet)
    rows = []
    for key, module in models.items():
        found = measured[key]
        promised = error = None
        if (paths[key] / "tables" / "architecture.json").is_file():
            promised = promised_speedup(read_json(paths[key], "architecture"), config.scenario)
        if promised is not None:
            speedup = timed[key]["speedup"]
            error = promised / speedup - 1  # above zero, the search promised too much
            if abs(error) > PROMISE_TOLERANCE:
                run.say(f"{key}: promised {promised:.2f}x, measured {speedup:.2f}x ({error:+.0%})")
        row = {"model": key, "heldout_loss": found.pop("lm_loss"), **found}
        row["parameters"] = module.config.num_params()
        row["kv_bytes_per_token"] = module.config.kv_bytes_per_token()
        rows.append({**row, **timed[key], "promised": promised, "promise_error": error})
    run.write_table("compare", rows)
