"""Replace-one scoring: how much the parent suffers when one subblock is swapped (Puzzle §2.4).

For every layer and word: swap that subblock alone, measure KL(parent ‖ model), the rise of the LM
loss, the cosine distance of the last hidden states and top-1 agreement on held-out tokens, and

    task.NAME           mean -log π of the reference answer's tokens given the prompt, nats a token
    task.NAME.accuracy  share of the problems whose answer greedy decoding would give

on problems. The score of an architecture is the sum over its words: the search is a linear program.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from tessera.data.batch import Batch, best_fit, collate, shift
from tessera.data.documents import heldout
from tessera.data.problems import family, problem
from tessera.data.tokenizer import Tokenizer, load_tokenizer
from tessera.model.checkpoint import load_model
from tessera.model.cpu import multiply
from tessera.model.layers import Subblock
from tessera.model.transformer import Block, Transformer
from tessera.progress import Progress
from tessera.puzzle.library import load_unit
from tessera.puzzle.space import Space, Unit, read_space, write_space
from tessera.puzzle.surgery import walk
from tessera.runs.files import resumable
from tessera.runs.recipe import Config
from tessera.runs.run import Run, read_json
from tessera.train.losses import chunks

METRICS = ("kl", "lm_loss", "cosine", "agreement")
Text = tuple[str, str]  # prompt, answer: together they are the document
Units = dict[Unit, Subblock | Block]
Sums = dict[str, tuple[float, float]]  # metric -> Σ w·metric, Σ w
Totals = dict[tuple, Sums]  # of each unit, and of the model without any under the key ()


class TaskError(ValueError):
    """A task that cannot be scored; the text says which problem and what to change."""


class HeldoutConfig(Config):
    """The held-out text that something is measured on."""

    tokens: int = Field(default=16_384, ge=1)
    microbatch_tokens: int = Field(default=4096, ge=1)
    sequence_length: int = Field(default=256, ge=2)

    def heldout(self, data: Path) -> list[Batch]:
        """The first held-out documents of a data run, always the same."""
        return heldout(
            data,
            sequence_length=self.sequence_length,
            microbatch_tokens=self.microbatch_tokens,
            tokens=self.tokens,
        )


class ScoreConfig(HeldoutConfig):
    """On how many held-out tokens, and on which problems, each replacement is measured.

    tasks: `{ calc = 200 }` for so many held-out problems of a procedural task, and
    `{ mine = "FILE.jsonl" }` for a file of {"prompt": …, "answer": …} lines.
    """

    tasks: dict[str, int | str] = {}
    work: bool = True  # a procedural problem's reference is its whole solution; False: the answer
    problems: int = Field(default=500, ge=1)  # of a file, at most

    @field_validator("tasks")
    @classmethod
    def _check_tasks(cls, value: dict[str, int | str]) -> dict[str, int | str]:
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


@dataclass(frozen=True)
class Answers:
    """One batch of a task's problems; only the tokens of answers are looked at.

    No text is generated: greedy decoding yields the reference iff each of its tokens is the
    likeliest one after the prompt and the reference tokens before it, so one forward pass decides.
    at: flat positions `(N,)` of the predictions of answer tokens; labels `(N,)` those tokens;
    problem `(N,)` which of the batch's `count` problems each belongs to.
    """

    task: str
    batch: Batch
    at: Tensor
    labels: Tensor
    problem: Tensor
    count: int

    @classmethod
    def of(cls, task: str, batch: Batch) -> Answers:
        """batch: rows of problems, one a segment, weight 1 on the predictions of answers."""
        at = batch.weight.flatten().nonzero().squeeze(1)
        row = torch.arange(len(batch.tokens)).repeat_interleave(batch.tokens.shape[1])
        segment = row * batch.tokens.shape[1] + batch.segments.flatten()
        numbers, problem = segment[at].unique(return_inverse=True)
        return cls(task, batch, at, batch.labels.flatten()[at], problem, len(numbers))

    def measure(self, module: Transformer, x: Tensor) -> Sums:
        """Both metrics of a variant of `module` whose last layer leaves x `(B,T,C)`."""
        hidden = module.norm(x).flatten(0, 1)[self.at]
        loss, wrong = 0.0, torch.zeros(self.count, dtype=torch.long)
        for part in chunks(hidden, len(module.head)):
            logits = multiply(hidden[part], module.head).float()
            loss += float(F.cross_entropy(logits, self.labels[part], reduction="sum"))
            missed = logits.argmax(-1) != self.labels[part]
            wrong.index_add_(0, self.problem[part], missed.long())
        return {
            f"task.{self.task}": (loss, float(len(self.at))),
            f"task.{self.task}.accuracy": (float((wrong == 0).sum()), float(self.count)),
        }


def load_tasks(config: ScoreConfig, data: Path) -> list[Answers]:
    """The problems of every task, tokenised as the documents of the data run are."""
    tokenizer, bos = load_tokenizer(data), bool(read_json(data, "data")["bos"])
    found = []
    for name, source in config.tasks.items():
        if isinstance(source, str):
            texts = read_problems(Path(source), config.problems)
        else:
            texts = list(procedural_problems(name, source, config.work))
        problems = [encode(tokenizer, text, bos) for text in texts]
        found += pack_problems(name, problems, config.microbatch_tokens, tokenizer.pad_id)
    return found


def procedural_problems(name: str, count: int, work: bool) -> Iterator[Text]:
    """Held-out problems of a procedural task, as their documents are written.

    With `work` the reference is the whole solution, without it the answer alone.
    """
    for index in range(count):
        one = problem(name, 0, index, "heldout")
        text = one.text(work)
        prompt = f"{one.question}\n" + ("Work:" if work else "Answer:")
        yield prompt, text.removeprefix(prompt)


def read_problems(file: Path, limit: int) -> list[Text]:
    """The first `limit` problems of a file, one {"prompt": …, "answer": …} a line.

    Raises TaskError naming the line that is none.
    """
    found: list[Text] = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if len(found) == limit:
                break
            if line.strip():
                found.append(_problem(line, f"{file}, line {number}"))
    if not found:
        raise TaskError(f"{file} holds no problem")
    return found


def _problem(line: str, where: str) -> Text:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TaskError(f"{where}: no JSON: {error}") from None
    match row:
        case {"prompt": str(prompt), "answer": str(answer)} if prompt and answer:
            return prompt, answer
    raise TaskError(f'{where}: give an object {{"prompt": "…", "answer": "…"}} of texts')


def encode(tokenizer: Tokenizer, text: Text, bos: bool) -> tuple[list[int], int]:
    """(ids of the document, where its answer begins).

    The document is tokenised whole, as in training; the answer begins at the first id that the
    prompt alone does not begin with.
    """
    prompt = tokenizer.encode(text[0], bos)
    whole = tokenizer.encode(text[0] + text[1], bos)
    pairs = zip(prompt, whole, strict=False)
    return whole, next((i for i, (a, b) in enumerate(pairs) if a != b), len(prompt))


def pack_problems(
    task: str, problems: Sequence[tuple[Sequence[int], int]], row_length: int, pad_id: int
) -> list[Answers]:
    """Problems (ids, where the answer begins) in batches of one row.

    Raises TaskError for a problem that no row holds, and for one without a prompt or an answer.
    """
    samples = []
    for number, (ids, start) in enumerate(problems, 1):
        if not 0 < start < len(ids) <= row_length + 1:
            raise TaskError(
                f"task {task}: problem {number} has {start} tokens of prompt and {len(ids) - start}"
                f" of answer; give at least one of each, and no more than score.microbatch_tokens "
                f"= {row_length} together"
            )
        samples.append(shift(ids, (np.arange(len(ids)) >= start).astype(float).tolist()))
    lengths = [len(sample) for sample in samples]
    length = min(row_length, sum(lengths))  # a few problems need no row of full length
    return [
        Answers.of(task, collate([[samples[i] for i in row]], length, pad_id))
        for row in best_fit(lengths, length)
    ]


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
    def of(cls, parent: Transformer, batch: Batch) -> Target:
        *_, (last, _) = walk(parent, batch)
        hidden = parent.norm(last.out).flatten(0, 1)
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

    def measure(self, x: Tensor) -> Sums:
        """The `METRICS` of a variant whose last layer leaves x `(B,T,C)`."""
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
            for metric, values in zip(METRICS, (kl, level - label, cosine, same), strict=True):
                sums[metric] += float(values @ weight)
        total = float(self.weight.sum())
        return {metric: (value, total) for metric, value in sums.items()}


@torch.no_grad()
def score_batch(
    parent: Transformer,
    units: Units,
    batch: Batch,
    advance: Callable[[], None] = lambda: None,
    current: Transformer | None = None,
) -> Totals:
    """The metrics of every unit put alone into `current`, on one batch; `advance` after each.

    `current` is the parent itself unless given; metrics are always against the parent. The key
    `()` holds `current`'s own.
    """
    target = Target.of(parent, batch)
    return _each_variant(current or parent, units, batch, target.measure, advance)


@torch.no_grad()
def score_answers(
    current: Transformer,
    units: Units,
    answers: Answers,
    advance: Callable[[], None] = lambda: None,
) -> Totals:
    """`score_batch` for a batch of problems."""
    measure = functools.partial(answers.measure, current)
    return _each_variant(current, units, answers.batch, measure, advance)


def _each_variant(
    current: Transformer,
    units: Units,
    batch: Batch,
    measure: Callable[[Tensor], Sums],
    advance: Callable[[], None],
) -> Totals:
    totals: Totals = {}
    for key, x in variants(current, units, batch):
        totals[key] = measure(x)
        if key:
            advance()
    return totals


def variants(current: Transformer, units: Units, batch: Batch) -> Iterator[tuple[tuple, Tensor]]:
    """What the last layer leaves `(B,T,C)`: of `current` under the key (), then with each unit.

    The hidden states below a replaced layer are `current`'s own and computed once a batch, so a
    replacement at layer l costs L - l layers, not L.
    """
    layers = [layer for layer, _ in walk(current, batch)]
    yield (), layers[-1].out
    for unit, module in units.items():
        x = layers[unit.layer].replaced(unit.kind, module)
        for layer in layers[unit.layer + 1 :]:
            x = layer.block(x, layer.context)
        yield unit, x


def load_units(library: Path, parent: Transformer, space: Space) -> Units:
    """Every replacement of the space, trained; `noop` included, and pairs trained together."""
    return {
        unit: load_unit(library, parent.config, unit).requires_grad_(False)
        for unit in (*space.replacements(), *space.pairs)
    }


def score_given(
    parent: Transformer,
    current: Transformer,
    units: Units,
    batches: Sequence[Batch],
    answers: Sequence[Answers] = (),
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(`current`'s own metrics against the parent, the change that each unit alone makes to them).

    The rows are those of `score_all` where `current` is the parent. What stands in a place
    already changes nothing, so a unit that is there needs no row. A task's metrics are `current`'s
    own, not changes to the parent's.
    """
    totals: Totals = {}
    for batch in batches:
        _accumulate(totals, score_batch(parent, units, batch, current=current).items())
    for portion in answers:
        _accumulate(totals, score_answers(current, units, portion).items())
    return _means(totals[()]), _rows(totals)


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
            file = run.state_path / f"batch-{index}.json"
            if file.exists():
                bar.advance(len(units), 0)
            found = resumable(file, lambda job=job: [*job(advance=bar.advance).items()])
            _accumulate(totals, found)
    return _means(totals[()]), _rows(totals)


