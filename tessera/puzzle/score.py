"""Replace-one scoring: how much the parent suffers when one subblock is swapped (Puzzle §2.4).

For every layer and word: swap that subblock alone, measure KL(parent ‖ model), the rise of the LM
loss, the cosine distance of the last hidden states and top-1 agreement on held-out tokens. The
score of an architecture is the sum over its words, which is what makes the search a linear program.

The hidden states below a replaced layer are the parent's own: they are computed once a batch
and every variant starts from them, so a replacement at layer l costs L - l layers, not L.
`score_given` does the same around any architecture: scores given what is gone already.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from tessera.data.batch import Batch
from tessera.data.documents import heldout
from tessera.model.context import Context
from tessera.model.layers import Subblock
from tessera.model.matmul import multiply
from tessera.model.transformer import Block, Transformer
from tessera.model.weights import load_model
from tessera.progress import Progress
from tessera.puzzle.library import load_unit
from tessera.puzzle.space import Space, join, read_space, write_space
from tessera.run import Run, atomic_write, read_json
from tessera.train.losses import chunks

METRICS = ("kl", "lm_loss", "cosine", "agreement")


class ScoreConfig(BaseModel):
    """On how many held-out tokens each replacement is measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(default=16_384, ge=1)
    microbatch_tokens: int = Field(default=4096, ge=1)
    sequence_length: int = Field(default=256, ge=2)


Units = dict[tuple[int, str, str], Subblock | Block]


@dataclass(frozen=True)
class Target:
    """What every variant of one batch is held against, computed once from the parent.

    With p the parent's distribution, W the head and h a variant's hidden state,

        KL(p ‖ q) = Σ p log p - h·(p W) + log Σ exp(h W),

    so p is needed once, and a variant costs one product with the head and one log-sum-exp.
    """

    module: Transformer
    hidden: Tensor  # (N, C), normalised
    negentropy: Tensor  # (N,): Σ p log p
    mean_head: Tensor  # (N, C): Σ p W
    top: Tensor  # (N,): the parent's first choice
    labels: Tensor
    weight: Tensor

    @classmethod
    def of(cls, parent: Transformer, x: Tensor, batch: Batch) -> Target:
        """The parent's side of one batch; x `(B,T,C)` leaves its last layer."""
        hidden = parent.norm(x).flatten(0, 1)
        negentropy, mean_head, top = [], [], []
        for part in chunks(len(hidden), len(parent.head)):
            log_p = F.log_softmax(multiply(hidden[part], parent.head).float(), dim=-1)
            p = log_p.exp()
            negentropy.append((p * log_p).sum(-1))
            mean_head.append(multiply(p.to(parent.head.dtype), parent.head.t()).float())
            top.append(log_p.argmax(-1))
        entropy, mean, first = map(torch.cat, (negentropy, mean_head, top))
        labels, weight = batch.labels.flatten(), batch.weight.flatten()
        return cls(parent, hidden, entropy, mean, first, labels, weight)

    def measure(self, x: Tensor) -> dict[str, float]:
        """Σ w·metric, and Σ w, of a variant whose last layer x `(B,T,C)` leaves."""
        hidden, head = self.module.norm(x).flatten(0, 1), self.module.head
        sums: dict[str, float] = dict.fromkeys(METRICS, 0.0)
        for part in chunks(len(hidden), len(head)):
            own, weight = hidden[part], self.weight[part]
            logits = multiply(own, head).float()
            level = logits.logsumexp(-1)
            kl = self.negentropy[part] - (own.float() * self.mean_head[part]).sum(-1) + level
            label = logits.gather(1, self.labels[part, None]).squeeze(1)
            same = (logits.argmax(-1) == self.top[part]).float()
            cosine = 1 - F.cosine_similarity(own.float(), self.hidden[part].float(), dim=-1)
            found = {"kl": kl, "lm_loss": level - label, "cosine": cosine, "agreement": same}
            for metric, values in found.items():
                sums[metric] += float(values @ weight)
        return sums | {"weight": float(self.weight.sum())}


