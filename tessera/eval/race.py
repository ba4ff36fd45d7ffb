"""The race: candidates are ranked after a short distillation, not before it.

Summed replace-one scores rank what was never trained together: on stories260k an architecture of
score 0.34 and a dropped layer of score 0.78 both ended 60 steps at KL 0.24. So several diverse
solutions of the search, and the simple methods beside them, are distilled for a few steps on the
same tokens; the one with the lowest held-out KL is the child. It then starts again from the
library, so the race gives it no head start.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tessera.eval.compare import quality
from tessera.model.weights import load_model
from tessera.objectives.kd import KD, KDConfig
from tessera.objectives.lm import documents
from tessera.puzzle.library import assemble
from tessera.run import Run, is_done, read_json, read_table
from tessera.train.engine import Trainer
from tessera.train.optim import TrainConfig


class RaceConfig(BaseModel):
    """How long each candidate is distilled, and on how many held-out tokens it is judged."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: TrainConfig
    cosine: float = Field(default=1.0, ge=0)
    tokens: int = Field(default=16_384, ge=1)


def candidates(searches: Sequence[Path]) -> list[dict[str, Any]]:
    """Every architecture of these search runs once, each with the name it races under."""
    seen: dict[tuple, dict[str, Any]] = {}
    for search in searches:
        for number, found in enumerate(read_json(search, "architectures"), 1):
            words = tuple(tuple(pair) for pair in found["words"])
            seen.setdefault(words, {"name": f"{search.name}.{number}", **found})
    return list(seen.values())


def heat(
    candidate: dict[str, Any], config: RaceConfig, run: Run, inputs: dict[str, Any]
) -> dict[str, float]:
    """Held-out kl, lm_loss and agreement before and after the candidate's distillation.

    It is a run of its own inside the race's directory, so a killed race goes on where it was.
    """
    path = run.path / "heats" / candidate["name"]
    if not is_done(path):
        settings = {"words": candidate["words"], **config.model_dump()}
        near = {need: inputs[need] for need in ("parent", "library", "data")}
        with Run.open(path, stage="heat", config=settings, inputs=near, seed=run.seed) as own:
            own.write_table("heat", [_distil(candidate["words"], config, own, inputs)])
            own.finish()
    return read_table(path, "heat")[0]


def _distil(
    words: Sequence[Sequence[str]], config: RaceConfig, run: Run, inputs: dict[str, Any]
) -> dict[str, float]:
    parent = load_model(inputs["parent"], frozen=True)
    child = assemble(load_model(inputs["parent"]), inputs["library"] / "library", words)
    heldout = documents(inputs["data"], config.train, run.seed, "heldout")
    batches = heldout.heldout_batches(config.tokens)
    before = quality(parent, child, batches)
    objective = KD(parent, KDConfig(train=config.train, cosine=config.cosine))
    source = documents(inputs["data"], config.train, run.seed)
    Trainer(child, objective, source, config.train, run).fit()
    return {"kl_before": before["kl"], **quality(parent, child, batches)}


def stage(config: RaceConfig, run: Run, inputs: dict[str, Any]) -> None:
    """Stage `race`: write `tables/race.jsonl`, and the winner as `tables/architecture.json`."""
    rows, field = [], candidates(inputs["searches"])
    for candidate in field:
        promised = candidate["predicted"].get("throughput", 0.0)
        speedup = promised / candidate["parent"].get("throughput", 1.0)
        row = {"candidate": candidate["name"], "promised": speedup}
        rows.append(row | heat(candidate, config, run, inputs))
        run.say(f"{candidate['name']}: KL {rows[-1]['kl_before']:.3f} -> {rows[-1]['kl']:.3f}")
    winner = min(range(len(rows)), key=lambda i: rows[i]["kl"])
    run.say(f"{rows[winner]['candidate']} wins")
    run.write_table("race", rows)
    run.write_json("architecture", field[winner])
