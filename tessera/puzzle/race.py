"""The race: candidates are ranked after a short distillation, not before it.

    rung r = 1 … R:  every survivor is distilled for steps · grow^(r-1) steps;
                     the best share `keep` of them goes on; the winner of the last rung is the child

Successive halving (Jamieson & Talwalkar, arXiv 1502.07943). Each heat starts again from the library
with a complete schedule of its rung's length, so rivals are annealed on the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator

from tessera import dist
from tessera.data.batch import Batch
from tessera.model.checkpoint import open_model
from tessera.objectives.kd import KD, KDConfig
from tessera.objectives.lm import documents
from tessera.puzzle.compare import quality
from tessera.puzzle.cost_table import share_of
from tessera.puzzle.library import assemble
from tessera.runs.files import FailureError, WriteError
from tessera.runs.recipe import Config, identity
from tessera.runs.run import Run, is_done, read_json, read_table
from tessera.train.engine import Trainer
from tessera.train.optim import AllLayers, DocumentTrainConfig

Row = dict[str, Any]


class HeatConfig(Config):
    train: Annotated[DocumentTrainConfig, AllLayers]
    cosine: float = Field(default=1.0, ge=0)
    tokens: int = Field(default=16_384, ge=1)


class RaceConfig(HeatConfig):
    """`train` is the first rung's, at every one of `lrs`; a candidate goes on with its best one.
    With keep · grow = 1 every rung costs about the same."""

    rungs: int = Field(default=1, ge=1)
    keep: float = Field(default=0.5, gt=0, lt=1)
    grow: float = Field(default=2.0, ge=1)
    lrs: tuple[float, ...] = ()

    @field_validator("lrs")
    @classmethod
    def _check_rates(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(lr <= 0 for lr in value) or len(set(value)) < len(value):
            raise ValueError("give different learning rates above 0, e.g. lrs = [1e-4, 1e-3]")
        return value

    def heat(self, rung: int, lr: float) -> HeatConfig:
        """What a heat of this rung (from 1) at this rate is."""
        steps = round(self.train.steps * self.grow ** (rung - 1))
        train = self.train.model_copy(update={"steps": steps, "lr": lr})
        return HeatConfig(train=train, cosine=self.cosine, tokens=self.tokens)

    def left(self, count: int) -> int:
        return max(1, math.ceil(self.keep * count))

    def heats(self, count: int) -> list[int]:
        found = []
        for rung in range(1, self.rungs + 1):
            rates = len(self.lrs) if rung == 1 and self.lrs else 1
            found += [self.heat(rung, self.train.lr).train.steps] * (count * rates)
            count = self.left(count)
            if count == 1:
                break
        return found


def candidates(searches: Sequence[Path]) -> list[Row]:
    seen: dict[tuple, Row] = {}
    for search in searches:
        for number, found in enumerate(read_json(search, "architectures"), 1):
            words = tuple(tuple(pair) for pair in found["words"])
            seen.setdefault(words, {"name": f"{search.name}.{number}", **found})
    return list(seen.values())


def heat(path: Path, words: Sequence, config: HeatConfig, run: Run, inputs: dict[str, Any]) -> Row:
    """Held-out kl, lm_loss and agreement of an architecture, and kl_before its distillation, by a
    run of its own at `path`. A number that is not finite, or of a diverged training, is None."""
    if not dist.broadcast(is_done(path)):
        made = {
            "config": {"words": words, **config.model_dump(mode="json")},
            "identity": {"words": words, **identity(config)},
            "inputs": {need: inputs[need] for need in ("parent", "library", "data")},
        }
        with Run.open(path, stage="heat", seed=run.seed, quiet=run.quiet, **made) as own:
            found = _distil(words, config, own, inputs)
            finite = {k: v if math.isfinite(v) else None for k, v in found.items()}
            own.write_table("heat", [finite])
            own.finish()
        dist.barrier()
    return read_table(path, "heat")[0]


def _distil(
    words: Sequence, config: HeatConfig, run: Run, inputs: dict[str, Any]
) -> dict[str, float]:
    placement = config.train.placement
    parent = placement.load(inputs["parent"], frozen=True)
    library = inputs["library"] / "library"
    child = placement.load(assemble(open_model(inputs["parent"]), library, words))
    heldout = documents(inputs["data"], config.train, run.seed, "heldout", alike=True)
    batches = [batch.to(dist.device()) for batch in heldout.heldout_batches(config.tokens)]
    before = quality(parent, child, batches)
    objective = KD(parent, KDConfig(train=config.train, cosine=config.cosine))
    source = documents(inputs["data"], config.train, run.seed)
    try:
        Trainer(child, objective, source, config.train, run).fit()
    except WriteError:
        raise
    except FailureError as error:  # at its rate it cannot be trained: that is a result, too
        run.say(str(error))
        after = dict.fromkeys(before, math.nan)
    else:
        after = quality(parent, child, batches)
    return {"kl_before": before["kl"], **after}


def unigram_entropy(batches: Sequence[Batch]) -> float:
    """Entropy of the tokens' own frequencies, nats a token: the best loss without context."""
    labels = torch.cat([batch.labels.flatten() for batch in batches]).cpu()
    weight = torch.cat([batch.weight.flatten() for batch in batches]).cpu().double()
    share = torch.bincount(labels, weight) / weight.sum()
    return float(torch.special.entr(share).sum())


