"""Replace-one scoring: how much the parent suffers when one subblock is swapped (Puzzle §2.4).

For every layer and word: swap that subblock alone, measure KL(parent ‖ model) and the rise of
the LM loss on held-out tokens. The score of an architecture is the sum over its words, which
is what makes the search a linear program.

The hidden states below a replaced layer are the parent's own: they are computed once a batch
and every variant starts from them, so a replacement at layer l costs L - l layers, not L.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from tessera.data.batch import Batch
from tessera.data.documents import heldout
from tessera.model.context import Context
from tessera.model.layers import Subblock
from tessera.model.transformer import Transformer
from tessera.model.weights import load_model
from tessera.progress import Progress
from tessera.puzzle.library import load_unit
from tessera.puzzle.space import Space, read_space, write_space
from tessera.run import Run, atomic_write, read_json
from tessera.train.losses import token_statistics

METRICS = ("kl", "lm_loss", "agreement")


class ScoreConfig(BaseModel):
    """On how many held-out tokens each replacement is measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(default=16_384, ge=1)
    microbatch_tokens: int = Field(default=4096, ge=1)
    sequence_length: int = Field(default=256, ge=2)


Units = dict[tuple[int, str, str], Subblock]


@torch.no_grad()
def score_batch(
    parent: Transformer, units: Units, batch: Batch, tell: Callable[[], None] = lambda: None
) -> dict[tuple, dict[str, float]]:
    """Σ w·metric of every unit put alone into the parent, on one batch; `tell` after each.

    The key `()` holds the parent's own numbers and the total weight.
    """
    context = parent.prepare(Context(batch.positions, batch.segments))
    states = list(parent.hidden_states(batch.tokens, context))
    log_p = parent.logits(parent.norm(states[-1]).flatten(0, 1))
    sums: dict[tuple, dict[str, float]] = {(): _measure(parent, states[-1], log_p, batch)}
    for (layer, kind, word), unit in units.items():
        x = _replaced(parent, layer, kind, unit, states[layer], context)
        for block in parent.blocks[layer + 1 :]:
            x = block(x, context)
        sums[layer, kind, word] = _measure(parent, x, log_p, batch)
        tell()
    return sums


def _replaced(
    parent: Transformer, layer: int, kind: str, unit: Subblock, x: Tensor, context: Context
) -> Tensor:
    block = parent.blocks[layer]
    attention, ffn = (unit, block.ffn) if kind == "attention" else (block.attention, unit)
    x = x + attention(x, context)
    return x + ffn(x, context)


def _measure(parent: Transformer, x: Tensor, logits: Tensor, batch: Batch) -> dict[str, float]:
    hidden, weight = parent.norm(x).flatten(0, 1), batch.weight.flatten()
    found = token_statistics(hidden, parent.head, logits.__getitem__, batch.labels.flatten())
    sums = {key: float(values @ weight) for key, values in found.items()}
    return sums | {"weight": float(weight.sum())}


def load_units(library: Path, parent: Transformer, space: Space) -> Units:
    """Every replacement of the space, trained; `noop` included."""
    return {
        key: load_unit(library, parent.config, *key).requires_grad_(False)
        for key in space.replacements()
    }


def score_all(
    parent: Transformer, units: Units, batches: Sequence[Batch], run: Run
) -> list[dict[str, object]]:
    """Rows {layer, kind, word, kl, lm_loss, agreement, tokens}; means over all tokens.

    Finished batches are kept in the run's state, so a killed scoring goes on where it was.
    """
    totals: dict[tuple, dict[str, float]] = {}
    with Progress(run.name, len(batches) * len(units), "replacements", quiet=run.quiet) as bar:
        for index, batch in enumerate(batches):
            done = run.state_path / f"batch-{index}.json"
            if done.exists():
                bar.advance(len(units), 0)
            else:
                _score(done, parent, units, batch, bar)
            for key, sums in json.loads(done.read_text()):
                known = totals.setdefault(tuple(key), dict.fromkeys(sums, 0.0))
                for metric, value in sums.items():
                    known[metric] += value
    return _rows(totals)


def _score(done: Path, parent: Transformer, units: Units, batch: Batch, bar: Progress) -> None:
    found = score_batch(parent, units, batch, bar.advance)
    done.parent.mkdir(exist_ok=True)
    atomic_write(done, json.dumps([[list(key), value] for key, value in found.items()]))


def _rows(totals: dict[tuple, dict[str, float]]) -> list[dict[str, object]]:
    own = totals.pop(())
    tokens = own["weight"]
    rows = []
    for (layer, kind, word), sums in totals.items():
        means = {metric: sums[metric] / tokens for metric in METRICS}
        means["lm_loss"] -= own["lm_loss"] / tokens
        rows.append({"layer": layer, "kind": kind, "word": word, **means, "tokens": int(tokens)})
    return rows


def stage(config: ScoreConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `score`: measure every word of the library alone in the parent."""
    parent = load_model(inputs["parent"], frozen=True)
    space = read_space(inputs["library"])
    units = load_units(inputs["library"] / "library", parent, space)
    batches = heldout(
        inputs["data"],
        sequence_length=config.sequence_length,
        microbatch_tokens=config.microbatch_tokens,
        tokens=config.tokens,
    )
    run.write_table("scores", score_all(parent, units, batches, run))
    write_space(space, run)
    run.write_json("block_influence", read_json(inputs["library"], "block_influence"))
