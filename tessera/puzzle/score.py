"""Replace-one scoring: how much the parent suffers when one subblock is swapped (Puzzle §2.4).

On held-out text: KL(parent ‖ model), LM loss, cosine distance of the last hidden states, top-1
agreement. On problems: `task.NAME`, mean -log π of the reference answer's tokens, and
`task.NAME.accuracy`, the share of problems whose answer greedy decoding would give.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from tessera import dist
from tessera.data.batch import Batch, best_fit, collate, shift
from tessera.data.documents import heldout
from tessera.data.problems import family, problem
from tessera.data.tokenizer import Tokenizer, load_tokenizer
from tessera.model.checkpoint import open_model
from tessera.model.config import name as word_of
from tessera.model.cpu import multiply
from tessera.model.layers import Subblock
from tessera.model.placed import PlacedConfig
from tessera.model.placement import ALONE, HERE, Layout, Placement
from tessera.model.transformer import Block, Transformer
from tessera.progress import Progress
from tessera.puzzle.cost_table import Words
from tessera.puzzle.library import assemble, load_unit
from tessera.puzzle.space import Space, Unit, read_space, write_space
from tessera.puzzle.surgery import walk
from tessera.runs.files import SharedJournal, fingerprint
from tessera.runs.run import Run, read_json
from tessera.train.losses import chunks

METRICS = ("kl", "lm_loss", "cosine", "agreement")
Text = tuple[str, str]  # prompt, answer: together they are the document
Units = Mapping[Unit, Subblock | Block]
Sums = dict[str, tuple[float, float]]  # metric -> Σ w·metric, Σ w
Cell = tuple[int, int]  # a layer, behind the last for the model as it is; one of the batches


class TaskError(ValueError):
    """A task that cannot be scored; the text says which problem and what to change."""


class HeldoutConfig(PlacedConfig):
    """The held-out text that something is measured on."""

    tokens: int = Field(default=16_384, ge=1)
    microbatch_tokens: int = Field(default=4096, ge=1)
    sequence_length: int = Field(default=256, ge=2)

    def heldout(self, data: Path) -> list[Batch]:
        sizes = ("sequence_length", "microbatch_tokens", "tokens")
        batches = heldout(data, **{name: getattr(self, name) for name in sizes})
        return [batch.to(dist.device()) for batch in batches]


class ScoreConfig(HeldoutConfig):
    """tasks: `{ calc = 200 }` for so many held-out problems of a procedural task, and
    `{ mine = "FILE.jsonl" }` for a file of {"prompt": …, "answer": …} lines."""

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
        return [source for source in self.tasks.values() if isinstance(source, str)]


@dataclass(frozen=True)
class Answers:
    """One batch of a task's problems, measured at the tokens of answers.

    Greedy decoding gives the reference iff each of its tokens is the likeliest one there.
    at: flat positions `(N,)` of the predictions of answer tokens; labels `(N,)` those tokens;
    problem `(N,)` which of the batch's `count` problems each belongs to.
    """

    task: str
    batch: Batch
    at: Tensor
    labels: Tensor
    problem: Tensor
    count: int

    def measure(self, module: Transformer, x: Tensor) -> Sums:
        hidden = module.norm(x).flatten(0, 1)[self.at]
        loss, wrong = 0.0, self.labels.new_zeros(self.count)
        for part in chunks(hidden, len(module.head)):
            logits = multiply(hidden[part], module.head).float()
            loss += float(F.cross_entropy(logits, self.labels[part], reduction="sum"))
            missed = logits.argmax(-1) != self.labels[part]
            wrong.index_add_(0, self.problem[part], missed.long())
        return {
            f"task.{self.task}": (loss, float(len(self.at))),
            f"task.{self.task}.accuracy": (float((wrong == 0).sum()), float(self.count)),
        }


def procedural_problems(name: str, count: int, work: bool) -> Iterator[Text]:
    for index in range(count):
        one = problem(name, 0, index, "heldout")
        prompt = f"{one.question}\n" + ("Work:" if work else "Answer:")
        yield prompt, one.text(work).removeprefix(prompt)


def read_problems(file: Path, limit: int) -> list[Text]:
    """The first `limit` problems of a file, one {"prompt": …, "answer": …} a line."""
    found: list[Text] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if len(found) == limit:
            break
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TaskError(f"{where}: no JSON: {error}") from None
        match row:
            case {"prompt": str(prompt), "answer": str(answer)} if prompt and answer:
                found.append((prompt, answer))
            case _:
                raise TaskError(
                    f'{where}: give an object {{"prompt": "…", "answer": "…"}} of texts'
                )
    if not found:
        raise TaskError(f"{file} holds no problem")
    return found


def encode(tokenizer: Tokenizer, text: Text, bos: bool) -> tuple[list[int], int]:
    """(ids of the whole document, as in training; where the prompt's own ids end)."""
    begin = list(tokenizer.beginning(bos))
    prompt = begin + tokenizer.encode(text[0])
    whole = begin + tokenizer.encode(text[0] + text[1])
    pairs = zip(prompt, whole, strict=False)
    return whole, next((i for i, (a, b) in enumerate(pairs) if a != b), len(prompt))


def pack_problems(
    task: str, problems: Sequence[tuple[Sequence[int], int]], row_length: int, pad_id: int
) -> list[Answers]:
    """Problems (ids, where the answer begins) in batches of one row. Raises TaskError."""
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
    found = []
    for row in best_fit(lengths, length):
        batch = collate([[samples[i] for i in row]], length, pad_id).to(dist.device())
        at = batch.weight.flatten().nonzero().squeeze(1)
        numbers, problem = batch.segments.flatten()[at].unique(return_inverse=True)
        labels = batch.labels.flatten()[at]
        found.append(Answers(task, batch, at, labels, problem, len(numbers)))
    return found


@dataclass(frozen=True)
class Target:
    """What every variant is held against on one batch, computed once from the parent.

    With p the parent's distribution, W the head and h a variant's hidden state,

        KL(p ‖ q) = Σ p log p - h·(p W) + log Σ exp(h W),

    so a variant costs one product with the head and one log-sum-exp.
    """

    batch: Batch
    hidden: Tensor  # (N, C), normalised
    negentropy: Tensor  # (N,): Σ p log p
    mean_head: Tensor  # (N, C): Σ p W
    top: Tensor  # (N,): the parent's first choice
    labels: Tensor
    weight: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, parent: Transformer, batch: Batch) -> Target:
        *_, last = walk(parent, batch)
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
        return cls(batch, hidden, entropy, mean, first, labels, weight)

    def measure(self, module: Transformer, x: Tensor) -> Sums:
        hidden, head = module.norm(x).flatten(0, 1), module.head
        sums: dict[str, float] = dict.fromkeys(METRICS, 0.0)
        for part in chunks(hidden, len(head)):
            own, weight = hidden[part], self.weight[part]
            logits = multiply(own, head).float()
            first = logits.argmax(-1, keepdim=True)
            # max z = lse + log max p: softmax passes once over what logsumexp does four times.
            most = torch.softmax(logits, -1).gather(1, first).log_()
            level = (logits.gather(1, first) - most).squeeze(1)
            kl = self.negentropy[part] - (own.float() * self.mean_head[part]).sum(-1) + level
            label = logits.gather(1, self.labels[part, None]).squeeze(1)
            same = (first.squeeze(1) == self.top[part]).float()
            cosine = 1 - F.cosine_similarity(own.float(), self.hidden[part].float(), dim=-1)
            for metric, values in zip(METRICS, (kl, level - label, cosine, same), strict=True):
                sums[metric] += float(values @ weight)
        total = float(self.weight.sum())
        return {metric: (value, total) for metric, value in sums.items()}