def ranking(rows: Sequence[Row]) -> list[int]:
    """The best row of every candidate, best first: by held-out KL, those that miss the constraints
    behind all that meet them, and those that diverged last."""
    order = sorted(
        range(len(rows)),
        key=lambda i: (rows[i]["kl"] is None, not rows[i]["meets"], rows[i]["kl"] or 0.0),
    )
    best: dict[str, int] = {}
    for i in order:
        best.setdefault(rows[i]["candidate"], i)
    return list(best.values())


def stage(config: RaceConfig, run: Run, inputs: dict[str, Any]) -> None:
    """Stage `race`: write `tables/race.jsonl`, and the winner as `tables/architecture.json`."""
    field = {one["name"]: one for one in candidates(inputs["searches"])}
    entries = [(one, lr) for one in field.values() for lr in config.lrs or (config.train.lr,)]
    table: list[Row] = []
    for rung in range(1, config.rungs + 1):
        rows: list[Row] = []
        for candidate, lr in entries:
            settings = config.heat(rung, lr)
            name = f"{rung}-{candidate['name']}"
            name += f"-lr{lr:g}" * (rung == 1 and len(config.lrs) > 1)
            row = {
                "rung": rung,
                "place": None,
                "candidate": candidate["name"],
                "method": candidate.get("method"),
                "promised": share_of(candidate, "throughput"),
                "meets": candidate.get("meets", True),
                "lr": lr,
                "tokens": settings.train.steps * settings.train.tokens_per_step,
            }
            row |= heat(run.path / "heats" / name, candidate["words"], settings, run, inputs)
            rows.append(row)
            before, after = (
                "not finite" if row[key] is None else f"{row[key]:.3f}"
                for key in ("kl_before", "kl")
            )
            run.say(f"{name}: KL {before} -> {after}")
        order = [rows[i] for i in ranking(rows)]
        for place, row in enumerate(order, 1):
            row["place"] = place
        table += [*order, *(row for row in rows if row["place"] is None)]
        run.write_table("race", table)
        finite = [row for row in order if row["kl"] is not None]
        if not finite:
            raise FailureError(
                f"no candidate ended rung {rung} with a finite KL; lower race.train.lr (now "
                f"{config.train.lr}) or give lrs, then run again with --redo {run.name}"
            )
        left = finite[: config.left(len(order))]
        entries = [(field[row["candidate"]], row["lr"]) for row in left]
        if len(left) == 1:
            break  # nobody is left to be compared with
    winner, lr = entries[0]
    run.say(f"{winner['name']} wins at lr {lr:g}")
    loss = next(row for row in reversed(table) if row["place"] == 1)["lm_loss"]
    heldout = documents(inputs["data"], config.train, run.seed, "heldout", alike=True)
    if loss >= (entropy := unigram_entropy(heldout.heldout_batches(config.tokens))):
        run.say(
            f"all candidates are bad: the best has a held-out loss of {loss:.2f} nats a token; "
            f"guessing each by how frequent it is has {entropy:.2f}. Give the race more steps or "
            "other lrs, train the library longer, or loosen the constraints of the searches"
        )
    run.write_json("architecture", {**winner, "lr": lr})
