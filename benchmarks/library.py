"""The block library: scoring it with reused states, training it in one pass.

    python benchmarks/library.py score [--model PATH] [--data TEXT] [--tokens 8192]
    python benchmarks/library.py bld [--model PATH] [--data TEXT] [--steps 20] [--every 3]

score: a library is cut from the parent and not trained: its words cost what trained ones cost.
Three ways of scoring all of them on the same batches take turns: tessera's; a forward of the
changed model a variant with the parent's logits kept; and the same with the parent run again for
each variant. CPU seconds, medians, ratios of one round; the numbers are compared row by row.

bld: all units in one pass over the parent, against each unit trained alone. Both go through the
real Trainer with the recipe's space, batches and optimizer. A unit alone needs the parent only up
to its own layer, and gets no more; every third unit is trained alone and the sum is scaled up. CPU
seconds, the crowd measured before and after the units. The share of the parent's forward is that of
the same batches run through the parent by themselves.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import harness
import torch
import torch.nn.functional as F
from harness import (
    DATA,
    MODELS,
    Command,
    alternate,
    median,
    need,
    ratio,
    table,
    tiny_model,
    tiny_texts,
)
from training import open_run

from tessera.data.batch import Batch
from tessera.data.config import DataConfig
from tessera.data.documents import Documents, heldout
from tessera.data.prepare import stage as prepare
from tessera.model.checkpoint import load_model
from tessera.model.context import Context
from tessera.model.transformer import Transformer
from tessera.objectives.lm import documents
from tessera.puzzle.bld import BLD
from tessera.puzzle.library import BlockLibrary, save_library
from tessera.puzzle.score import LibraryUnits, Units, score_given
from tessera.puzzle.space import Space, SpaceConfig, build_space
from tessera.puzzle.surgery import ParentStatistics, collect_statistics
from tessera.train.engine import Trainer
from tessera.train.optim import TrainConfig

METRICS = ("kl", "lm_loss", "cosine", "agreement")


Rows = dict[tuple, tuple[float, ...]]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=MODELS / "stories260k", help="a directory")
    text = DATA / "tinystories/train_head*.txt"
    parser.add_argument("--data", default=str(text), help="text files")


def prepared(options: argparse.Namespace, folder: Path) -> None:
    """A data run in folder / "data"; in a smoke run, of made-up texts for a random model."""
    if options.smoke:
        options.model, options.data = tiny_model(folder / "model"), str(folder / "texts.txt")
        Path(options.data).write_text("\n<|endoftext|>\n".join(tiny_texts(600)))
    need(options.model, hint="--model, --data")
    with open_run(folder / "data", "data") as run:
        config = DataConfig(paths=options.data, end="bos", heldout=0.05)
        prepare(config, run, {"model": options.model})
        run.finish()


# Scoring


def score(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prepared(options, Path(folder))
        parent, units, batches = work(options, Path(folder))
    found: dict[str, Rows] = {}

    def timed(name: str, way: Callable[[], Rows]) -> dict[str, float]:
        begun = time.process_time()
        found[name] = way()
        return {"cpu": time.process_time() - begun}

    ways: dict[str, Callable[[], Rows]] = {
        "reused states": lambda: reused(parent, units, batches),
        "whole forward, parent's logits kept": lambda: naive(parent, units, batches, True),
        "whole forward, parent run again": lambda: naive(parent, units, batches, False),
    }
    seconds = alternate({n: partial(timed, n, way) for n, way in ways.items()}, options.rounds)
    first = next(iter(ways))
    shape = parent.config
    table(
        [
            {
                "way": name,
                "CPU s, median": f"{median(times, 'cpu'):.2f}",
                "reused states cost of it": f"{ratio(seconds[first], times, 'cpu'):.1%}",
                **{
                    f"largest difference: {m}": f"{apart(found[name], found[first], i):.1e}"
                    for i, m in enumerate(METRICS)
                },
            }
            for name, times in seconds.items()
        ],
        f"{options.model.name} ({shape.num_hidden_layers} layers, hidden {shape.hidden_size}, "
        f"vocabulary {shape.vocab_size}): {len(units)} replacements on {options.tokens} tokens",
    )


def apart(a: Rows, b: Rows, metric: int) -> float:
    return max(abs(a[key][metric] - b[key][metric]) for key in b)


def score_options(parser: argparse.ArgumentParser) -> None:
    arguments(parser)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--microbatch", type=int, default=2048, help="tokens at once, all ways")


def work(options: argparse.Namespace, folder: Path) -> tuple[Transformer, Units, Sequence[Batch]]:
    parent = load_model(options.model, frozen=True)
    batches = heldout(
        folder / "data",
        sequence_length=256,
        microbatch_tokens=options.microbatch,
        tokens=options.tokens,
    )
    space = build_space(SpaceConfig(), parent.config)
    statistics_ = collect_statistics(parent, batches[:1])
    save_library(BlockLibrary.from_parent(parent, space, statistics_), folder / "library")
    return parent, dict(LibraryUnits.of(folder / "library", parent, space)), batches


def reused(parent: Transformer, units: Units, batches: Sequence[Batch]) -> Rows:
    _, rows = score_given(parent, parent, units, batches)
    return {(r["layer"], r["kind"], r["word"]): tuple(r[m] for m in METRICS) for r in rows}


@torch.no_grad()
def naive(parent: Transformer, units: Units, batches: Sequence[Batch], keep: bool) -> Rows:
    """Each unit put into the parent in turn, and the whole model run."""
    kept = [forward(parent, batch) for batch in batches] if keep else None
    found: Rows = {}
    for (layer, kind, word), unit in units.items():
        sums, own_loss, weight = torch.zeros(4), 0.0, 0.0
        for index, batch in enumerate(batches):
            hidden, log_p = kept[index] if kept else forward(parent, batch)
            old = parent.replace(layer, kind, unit)  # type: ignore[arg-type]
            own, log_q = forward(parent, batch)
            parent.replace(layer, kind, old)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            labels = batch.labels.flatten()[:, None]
            loss = -log_q.gather(1, labels).squeeze(1)
            parents = -log_p.gather(1, labels).squeeze(1)
            cosine = 1 - F.cosine_similarity(own, hidden, dim=-1)
            same = (log_q.argmax(-1) == log_p.argmax(-1)).float()
            w = batch.weight.flatten()
            sums += torch.stack([column @ w for column in (kl, loss, cosine, same)])
            own_loss, weight = own_loss + float(parents @ w), weight + float(w.sum())
        sums[1] -= own_loss
        found[layer, kind, word] = tuple((sums / weight).tolist())
    return found


def forward(module: Transformer, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = module(batch.tokens, Context(batch.positions, batch.segments)).flatten(0, 1)
    return hidden, F.log_softmax(module.logits(hidden).float(), dim=-1)


# Training


class Work:
    """Parent, statistics and data: what every training of units starts from."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        prepared(options, folder)
        self.folder, self.model = folder, options.model
        self.config = TrainConfig(
            steps=options.steps,
            tokens_per_step=4096,
            microbatch_tokens=2048,
            sequence_length=256,
            lr=2e-3,
            save_seconds=1e9,
        )
        parent = self.parent()
        self.statistics: ParentStatistics = collect_statistics(
            parent, self.source().heldout_batches(16_384)
        )
        self.space: Space = build_space(SpaceConfig(), parent.config)

    def parent(self) -> Transformer:
        return load_model(self.model, frozen=True)

    def source(self) -> Documents:
        return documents(self.folder / "data", self.config, 0)

    def library(self) -> BlockLibrary:
        return BlockLibrary.from_parent(self.parent(), self.space, self.statistics)

    def train(self, library: BlockLibrary, parent: Transformer) -> float:
        """CPU seconds of all steps."""
        with (
            tempfile.TemporaryDirectory(dir=self.folder) as path,
            open_run(Path(path), "bld") as run,
        ):
            objective = BLD(parent, self.statistics)
            trainer = Trainer(library, objective, self.source(), self.config, run)
            begun = time.process_time()
            trainer.fit()
            return time.process_time() - begun


