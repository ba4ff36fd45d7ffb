"""Coupled block-wise distillation: pairs that a search chose, trained jointly (Puzzle §2.3).

    decoupled BLD, score, search   ->   couple   ->   score, search again

The space is shrunk first to the few words of each kind that the searches took most often. Each
pair begins with the weights its words have and is written beside links to the library it came from.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from tessera import dist
from tessera.model.config import KINDS, ModelConfig
from tessera.puzzle.bld import BLD, LocalConfig, calibration, train_units, unit_params
from tessera.puzzle.library import (
    BlockLibrary,
    LibraryError,
    layer_groups,
    link_library,
    load_unit,
)
from tessera.puzzle.space import (
    Space,
    Unit,
    forbidden_pairs,
    layers_of,
    read_space,
    write_space,
)
from tessera.puzzle.surgery import collect_statistics
from tessera.runs.run import Run, read_json

Words = Sequence[Sequence[str]]


class CoupleConfig(LocalConfig):
    """How many of the most-chosen words of each kind are paired (the defaults are the paper's), and
    whether a layer trains all their pairs or only those that a solution holds there."""

    attention: int = Field(default=4, ge=1)
    ffn: int = Field(default=3, ge=1)
    pairs: Literal["product", "chosen"] = "product"


def most_chosen(architectures: Iterable[Words], kind: str, most: int) -> list[str]:
    """At most `most` words of a kind, by how many places hold them; of equals the one met first."""
    column = KINDS.index(kind)
    counts = Counter(pair[column] for words in architectures for pair in words)
    return [word for word, _ in counts.most_common(most)]


def choose_pairs(
    config: CoupleConfig,
    space: Space,
    parent: ModelConfig,
    architectures: Sequence[Words],
    layers: Sequence[int],
) -> list[Unit]:
    """Every pair to train, by layer: not the parent's, one without weights, one that the library
    holds already, or one that an engine of the space cannot load."""
    kept = [most_chosen(architectures, kind, getattr(config, kind)) for kind in KINDS]
    refused = forbidden_pairs(space, parent, space.servable)
    found = []
    for layer in layers:
        chosen = {tuple(words[layer]) for words in architectures}
        without = {parent.words[layer], ("noop", "noop")} | refused[layer]
        for words in itertools.product(*kept):
            offered = all(w in of for w, of in zip(words, space.layers[layer], strict=True))
            pair = Unit.pair(layer, *words)
            wanted = config.pairs == "product" or words in chosen
            if offered and wanted and words not in without and pair not in space.pairs:
                found.append(pair)
    return found


def largest_pairs(config: CoupleConfig, space: Space, parent: ModelConfig, run: str) -> list[Unit]:
    """The pairs of the words of most parameters: no search can choose more to train."""
    found = []
    for layer in layers_of(config.layers, parent, f"{run}.layers"):
        largest = [
            sorted(words, key=lambda word, kind=kind: -unit_params(parent, kind, word))
            for kind, words in zip(KINDS, space.layers[layer], strict=True)
        ]
        product = itertools.product(largest[0][: config.attention], largest[1][: config.ffn])
        found += [Unit.pair(layer, *words) for words in product]
    return found


def stage(config: CoupleConfig, run: Run, inputs: dict[str, Any]) -> None:
    """Stage `couple`: a library with the searches' pairs trained jointly, all else linked."""
    parent = config.train.spread.load(inputs["parent"], frozen=True)
    source = inputs["library"] / "library"
    space = read_space(inputs["library"])
    layers = layers_of(config.layers, parent.config, f"{run.name}.layers")
    found = [a["words"] for path in inputs["searches"] for a in read_json(path, "architectures")]
    pairs = choose_pairs(config, space, parent.config, found, layers)
    if not pairs:
        raise LibraryError(
            f"{run.name}: the searches' words make no pair to train: raise attention (now "
            f"{config.attention}) or ffn (now {config.ffn}), or search under tighter constraints"
        )
    run.say(f"{len(pairs)} pairs in {len({pair.layer for pair in pairs})} layers")
    batches = calibration(config, inputs["data"], run.seed, parent.device)
    objective = BLD(parent, collect_statistics(parent, batches))

    apart = functools.partial(BlockLibrary.from_pairs, parent, source)
    train_units(pairs, apart, objective, config, run, inputs["data"])
    if dist.is_main():
        link_library(source, run.path / "library")
    dist.barrier()
    rows: list[dict[str, Any]] = []
    for group in layer_groups(pairs, config.layers_at_once):
        joint = BlockLibrary(
            {str(unit): load_unit(run.path / "library", parent.config, unit) for unit in group}
        ).to(parent.device)
        before, after = (objective.measure(m, batches) for m in (apart(group), joint))
        rows += [
            {"layer": unit.layer, "word": unit.word, "apart": before[unit], "joint": after[unit]}
            for unit in group
        ]
    run.write_table("pairs", rows)
    means = {key: sum(row[key] for row in rows) / len(rows) for key in ("apart", "joint")}
    run.say(
        f"block loss, a mean over {len(rows)} pairs: {means['apart']:.4f} apart, "
        f"{means['joint']:.4f} together"
    )
    write_space(replace(space, pairs=tuple(sorted({*space.pairs, *pairs}))), run)
    run.inherit(inputs["library"], "block_influence")
