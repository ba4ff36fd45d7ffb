"""The block library: all units in one pass over the parent, against each unit trained alone.

    python benchmarks/bld.py [--model PATH] [--data TEXT] [--steps 20] [--every 3] [--threads 1]

Both go through the real Trainer with the recipe's space, batches and optimizer. A unit alone
needs the parent only up to its own layer, and gets no more; every third unit is trained alone
and the sum is scaled up. CPU seconds, the crowd measured before and after the units. The share
of the parent's forward is that of the same batches run through the parent by themselves.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from tessera.data.config import DataConfig
from tessera.data.documents import Documents
from tessera.data.prepare import stage as prepare
from tessera.model.checkpoint import load_model
from tessera.model.context import Context
from tessera.model.transformer import Transformer
from tessera.objectives.lm import documents
from tessera.puzzle.bld import BLD
from tessera.puzzle.library import BlockLibrary
from tessera.puzzle.space import Space, SpaceConfig, build_space
from tessera.puzzle.surgery import ParentStatistics, collect_statistics
from tessera.runs.run import Run
from tessera.train.engine import Trainer
from tessera.train.optim import TrainConfig

SHARED = Path(__file__).parents[2] / "shared"


class Work:
    """Parent, statistics and data: what every training of units starts from."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.folder, self.model = folder, options.model
        self.config = TrainConfig(
            steps=options.steps,
            tokens_per_step=4096,
            microbatch_tokens=2048,
            sequence_length=256,
            lr=2e-3,
            save_seconds=1e9,
        )
        with Run.open(
            folder / "data", stage="data", config={}, inputs={}, seed=0, quiet=True
        ) as run:
            settings = DataConfig(paths=str(options.data), end="bos", heldout=0.05)
            prepare(settings, run, {"model": options.model})
            run.finish()
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
        with tempfile.TemporaryDirectory(dir=self.folder) as path:
            run = Run.open(Path(path), stage="bld", config={}, inputs={}, seed=0, quiet=True)
            objective = BLD(parent, self.statistics)
            trainer = Trainer(library, objective, self.source(), self.config, run)
            begun = time.process_time()
            trainer.fit()
            seconds = time.process_time() - begun
            run.close()
        return seconds


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if not options.model.exists():
        print(f"skipped: {options.model} is not here (--model, --data)")
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Work(options, Path(folder))
        keys = list(work.library())
        first = work.train(work.library(), work.parent())
        sample = keys[1 :: options.every]
        alone = sum(train_alone(work, key) for key in sample) * len(keys) / len(sample)
        crowd = (first + work.train(work.library(), work.parent())) / 2
        forward = parent_forward(work)
    print(report(options, crowd, alone, forward, len(sample), len(keys)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model, text = SHARED / "models/stories260k", SHARED / "data/tinystories/train_head*.txt"
    parser.add_argument("--model", type=Path, default=model, help="a Hugging Face directory")
    parser.add_argument("--data", type=Path, default=text, help="text files")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=3, help="train every n-th unit alone")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


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


def report(
    options: argparse.Namespace, crowd: float, alone: float, forward: float, sample: int, units: int
) -> str:
    return "\n".join(
        [
            f"{options.model.name}: {units} units ({sample} of them measured alone), "
            f"{options.steps} steps of 4096 tokens, {options.threads} thread(s), "
            f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}",
            "",
            "| whole library in one pass, CPU s | sum of units alone, CPU s | ratio "
            "| parent's forward, CPU s | share of the one pass |",
            "|--:|--:|--:|--:|--:|",
            f"| {crowd:.1f} | {alone:.1f} | {alone / crowd:.2f} | {forward:.2f} "
            f"| {forward / crowd:.1%} |",
        ]
    )


if __name__ == "__main__":
    main()
