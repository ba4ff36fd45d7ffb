"""Replace-one scoring with reused states, against a whole forward pass a variant.

    python benchmarks/score.py [--model PATH] [--data TEXT] [--tokens 8192] [--rounds 5]

A library is cut from the parent and not trained: its words cost what trained ones cost. Three ways
of scoring all of them on the same batches take turns: tessera's; a forward of the changed model a
variant with the parent's logits kept; and the same with the parent run again for each variant. CPU
seconds, medians, ratios of one round; the numbers they give are compared row by row.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from tessera.data.batch import Batch
from tessera.data.config import DataConfig
from tessera.data.documents import heldout
from tessera.data.prepare import stage as prepare
from tessera.model.checkpoint import load_model
from tessera.model.context import Context
from tessera.model.transformer import Transformer
from tessera.puzzle.library import BlockLibrary, save_library
from tessera.puzzle.score import Units, load_units, score_given
from tessera.puzzle.space import SpaceConfig, build_space
from tessera.puzzle.surgery import collect_statistics
from tessera.runs.run import Run

SHARED = Path(__file__).parents[2] / "shared"
METRICS = ("kl", "lm_loss", "cosine", "agreement")
Rows = dict[tuple, tuple[float, ...]]


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    if not options.model.exists():
        print(f"skipped: {options.model} is not here (--model, --data)")
        return
    with tempfile.TemporaryDirectory() as folder:
        parent, units, batches = work(options, Path(folder))
    ways: dict[str, Callable[[], Rows]] = {
        "reused states": lambda: reused(parent, units, batches),
        "whole forward, parent's logits kept": lambda: naive(parent, units, batches, True),
        "whole forward, parent run again": lambda: naive(parent, units, batches, False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, Rows] = {}
    for _ in range(options.rounds):
        for name, way in ways.items():
            begun = time.process_time()
            found[name] = way()
            seconds[name].append(time.process_time() - begun)
    print(report(options, parent, len(units), seconds, found))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model, text = SHARED / "models/stories260k", SHARED / "data/tinystories/train_head*.txt"
    parser.add_argument("--model", type=Path, default=model, help="a Hugging Face directory")
    parser.add_argument("--data", type=Path, default=text, help="text files")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--microbatch", type=int, default=2048, help="tokens at once, all ways")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def work(options: argparse.Namespace, folder: Path) -> tuple[Transformer, Units, Sequence[Batch]]:
    with Run.open(folder / "data", stage="data", config={}, inputs={}, seed=0, quiet=True) as run:
        settings = DataConfig(paths=str(options.data), end="bos", heldout=0.05)
        prepare(settings, run, {"model": options.model})
        run.finish()
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
    return parent, load_units(folder / "library", parent, space), batches


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


def report(
    options: argparse.Namespace,
    parent: Transformer,
    units: int,
    seconds: dict[str, list[float]],
    found: dict[str, Rows],
) -> str:
    first = next(iter(seconds))
    shape = parent.config
    lines = [
        f"{options.model.name} ({shape.num_hidden_layers} layers, hidden {shape.hidden_size}, "
        f"vocabulary {shape.vocab_size}): {units} replacements on {options.tokens} tokens, "
        f"1 thread, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}",
        "",
        "| way | CPU s, median | reused states cost of it | largest difference of a KL |",
        "|---|--:|--:|--:|",
    ]
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds[first], times, strict=True)]
        apart = max(abs(found[name][key][0] - found[first][key][0]) for key in found[first])
        lines.append(
            f"| {name} | {statistics.median(times):.2f} | {statistics.median(ratios):.1%} "
            f"| {apart:.1e} |"
        )
    worst = [
        max(abs(a[i] - b[i]) for rows in found.values() for a, b in zip(
            rows.values(), found[first].values(), strict=True
        ))
        for i in range(len(METRICS))
    ]  # fmt: skip
    told = ", ".join(f"{m} {value:.1e}" for m, value in zip(METRICS, worst, strict=True))
    return "\n".join([*lines, "", f"Largest difference of any number: {told}."])


if __name__ == "__main__":
    main()