def bld(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Work(options, Path(folder))
        keys = list(work.library())
        first = work.train(work.library(), work.parent())
        sample = keys[1 :: options.every]
        alone = sum(train_alone(work, key) for key in sample) * len(keys) / len(sample)
        crowd = (first + work.train(work.library(), work.parent())) / 2
        forward = parent_forward(work)
    row = {
        "whole library in one pass, CPU s": f"{crowd:.1f}",
        "sum of units alone, CPU s": f"{alone:.1f}",
        "ratio": f"{alone / crowd:.2f}",
        "parent's forward, CPU s": f"{forward:.2f}",
        "share of the one pass": f"{forward / crowd:.1%}",
    }
    table(
        [row],
        f"{options.model.name}: {len(keys)} units ({len(sample)} of them measured alone), "
        f"{options.steps} steps of 4096 tokens",
    )


def bld_options(parser: argparse.ArgumentParser) -> None:
    arguments(parser)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=3, help="train every n-th unit alone")


def train_alone(work: Work, key: str) -> float:
    """CPU seconds of one unit with the parent cut behind its layer."""
    library, parent = work.library(), work.parent()
    for other in set(library) - {key}:
        del library[other]
    parent.layers = parent.layers[: int(key.split("/")[0]) + 1]
    return work.train(library, parent)


@torch.no_grad()
def parent_forward(work: Work) -> float:
    """CPU seconds of the parent's layers over the batches of all steps."""
    parent, source = work.parent(), work.source()
    begun = time.process_time()
    for step in range(work.config.steps):
        for batch in source.batches(step):
            for _ in parent.hidden_states(batch.tokens, Context(batch.positions, batch.segments)):
                pass
    return time.process_time() - begun


if __name__ == "__main__":
    harness.main(
        __doc__,
        {
            "score": Command(score, score_options, {"tokens": 1024}, rounds=5),
            "bld": Command(bld, bld_options, {"steps": 2, "every": 8}),
        },
    )