@dataclass(frozen=True, eq=False)
class LibraryUnits(Mapping[Unit, Subblock | Block]):
    """Units of a library for a parent, each read when it is asked for; the parent's own words are
    its own subblocks."""

    directory: Path
    parent: Transformer
    units: Sequence[Unit]
    placement: Placement = HERE

    @classmethod
    def of(
        cls, directory: Path, parent: Transformer, space: Space, placement: Placement = HERE
    ) -> LibraryUnits:
        """Every replacement of a space; `noop` included, and pairs trained together."""
        return cls(directory, parent, [*space.replacements(), *space.pairs], placement)

    def __getitem__(self, unit: Unit) -> Subblock | Block:
        own = getattr(self.parent.blocks[unit.layer], unit.kind, None)
        if own is not None and word_of(own.variant) == unit.word:
            return own
        module = load_unit(self.directory, self.parent.config, unit).to(self.parent.head)
        self.placement.split(module, self.parent.config)
        return module.requires_grad_(False)

    def __iter__(self) -> Iterator[Unit]:
        return iter(self.units)

    def __len__(self) -> int:
        return len(self.units)


@torch.no_grad()
def score_cells(
    parent: Transformer,
    current: Transformer,
    units: Units,
    work: Sequence[Batch | Answers],
    cells: Collection[Cell],
) -> Iterator[tuple[Cell, dict[tuple, Sums]]]:
    """The metrics of every unit of a layer, put alone into `current`, on one of the batches; behind
    the last layer, of `current` itself under the key ().

    Layer by layer, so that only one layer's units are in memory. The states below a replaced layer
    are `current`'s own: at layer l a unit costs L - l layers, not L.
    """
    used = {item: work[item] for _, item in sorted(cells, key=lambda cell: cell[1])}
    targets = {
        item: one if isinstance(one, Answers) else Target.of(parent, one)
        for item, one in used.items()
    }
    walks = {item: walk(current, target.batch) for item, target in targets.items()}
    last: dict[int, Tensor] = {}
    for layer in range(len(current.blocks)):
        wanted = [item for item in walks if (layer, item) in cells]
        here = {unit: units[unit] for unit in units if wanted and unit.layer == layer}
        for item, steps in walks.items():
            at = next(steps)
            last[item] = at.out
            if item in wanted:
                found: dict[tuple, Sums] = {}
                for unit, module in here.items():
                    x = at.replaced(unit.kind, module)
                    for block in current.blocks[layer + 1 :]:
                        x = block(x, at.context)
                    found[unit] = targets[item].measure(current, x)
                yield (layer, item), found
    for item, x in last.items():
        if (cell := (len(current.blocks), item)) in cells:
            yield cell, {(): targets[item].measure(current, x)}