@torch.no_grad()
def score_batch(
    parent: Transformer,
    units: Units,
    batch: Batch,
    tell: Callable[[], None] = lambda: None,
    current: Transformer | None = None,
) -> dict[tuple, dict[str, float]]:
    """Σ w·metric of every unit put alone into `current`, on one batch; `tell` after each.

    `current` is the parent itself unless given; metrics are always against the parent. The key
    `()` holds `current`'s own numbers and the total weight.
    """
    current = current or parent
    context = parent.prepare(Context(batch.positions, batch.segments))
    states, middles = _states(current, batch, context)
    last = states[-1] if current is parent else _states(parent, batch, context)[0][-1]
    target = Target.of(parent, last, batch)
    sums: dict[tuple, dict[str, float]] = {(): target.measure(states[-1])}
    for (layer, kind, word), unit in units.items():
        x = _replaced(current.blocks[layer], kind, unit, states[layer], middles[layer], context)
        for block in current.blocks[layer + 1 :]:
            x = block(x, context)
        sums[layer, kind, word] = target.measure(x)
        tell()
    return sums


def _states(module: Transformer, batch: Batch, context: Context) -> tuple[list, list]:
    """The residual stream before each layer and after the last, and between its subblocks."""
    states, middles = [module.embed_tokens(batch.tokens)], []
    for block in module.blocks:
        middles.append(states[-1] + block.attention(states[-1], context))
        states.append(middles[-1] + block.ffn(middles[-1], context))
    return states, middles


def _replaced(
    block: Block, kind: str, unit: Subblock | Block, x: Tensor, middle: Tensor, context: Context
) -> Tensor:
    if kind == "block":
        return unit(x, context)
    if kind == "attention":
        middle = x + unit(x, context)
        return middle + block.ffn(middle, context)
    return middle + unit(middle, context)


def load_units(library: Path, parent: Transformer, space: Space) -> Units:
    """Every replacement of the space, trained; `noop` included, and pairs trained together."""
    units: Units = {
        key: load_unit(library, parent.config, *key).requires_grad_(False)
        for key in space.replacements()
    }
    for layer, attention, ffn in space.pairs:
        key = (layer, "block", join(attention, ffn))
        units[key] = load_unit(library, parent.config, *key).requires_grad_(False)
    return units


def score_given(
    parent: Transformer,
    current: Transformer,
    units: Units,
    batches: Sequence[Batch],
    tell: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(`current`'s own metrics against the parent, the change that each unit alone makes to them).

    The rows are those of `score_all` where `current` is the parent. What stands in a place
    already changes nothing, so a unit that is there needs no row.
    """
    totals: dict[tuple, dict[str, float]] = {}
    for batch in batches:
        _accumulate(totals, score_batch(parent, units, batch, tell, current).items())
    own = {metric: totals[()][metric] / totals[()]["weight"] for metric in METRICS}
    return own, _rows(totals)


def score_all(
    parent: Transformer, units: Units, batches: Sequence[Batch], run: Run
) -> list[dict[str, Any]]:
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
            _accumulate(totals, ((tuple(k), v) for k, v in json.loads(done.read_text())))
    return _rows(totals)


def _accumulate(totals: dict[tuple, dict[str, float]], found: Iterable[tuple]) -> None:
    for key, sums in found:
        known = totals.setdefault(key, dict.fromkeys(sums, 0.0))
        for metric, value in sums.items():
            known[metric] += value


def _score(done: Path, parent: Transformer, units: Units, batch: Batch, bar: Progress) -> None:
    found = score_batch(parent, units, batch, bar.advance)
    done.parent.mkdir(exist_ok=True)
    atomic_write(done, json.dumps([[list(key), value] for key, value in found.items()]))


def _rows(totals: dict[tuple, dict[str, float]]) -> list[dict[str, Any]]:
    own = totals[()]
    tokens = own["weight"]
    rows = []
    for key, sums in totals.items():
        if key:
            # The parent's own agreement is 1; all else is told as a change.
            less = {**own, "agreement": 0.0}
            means = {metric: (sums[metric] - less[metric]) / tokens for metric in METRICS}
            layer, kind, word = key
            place = {"layer": layer, "kind": kind, "word": word}
            rows.append({**place, **means, "tokens": int(tokens)})
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
