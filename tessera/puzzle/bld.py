"""Block-wise local distillation: the whole library in one pass over the parent (Puzzle §2.3).

    attention a_j trained in [a_j, f_parent],  FFN f_k in [a_parent, f_k],  both in [a_j, f_k]
    ℓ = ‖o_parent - o_unit‖² / mean ‖o_parent‖²        o the output of the whole block

Stage `couple` trains pairs jointly that searches chose; scores and a search again follow it.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from tessera import dist
from tessera.data.batch import Batch
from tessera.model.config import KINDS, ModelConfig, Variant, parse
from tessera.model.transformer import Transformer
from tessera.objectives.lm import documents
from tessera.puzzle.library import (
    BlockLibrary,
    LibraryError,
    layer_groups,
    link_library,
    load_unit,
    save_library,
    trainable_units,
    unit_file,
)
from tessera.puzzle.space import (
    Space,
    SpaceConfig,
    Unit,
    build_space,
    forbidden_pairs,
    layer_numbers,
    layers_of,
    read_space,
    write_space,
)
from tessera.puzzle.surgery import Importance, ParentStatistics, collect_statistics, walk
from tessera.runs.recipe import Config
from tessera.runs.run import Run, read_json
from tessera.train.engine import Objective, Stats, Trainer
from tessera.train.flops import Work, block_cost, kept, subblock_cost, working
from tessera.train.optim import DocumentTrainConfig, TrainConfig

Words = Sequence[Sequence[str]]
WEIGHT, TRAINED = 4, 16  # bytes a parameter: frozen; with gradient and Adam's two moments


class LocalConfig(Config):
    """How long each unit trains, in which layers, and how many layers at once: each group of layers
    is a pass over the data of its own, to the same weights, in less memory."""

    train: DocumentTrainConfig
    layers: str | None = None  # "0-19, 31"; all of them unless given
    layers_at_once: int | None = Field(default=None, ge=1)  # all of them unless given
    calibration_tokens: int = Field(default=16_384, ge=1)  # for loss scales and channel importance

    @field_validator("train")
    @classmethod
    def _check_dtype(cls, value: TrainConfig) -> TrainConfig:
        if value.dtype != "float32":
            raise ValueError(
                f'dtype = "{value.dtype}" trains whole models only; here it must be "float32"'
            )
        return value

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, value: str | None) -> str | None:
        if value is not None:
            layer_numbers(value)
        return value


class BLDConfig(LocalConfig):
    space: SpaceConfig = SpaceConfig()
    importance: Importance = "iterative"


class BLD(Objective):
    def __init__(self, parent: Transformer, statistics: ParentStatistics) -> None:
        self.parent = parent
        self.scales = statistics.output_scale  # per layer: mean over tokens of ‖o_parent‖²

    def losses(self, module: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Stats]]:
        assert isinstance(module, BlockLibrary)
        for number, (layer, _) in enumerate(walk(self.parent, batch, module.last_layer + 1)):
            weight = batch.weight / self.scales[number]
            total, stats = layer.x.new_zeros((), dtype=torch.float32), {}
            for unit, trained in module.units(number):
                difference = layer.replaced(unit.kind, trained) - layer.out
                loss = (difference.float().square().sum(-1) * weight).sum()
                total, stats[_metric(unit)] = total + loss, loss.detach()
            if stats:
                yield total, stats

    def groups(self, module: nn.Module) -> Mapping[str, Sequence[nn.Parameter]]:
        assert isinstance(module, BlockLibrary)
        return {key: list(unit.parameters()) for key, unit in module.items()}

    def flops(self, module: nn.Module, batch: Batch) -> int:
        """The parent up to the last layer with units, the units, and the FFN behind attentions."""
        assert isinstance(module, BlockLibrary)
        config = self.parent.config
        work, total = Work.of(batch, config.sliding_window), 0
        for layer in range(module.last_layer + 1):
            total += block_cost(config, layer).forward(work)
            for unit, _ in module.units(layer):
                costs = [subblock_cost(config, parse(word)) for _, word in unit.parts]
                total += sum(cost.training(work) for cost in costs)
                if unit.kind == "attention":  # forward, and the gradient of what enters
                    total += 2 * subblock_cost(config, config.blocks[layer].ffn).forward(work)
        return total

    @torch.no_grad()
    def measure(self, module: BlockLibrary, batches: Sequence[Batch]) -> dict[Unit, float]:
        sums: dict[str, float] = {}
        for batch in batches:
            for _, stats in self.losses(module, batch):
                for key, value in stats.items():
                    sums[key] = sums.get(key, 0.0) + float(value)
        weight = sum(float(self.weight(batch)) for batch in batches)
        units = [unit for layer in range(module.last_layer + 1) for unit, _ in module.units(layer)]
        return {unit: sums[_metric(unit)] / weight for unit in units}


def _metric(unit: Unit) -> str:
    return f"bld/{unit.layer:02d}.{unit.kind}.{unit.word}"


def train_units(
    units: Sequence[Unit],
    make: Callable[[Sequence[Unit]], BlockLibrary],
    objective: BLD,
    config: LocalConfig,
    run: Run,
    data: Path,
) -> None:
    """Train units, some layers at a time, each group written to the run's library when it is done
    and skipped when it is there. make: these units, untrained."""
    groups = layer_groups(units, config.layers_at_once)
    for number, group in enumerate(groups):
        if all(unit_file(run.path / "library", unit).exists() for unit in group):
            continue
        library = make(group)
        config.train.placement.units(library.values())
        source = documents(data, config.train, run.seed)
        trainer = Trainer(library, objective, source, config.train, run)
        trainer.as_part(number, len(groups)).fit()
        save_library(library, run.path / "library")
        if dist.is_main():
            trainer.states.remove()


def calibration(config: LocalConfig, data: Path, seed: int, device: torch.device) -> list[Batch]:
    """What statistics are taken over: the same in every process."""
    source = documents(data, config.train, seed, alike=True)
    return [batch.to(device) for batch in source.heldout_batches(config.calibration_tokens)]


def units_of(config: BLDConfig, parent: ModelConfig, run: str) -> tuple[Space, list[Unit]]:
    layers = layers_of(config.layers, parent, f"{run}.layers")
    space = build_space(config.space, parent).restrict(layers)
    return space, trainable_units(space)


@dataclass(frozen=True)
class Memory:
    """Bytes that training units takes; `activations`, what one layer's units save in a microbatch,
    are an estimate for float32."""

    parent: int
    units: int
    activations: int
    layers_at_once: int
    layers: int

    @property
    def total(self) -> int:
        return self.parent + self.units + self.activations

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total}

    def __str__(self) -> str:
        return (
            f"memory about {_bytes(self.total)}: parent {_bytes(self.parent)}, units "
            f"{_bytes(self.units)} ({self.layers_at_once} of {self.layers} layers at once, "
            f"{TRAINED} bytes a parameter), activations about {_bytes(self.activations)}"
        )


def training_memory(
    parent: ModelConfig, units: Sequence[Unit], layers_at_once: int | None, microbatch_tokens: int
) -> Memory:
    groups = layer_groups(units, layers_at_once)
    sizes = [sum(unit_params(parent, *unit[1:]) for unit in group) for group in groups]
    return Memory(
        parent=WEIGHT * parent.num_params(),
        units=TRAINED * max(sizes, default=0),
        activations=round(WEIGHT * microbatch_tokens * kept_numbers(parent, units)) if units else 0,
        layers_at_once=max((len({unit.layer for unit in group}) for group in groups), default=0),
        layers=len({unit.layer for unit in units}),
    )


def unit_params(parent: ModelConfig, kind: str, word: str) -> int:
    return sum(parent.subblock_params(k, parse(w)) for k, w in Unit(0, kind, word).parts)


def kept_numbers(parent: ModelConfig, units: Sequence[Unit], *, working_too: bool = True) -> float:
    """Numbers a token that the units of the largest layer keep for their backward; the parent's FFN
    runs behind attention. working_too: and what the widest FFN's backward holds beside that."""
    layers: dict[int, float] = {}
    variants: list[Variant] = []
    for unit in units:
        own = [parse(word) for _, word in unit.parts]
        own += [parent.blocks[unit.layer].ffn] if unit.kind == "attention" else []
        # All units of a layer share what enters; each keeps its distance from the parent instead.
        layers[unit.layer] = layers.get(unit.layer, 0) + sum(kept(parent, v) for v in own)
        variants += own
    most = max(layers.values(), default=0)
    return most + (working(parent, variants) if working_too else 0)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def stage(config: BLDConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `bld`: prune and pool the parent into every word, then train them all at once."""
    parent = config.train.placement.load(inputs["parent"], frozen=True)
    space, units = units_of(config, parent.config, run.name)
    layers = {unit.layer for unit in units}
    batches = calibration(config, inputs["data"], run.seed, parent.device)
    statistics = collect_statistics(parent, batches, config.importance, layers)
    run.say(f"{len(units)} units in {len(layers)} layers")
    make = functools.partial(BlockLibrary.from_parent, parent, space, statistics)
    train_units(units, make, BLD(parent, statistics), config, run, inputs["data"])
    write_space(space, run)
    run.write_json("block_influence", statistics.block_influence)


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


def couple(config: CoupleConfig, run: Run, inputs: dict[str, Any]) -> None:
    """Stage `couple`: a library with the searches' pairs trained jointly, all else linked."""
    parent = config.train.placement.load(inputs["parent"], frozen=True)
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
