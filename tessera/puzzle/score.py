"""Replace-one scoring: how much the parent suffers when one subblock is swapped (Puzzle §2.4).

For every layer and word: swap that subblock alone, measure KL(parent ‖ model), the rise of the LM
loss, the cosine distance of the last hidden states and top-1 agreement on held-out tokens. The
score of an architecture is the sum over its words, which is what makes the search a linear program.

The hidden states below a replaced layer are the parent's own: they are computed once a batch
and every variant starts from them, so a replacement at layer l costs L - l layers, not L.
`score_given` does the same around any architecture: scores given what is gone already.
Tasks with answers are scored beside the text (`answers.py`).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from tessera.data.batch import Batch
from tessera.data.documents import heldout
from tessera.data.tasks import family
from tessera.model.context import Context
from tessera.model.cpu import multiply
from tessera.model.layers import Subblock
from tessera.model.transformer import Block, Transformer
from tessera.model.weights import load_model
from tessera.progress import Progress
from tessera.puzzle.answers import Answers, load_tasks
from tessera.puzzle.library import load_unit
from tessera.puzzle.space import Space, join, read_space, write_space
from tessera.runs.files import atomic_write
from tessera.runs.manifest import read_json
from tessera.runs.run import Run
from tessera.train.losses import chunks

METRICS = ("kl", "lm_loss", "cosine", "agreement")


class ScoreConfig(BaseModel):
    """On how many held-out tokens, and on which problems, each replacement is measured.

    tasks: `{ calc = 200 }` for so many held-out problems of a procedural task, and
    `{ mine = "FILE.jsonl" }` for a file of {"prompt": …, "answer": …} lines.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(default=16_384, ge=1)
    microbatch_tokens: int = Field(default=4096, ge=1)
    sequence_length: int = Field(default=256, ge=2)
    tasks: dict[str, int | str] = {}
    work: bool = True  # a procedural problem's reference is its whole solution; False: the answer
    problems: int = Field(default=500, ge=1)  # of a file, at most

    @field_validator("tasks")
    @classmethod
    def _known(cls, value: dict[str, int | str]) -> dict[str, int | str]:
        for name, source in value.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"{name!r} names no column; use letters, digits, - and _")
            if isinstance(source, int):
                family(name)
                if source < 1:
                    raise ValueError(f"{name} = {source}: give the number of problems, 1 or more")
            elif not Path(source).is_file():
                raise ValueError(f"{name}: there is no file {source}")
        return value

    @property
    def files(self) -> list[str]:
        """The files that hold problems; what is in them is part of the run's fingerprint."""
        return [source for source in self.tasks.values() if isinstance(source, str)]


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
        for part in chunks(hidden, len(parent.head)):
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
        for part in chunks(hidden, len(head)):
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
    target = None if current is parent else _target(parent, batch)
    sums: dict[tuple, dict[str, float]] = {}
    for key, x in variants(current, units, batch):
        target = target or Target.of(parent, x, batch)
        sums[key] = target.measure(x)
        if key:
            tell()
    return sums


@torch.no_grad()
def score_answers(
    current: Transformer,
    units: Units,
    answers: Answers,
    tell: Callable[[], None] = lambda: None,
) -> dict[tuple, dict[str, float]]:
    """`score_batch` for a batch of problems: sums of the task's metrics and of their weights."""
    sums: dict[tuple, dict[str, float]] = {}
    for key, x in variants(current, units, answers.batch):
        sums[key] = answers.measure(current, x)
        if key:
            tell()
    return sums


def variants(current: Transformer, units: Units, batch: Batch) -> Iterator[tuple[tuple, Tensor]]:
    """What the last layer leaves `(B,T,C)`: of `current` under the key (), then with each unit."""
    context = current.prepare(Context(batch.positions, batch.segments))
    states, middles = _states(current, batch, context)
    yield (), states[-1]
    for (layer, kind, word), unit in units.items():
        x = _replaced(current.blocks[layer], kind, unit, states[layer], middles[layer], context)
        for block in current.blocks[layer + 1 :]:
            x = block(x, context)
        yield (layer, kind, word), x