def score_given(
    parent: Transformer,
    current: Transformer,
    units: Units,
    batches: Sequence[Batch],
    answers: Sequence[Answers] = (),
    run: Run | None = None,
    layout: Layout = ALONE,
    part: str = "",
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(`current`'s own metrics against the parent; rows {layer, kind, word, kl, …, task.…, tokens},
    the changes that each unit alone makes to them, agreement as it is).

    The tensor groups of the layout share the work. With a run, what is finished is kept in its
    state, so a killed scoring goes on where it was, in any number of processes. part: of a run
    that scores several times, which of them.
    """
    work = [*batches, *answers]
    counts = Counter(unit.layer for unit in units)
    places = itertools.product([*sorted(counts), len(current.blocks)], range(len(work)))
    cells = {f"{layer}/{item}": (layer, item) for layer, item in places}
    file = run and run.state_path / f"scores{part}.jsonl"
    with nullcontext() if file is None else SharedJournal(file) as kept:
        found = {} if kept is None else {key: kept.get(key)["found"] for key in kept}
        mine = layout.mine([cell for key, cell in cells.items() if key not in found])
        known = sum(counts[cells[key][0]] for key in found)
        total = known + sum(counts[layer] for layer, _ in mine)
        label, quiet = (layout.title(run.name), run.quiet) if run else ("", True)
        with Progress(label, total, "replacements", quiet=quiet) as bar:
            bar.advance(known, 0)
            for (layer, item), sums in score_cells(parent, current, units, work, set(mine)):
                key = f"{layer}/{item}"
                found[key] = [*sums.items()]
                if kept is not None:
                    kept.add(key, {"found": found[key]})
                bar.advance(counts[layer])
    found = layout.joined(found)
    totals = _summed(itertools.chain.from_iterable(found[key] for key in cells))
    means = {key: {m: v / w for m, (v, w) in sums.items()} for key, sums in totals.items()}
    own, tokens = means[()], int(totals[()]["kl"][1])
    zero = own | {"agreement": 0.0}
    return own, [
        {
            **unit._asdict(),
            **{metric: mean - zero[metric] for metric, mean in means[unit].items()},
            "tokens": tokens,
        }
        for unit in units
    ]


def _summed(found: Iterable[tuple[Sequence, Sums]]) -> dict[tuple, Sums]:
    totals: dict[tuple, Sums] = {}
    for key, sums in found:
        known = totals.setdefault(tuple(key), {})
        for metric, (value, weight) in sums.items():
            before = known.get(metric, (0.0, 0.0))
            known[metric] = before[0] + value, before[1] + weight
    return totals


class ConditionalConfig(HeldoutConfig):
    """rounds: R. polish: rounds after that, each of at most `changes` (a share) of all places."""

    rounds: int = Field(default=4, ge=1)
    polish: int = Field(default=4, ge=0)
    changes: float = Field(default=0.25, gt=0, le=1)
    tokens: int = Field(default=4096, ge=1)
    microbatch_tokens: int = Field(default=2048, ge=1)


class Rescorer:
    """What replacements do to an architecture; measured once, if there is a run to keep it in."""

    def __init__(
        self,
        config: ConditionalConfig,
        parent: Path,
        library: Path,
        data: Path,
        space: Space,
        run: Run | None = None,
    ) -> None:
        self.run = run
        self.path, self.library, self.space = parent, library / "library", space
        self.placement = config.placement(parent, parent)  # the second: an architecture
        self.parent = self.placement.load(parent, frozen=True)
        self.own = Space(()).units(self.parent.config.words)  # what was taken may come back
        self.batches = config.heldout(data)

    def measure(self, words: Words) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """(the assembled architecture's own metrics, the change each word makes to them)."""
        assembled = assemble(open_model(self.path), self.library, words)
        current = self.placement.load(assembled, frozen=True)
        held = self.space.units(words)
        units = LibraryUnits.of(self.library, self.parent, self.space, self.placement)
        others = replace(units, units=[one for one in (*units, *self.own) if one not in held])
        layout = self.placement.layout
        part = f"-{fingerprint([list(pair) for pair in words])[:12]}"
        own, rows = score_given(
            self.parent, current, others, self.batches, run=self.run, layout=layout, part=part
        )
        unchanged = dict.fromkeys(own, 0.0)
        rows += [{**unit._asdict(), **unchanged} for unit in held]
        return own, rows


def stage(config: ScoreConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `score`: write `tables/scores.jsonl`, each word of the library alone in the parent."""
    placement = config.placement(inputs["parent"])
    parent = placement.load(inputs["parent"], frozen=True)
    space = read_space(inputs["library"])
    units = LibraryUnits.of(inputs["library"] / "library", parent, space, placement)
    batches, answers = config.heldout(inputs["data"]), []
    tokenizer, bos = load_tokenizer(inputs["data"]), bool(read_json(inputs["data"], "data")["bos"])
    for name, source in config.tasks.items():
        if isinstance(source, str):
            texts = read_problems(Path(source), config.problems)
        else:
            texts = list(procedural_problems(name, source, config.work))
        problems = [encode(tokenizer, text, bos) for text in texts]
        answers += pack_problems(name, problems, config.microbatch_tokens, tokenizer.pad_id)
    own, rows = score_given(parent, parent, units, batches, answers, run, placement.layout)
    for metric, value in own.items():
        if metric not in METRICS:
            run.say(f"the parent's own {metric}: {value:.4f}")
    run.write_json("parent", own)
    run.write_table("scores", rows)
    write_space(space, run)
    run.write_json("block_influence", read_json(inputs["library"], "block_influence"))