def _accumulate(totals: Totals, found: Iterable[Sequence[Any]]) -> None:
    for key, sums in found:
        known = totals.setdefault(tuple(key), {})
        for metric, (value, weight) in sums.items():
            before = known.get(metric, (0.0, 0.0))
            known[metric] = before[0] + value, before[1] + weight


def _means(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    return {metric: value / weight for metric, (value, weight) in sums.items()}


def _rows(totals: Totals) -> list[dict[str, Any]]:
    # The parent's own agreement is 1; all else is told as a change.
    own = _means(totals[()]) | {"agreement": 0.0}
    tokens = int(totals[()]["kl"][1])
    return [
        {
            **Unit(*unit)._asdict(),
            **{metric: mean - own[metric] for metric, mean in _means(sums).items()},
            "tokens": tokens,
        }
        for unit, sums in totals.items()
        if unit
    ]


def stage(config: ScoreConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `score`: write `tables/scores.jsonl`, each word of the library alone in the parent."""
    parent = load_model(inputs["parent"], frozen=True)
    space = read_space(inputs["library"])
    units = load_units(inputs["library"] / "library", parent, space)
    batches, answers = config.heldout(inputs["data"]), load_tasks(config, inputs["data"])
    own, rows = score_all(parent, units, batches, run, answers)
    for metric, value in own.items():
        if metric not in METRICS:
            run.say(f"the parent's own {metric}: {value:.4f}")
    run.write_json("parent", own)
    run.write_table("scores", rows)
    write_space(space, run)
    run.write_json("block_influence", read_json(inputs["library"], "block_influence"))