def _target(parent: Transformer, batch: Batch) -> Target:
    context = parent.prepare(Context(batch.positions, batch.segments))
    return Target.of(parent, _states(parent, batch, context)[0][-1], batch)


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
    answers: Sequence[Answers] = (),
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(`current`'s own metrics against the parent, the change that each unit alone makes to them).

    The rows are those of `score_all` where `current` is the parent. What stands in a place
    already changes nothing, so a unit that is there needs no row. A task's metrics are `current`'s
    own, not changes to the parent's.
    """
    totals: Totals = {}
    for batch in batches:
        _accumulate(totals, score_batch(parent, units, batch, tell, current).items())
    for portion in answers:
        _accumulate(totals, score_answers(current, units, portion, tell).items())
    return _means(totals[()]), _rows(totals)


Totals = dict[tuple, dict[str, float]]


def score_all(
    parent: Transformer,
    units: Units,
    batches: Sequence[Batch],
    run: Run,
    answers: Sequence[Answers] = (),
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(the parent's own metrics, rows {layer, kind, word, kl, lm_loss, …, task.…, tokens}).

    A row's metrics are changes to the parent's. Finished batches are kept in the run's state, so
    a killed scoring goes on where it was.
    """
    jobs: list[Callable[..., Totals]] = [
        *(functools.partial(score_batch, parent, units, batch) for batch in batches),
        *(functools.partial(score_answers, parent, units, portion) for portion in answers),
    ]
    totals: Totals = {}
    with Progress(run.name, len(jobs) * len(units), "replacements", quiet=run.quiet) as bar:
        for index, job in enumerate(jobs):
            done = run.state_path / f"batch-{index}.json"
            if done.exists():
                bar.advance(len(units), 0)
            else:
                found = [[list(key), sums] for key, sums in job(tell=bar.advance).items()]
                done.parent.mkdir(exist_ok=True)
                atomic_write(done, json.dumps(found))
            _accumulate(totals, ((tuple(k), v) for k, v in json.loads(done.read_text())))
    return _means(totals[()]), _rows(totals)


def _accumulate(totals: Totals, found: Iterable[tuple]) -> None:
    for key, sums in found:
        known = totals.setdefault(key, {})
        for metric, value in sums.items():
            known[metric] = known.get(metric, 0.0) + value


def _weight_of(metric: str) -> str:
    """The sum that a metric's sum is divided by: tokens of text, of answers, or problems."""
    if metric in METRICS:
        return "weight"
    task = metric.removesuffix(".accuracy")
    return f"{task}.tokens" if task == metric else f"{task}.problems"


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    weights = {_weight_of(metric) for metric in METRICS}
    weights |= {key for key in sums if key.endswith((".tokens", ".problems"))}
    return {m: total / sums[_weight_of(m)] for m, total in sums.items() if m not in weights}


def _rows(totals: Totals) -> list[dict[str, Any]]:
    # The parent's own agreement is 1; all else is told as a change.
    own = _means(totals[()]) | {"agreement": 0.0}
    tokens = int(totals[()]["weight"])
    return [
        {
            **{"layer": key[0], "kind": key[1], "word": key[2]},
            **{metric: mean - own[metric] for metric, mean in _means(sums).items()},
            "tokens": tokens,
        }
        for key, sums in totals.items()
        if key
    ]


def stage(config: ScoreConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `score`: write `tables/scores.jsonl`, each word of the library alone in the parent."""
    parent = load_model(inputs["parent"], frozen=True)
    space = read_space(inputs["library"])
    units = load_units(inputs["library"] / "library", parent, space)
    batches = heldout(
        inputs["data"],
        sequence_length=config.sequence_length,
        microbatch_tokens=config.microbatch_tokens,
        tokens=config.tokens,
    )
    answers = load_tasks(
        config.tasks,
        inputs["data"],
        work=config.work,
        limit=config.problems,
        row_length=config.microbatch_tokens,
    )
    own, rows = score_all(parent, units, batches, run, answers)
    for metric, value in own.items():
        if metric not in METRICS:
            run.say(f"the parent's own {metric}: {value:.4f}")
    run.write_json("parent", own)
    run.write_table("scores", rows)
    write_space(space, run)
    run.write_json("block_influence", read_json(inputs["library"], "block_influence"))
