"""One table of models beside their parent: quality, size and speed, measured in one run.

Held-out loss, top-1 agreement with the parent and KL come from the same held-out tokens for
every row. Speed is generation through the engine: the rows take turns, round by round, so that
whatever else the machine does falls on all of them, and a row's speed-up is the median of its
ratios to the parent in the same round. `promised` is what the search predicted from its table,
and `promise_error` is promised / measured - 1.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from tessera.data.batch import Batch
from tessera.data.documents import heldout
from tessera.generate.torch_engine import TorchEngine
from tessera.model.context import Context
from tessera.model.transformer import Transformer
from tessera.model.weights import load_model
from tessera.progress import Progress
from tessera.puzzle.cost import generation_seconds
from tessera.puzzle.cost_table import Scenario
from tessera.run import Run, read_json
from tessera.train.losses import token_statistics

PROMISE_TOLERANCE = 0.10  # beyond it the run says so


class CompareConfig(BaseModel):
    """The scenario to time, how often, and on how many held-out tokens to measure quality."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scenario: Scenario = Scenario()
    rounds: int = Field(default=9, ge=3)
    tokens: int = Field(default=32_768, ge=1)
    sequence_length: int = Field(default=256, ge=2)
    microbatch_tokens: int = Field(default=4096, ge=1)


@torch.no_grad()
def quality(parent: Transformer, module: Transformer, batches: Sequence[Batch]) -> dict[str, float]:
    """Mean held-out `loss` (nats a token), `kl` and top-1 `agreement` with the parent."""
    sums: dict[str, float] = {"lm_loss": 0.0, "kl": 0.0, "agreement": 0.0}
    total = 0.0
    for batch in batches:
        own, theirs = (
            m(batch.tokens, Context(batch.positions, batch.segments)).flatten(0, 1)
            for m in (module, parent)
        )
        labels = batch.labels.flatten()
        found = token_statistics(own, module.head, _logits(parent, theirs), labels)
        weight = batch.weight.flatten()
        total += float(weight.sum())
        for key, values in found.items():
            sums[key] += float(values @ weight)
    return {key: value / total for key, value in sums.items()}


def _logits(module: Transformer, hidden: Tensor) -> Callable[[slice], Tensor]:
    return lambda part: module.logits(hidden[part])


def speeds(
    models: dict[str, Transformer], config: CompareConfig, label: str, quiet: bool = False
) -> dict[str, dict]:
    """Prefill and decode tokens a second of every model, and its speed-up over the first."""
    engines = {key: TorchEngine(module) for key, module in models.items()}
    scenario = config.scenario
    rounds: dict[str, list[tuple[float, float]]] = {key: [] for key in engines}
    with Progress(label, config.rounds + 1, "generations", quiet=quiet) as bar:
        for index in range(config.rounds + 1):
            for key, engine in engines.items():
                vocab = models[key].config.vocab_size
                pair = generation_seconds(engine, vocab, scenario)
                if index:  # the first round warms up
                    rounds[key].append(pair)
            bar.advance(1, len(engines))
    first = next(iter(engines))
    totals = {k: [p + (scenario.new - 1) * d for p, d in v] for k, v in rounds.items()}
    rows = {}
    for key, pairs in rounds.items():
        prefill, decode = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = [a / b for a, b in zip(totals[first], totals[key], strict=True)]
        rows[key] = {
            "prefill_tokens_per_second": scenario.batch * scenario.prompt / prefill,
            "decode_tokens_per_second": scenario.batch / decode,
            "speedup": statistics.median(ratios),
        }
    return rows


def _promised(run: Path) -> float | None:
    if not (run / "tables" / "architecture.json").is_file():
        return None
    found = read_json(run, "architecture")
    rates = [found[side].get("throughput") for side in ("predicted", "parent")]
    return rates[0] / rates[1] if all(rates) else None


def promise_error(promised: float | None, measured: float) -> float | None:
    """promised / measured - 1: above zero, the search promised too much; None without a promise."""
    return None if promised is None else promised / measured - 1


def stage(config: CompareConfig, run: Run, inputs: dict) -> None:
    """Stage `compare`: write `tables/compare.jsonl`, one row a model, the parent first."""
    paths: dict[str, Path] = {p.name: p for p in (inputs["parent"], *inputs["models"])}
    models = {key: load_model(path, frozen=True) for key, path in paths.items()}
    parent = models[inputs["parent"].name]
    batches = heldout(
        inputs["data"],
        sequence_length=config.sequence_length,
        microbatch_tokens=config.microbatch_tokens,
        tokens=config.tokens,
    )
    timed = speeds(models, config, run.name, run.quiet)
    rows = []
    for key, module in models.items():
        found = quality(parent, module, batches)
        promised = _promised(paths[key])
        error = promise_error(promised, timed[key]["speedup"])
        if error is not None and abs(error) > PROMISE_TOLERANCE:
            speedup = timed[key]["speedup"]
            run.say(f"{key}: promised {promised:.2f}x, measured {speedup:.2f}x ({error:+.0%})")
        rows.append(
            {
                "model": key,
                "heldout_loss": found["lm_loss"],
                "kl": found["kl"],
                "agreement": found["agreement"],
                "parameters": module.config.num_params(),
                "kv_bytes_per_token": module.config.kv_bytes_per_token(),
                **timed[key],
                "promised": promised,
                "promise_error": error,
            }
        )
    run.write_table("compare", rows)
