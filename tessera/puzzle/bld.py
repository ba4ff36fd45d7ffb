"""Block-wise local distillation: the whole library in one pass over the parent (Puzzle §2.3).

    attention a_j trained in [a_j, f_parent],  FFN f_k in [a_parent, f_k],  both in [a_j, f_k]
    ℓ = ‖o_parent - o_unit‖² / mean ‖o_parent‖²        o the output of the whole block

Stage `couple` trains pairs jointly that searches chose; scores and a search again follow it.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from tessera import dist
from tessera.data.batch import Batch
from tessera.model.checkpoint import load_model
from tessera.model.config import KINDS, ModelConfig, Variant, parse
from tessera.model.placement import DTYPES, ParallelConfig
from tessera.model.source import load_config
from tessera.model.transformer import Transformer
from tessera.objectives.lm import documents
from tessera.progress import Progress
from tessera.puzzle.library import (
    BlockLibrary,
    LibraryError,
    link_library,
    load_unit,
    save_library,
    trainable_units,
    unit_file,
)
from tessera.puzzle.ranges import (
    Held,
    by_range,
    held_here,
    layer_groups,
    layer_ranges,
    passes,
    units_cost,
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
from tessera.runs.files import RunError
from tessera.runs.recipe import Config
from tessera.runs.run import Run, read_json
from tessera.train.engine import Objective, Stats, Trainer
from tessera.train.flops import Cost, Work, block_cost, kept, working
from tessera.train.optim import AllLayers, DocumentTrainConfig

Words = Sequence[Sequence[str]]
WEIGHT, TRAINED = 4, 16  # bytes a parameter: frozen; with gradient and Adam's two moments


class LocalConfig(Config):
    """How long each unit trains, in which layers, and how many layers at once in each process: each
    group of layers is a pass over the data of its own, to the same weights, in less memory.

    The parent's layers are dealt to the processes (`ranges.py`); `train.parallel.shard` says among
    how many. The others read other rows.
    """

    train: Annotated[DocumentTrainConfig, AllLayers]
    layers: str | None = None  # "0-19, 31"; all of them unless given
    layers_at_once: int | None = Field(default=None, ge=1)  # all of them unless given
    calibration_tokens: int = Field(default=16_384, ge=1)  # for loss scales and channel importance

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
    """held: the layers of this process that run, all of them unless given."""

    apart = True

    def __init__(
        self, parent: Transformer, statistics: ParentStatistics, held: Held | None = None
    ) -> None:
        self.parent = parent
        self.scales = statistics.output_scale  # per layer: mean over tokens of ‖o_parent‖²
        self.held = held or Held(range(len(parent.blocks)))

    def losses(self, module: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Stats]]:
        assert isinstance(module, BlockLibrary)
        walked = walk(self.parent, batch, self.held)
        for layer, number in zip(walked, self.held.layers, strict=True):
            weight = batch.weight / self.scales[number]
            for unit, trained in module.units(number):
                given, wanted = layer.against(unit.kind, trained)
                loss = _SquaredDistance.apply(weight, wanted, *given)
                yield loss, {_metric(unit): loss.detach()}

    def groups(self, module: nn.Module) -> Mapping[str, Sequence[nn.Parameter]]:
        assert isinstance(module, BlockLibrary)
        return {key: list(unit.parameters()) for key, unit in module.items()}

    def flops(self, module: nn.Module, batch: Batch) -> int:
        assert isinstance(module, BlockLibrary)
        config = self.parent.config
        work = Work.of(batch, config.sliding_window)
        units = [unit for layer in self.held.layers for unit, _ in module.units(layer)]
        blocks = sum((block_cost(config, layer) for layer in self.held.layers), Cost())
        return (blocks + units_cost(config, units)).forward(work)

    @torch.no_grad()
    def measure(self, module: BlockLibrary, batches: Sequence[Batch]) -> dict[Unit, float]:
        sums: dict[str, float] = {}
        for batch in batches:
            for _, stats in self.losses(module, batch):
                for key, value in stats.items():
                    sums[key] = sums.get(key, 0.0) + float(value)
        weight = sum(float(self.weight(batch)) for batch in batches)
        units = [unit for layer in self.held.layers for unit, _ in module.units(layer)]
        return {unit: sums[_metric(unit)] / weight for unit in units}


class _SquaredDistance(torch.autograd.Function):
    """Σ w·‖Σ given - Σ wanted‖² over tokens, in float32; the gradient is made on the way."""

    @staticmethod
    def forward(ctx, weight: Tensor, wanted: Sequence[Tensor], *given: Tensor):  # type: ignore[override]
        difference = given[0].float() - wanted[0]
        for one in given[1:]:
            difference += one
        for one in wanted[1:]:
            difference -= one
        found = torch.linalg.vecdot(difference, difference).mul_(weight).sum()
        if any(ctx.needs_input_grad):
            ctx.gradient = difference.mul_(2 * weight[..., None]).to(given[0].dtype)
        return found

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        gradient, ctx.gradient = ctx.gradient.mul_(upstream), None
        return None, None, *(gradient if needed else None for needed in ctx.needs_input_grad[2:])


def _metric(unit: Unit) -> str:
    return f"bld/{unit.layer:02d}.{unit.kind}.{unit.word}"


class Local:
    """The parent's layers of this process, what is known of them, and the training of units there.

    units: all that are trained, in all processes.
    """

    def __init__(
        self, config: LocalConfig, run: Run, inputs: Mapping[str, Any], units: Sequence[Unit]
    ) -> None:
        self.config, self.run, self.data = config, run, inputs["data"]
        model = load_config(inputs["parent"])
        ranges = layer_ranges(model, units, config.train.parallel, dist.world())
        self.held = held_here(ranges)
        self.passes = passes(units, ranges, config.layers_at_once)
        # To the trainer, processes of one tensor-parallel group are those that read the same rows.
        offload = config.train.parallel.offload
        parallel = ParallelConfig(tensor=len(ranges), offload=offload)
        self.device = dist.HOST if offload else dist.device()  # of the units
        self.train = config.train.model_copy(update={"parallel": parallel})
        self.parent = load_layers(inputs["parent"], self.held, self.train.placement.dtype)
        source = documents(self.data, self.train, run.seed, alike=True)
        found = source.heldout_batches(config.calibration_tokens)
        self.batches = [batch.to(dist.device()) for batch in found]

    def statistics(self, importance: Importance, layers: Collection[int]) -> ParentStatistics:
        with Progress(f"{self.run.name}: calibration", len(self.held.layers), "layers") as bar:
            return collect_statistics(
                self.parent, self.batches, importance, layers, self.held, bar.advance
            )

    def objective(self, statistics: ParentStatistics, units: Sequence[Unit]) -> BLD:
        """For a pass that trains these."""
        depth = 1 + max(unit.layer for unit in units)
        return BLD(self.parent, statistics, self.held.until(depth))

    def own(self, units: Iterable[Unit]) -> list[Unit]:
        return [unit for unit in units if unit.layer in self.held.layers]

    def fit(
        self, make: Callable[[Sequence[Unit]], BlockLibrary], statistics: ParentStatistics
    ) -> None:
        """Train all units, each pass written to the run's library when it is done and skipped when
        it is there. make: units of this process, untrained. Raises RunError where the run was begun
        with other passes."""
        self._check_passes()
        for number, group in enumerate(self.passes):
            directory = self.run.path / "library"
            if dist.broadcast(all(unit_file(directory, unit).exists() for unit in group)):
                continue
            library = make(self.own(group))
            self.train.placement.units(library.values())
            source = documents(self.data, self.train, self.run.seed)
            objective = self.objective(statistics, group)
            trainer = Trainer(library, objective, source, self.train, self.run)
            trainer.as_part(number, len(self.passes)).fit()
            save_library(library, directory, writes=self.train.placement.layout.data_rank == 0)
            if dist.is_main():
                trainer.states.remove()

    def _check_passes(self) -> None:
        """A state of one pass is none of another."""
        mine = [sorted({unit.layer for unit in group}) for group in self.passes]
        file = self.run.state_path / "passes.json"
        if dist.broadcast(file.exists() and json.loads(file.read_text()) != mine):
            raise RunError(
                f"{self.run.path} was begun in another number of processes, which trained other "
                f"layers together; start as many as then, or delete {file.parent} to begin the "
                "unfinished layers again"
            )
        self.run.write_file("state/passes.json", json.dumps(mine))


def load_layers(source: Path, held: Held, dtype: torch.dtype) -> Transformer:
    """A frozen parent with the weights of these layers, and the embedding before the first of all;
    the others have no memory."""
    own = [f"layers.{layer}." for layer in held.layers]
    own += ["embed_tokens."] if held.before is None else []
    return load_model(
        source,
        frozen=True,
        dtype=dtype,
        prepare=lambda module: module.to(dtype),
        only=lambda key: key.startswith(tuple(own)),
    )


def units_of(config: BLDConfig, parent: ModelConfig, run: str) -> tuple[Space, list[Unit]]:
    layers = layers_of(config.layers, parent, f"{run}.layers")
    space = build_space(config.space, parent).restrict(layers)
    return space, trainable_units(space)


@dataclass(frozen=True)
class Memory:
    """Bytes that training units takes in the fullest process: `states` are weights, gradients and
    moments of its units, `gathered` what FSDP makes of the one at work; `activations`, what that
    one saves in a microbatch, are an estimate.

    ranges: parts that the layers are held in; replicas: processes that hold the same; passes: how
    often the data is gone through.
    """

    parent: float
    states: float
    gathered: float
    activations: float
    layers: int
    layers_at_once: int
    ranges: int
    replicas: int
    passes: int

    @property
    def total(self) -> float:
        return self.parent + self.states + self.gathered + self.activations

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total}

    def __str__(self) -> str:
        gathered = f", gathered {_bytes(self.gathered)}" if self.gathered else ""
        processes = self.ranges * self.replicas
        each = f" in each of {processes} processes" if processes > 1 else ""
        return (
            f"memory about {_bytes(self.total)}{each}: parent {_bytes(self.parent)}, units "
            f"{_bytes(self.states)} ({self.layers_at_once} of {self.layers} layers at once, "
            f"{TRAINED} bytes a parameter){gathered}, activations about {_bytes(self.activations)}"
        )


def training_memory(
    parent: ModelConfig, units: Sequence[Unit], config: LocalConfig, processes: int = 1
) -> Memory:
    """Of the fullest of `processes`. Raises LayoutError where the layers cannot be held so."""
    train = config.train
    ranges = layer_ranges(parent, units, train.parallel, processes)
    size, replicas = DTYPES[train.dtype].itemsize, processes // len(ranges)
    counted = {word: unit_params(parent, *word) for word in {unit[1:] for unit in units}}

    def of(layers: range, own: list[Unit]) -> Memory:
        groups = layer_groups(own, config.layers_at_once)
        sizes = [sum(counted[unit[1:]] for unit in group) for group in groups]
        largest = max((counted[unit[1:]] for unit in own), default=0)
        sharded = replicas > 1 or size < WEIGHT
        numbers = kept_numbers(parent, own) if own else 0
        if layers.stop < len(parent.blocks):  # what each layer adds and gives is kept to be sent on
            numbers += 4 * parent.hidden_size * len(layers)
        return Memory(
            parent=size * held_params(parent, layers),
            states=TRAINED * max(sizes, default=0) / replicas,
            # In the arithmetic's type, and its gradient in that and in float32.
            gathered=(2 * size + WEIGHT) * largest if sharded else 0,
            activations=size * train.microbatch_tokens * numbers,
            layers=len({unit.layer for unit in own}),
            layers_at_once=max((len({u.layer for u in group}) for group in groups), default=0),
            ranges=len(ranges),
            replicas=replicas,
            passes=len(groups),
        )

    found = [of(*held) for held in zip(ranges, by_range(units, ranges), strict=True)]
    most = max(one.passes for one in found)
    return replace(max(found, key=lambda memory: memory.total), passes=most)


def held_params(parent: ModelConfig, layers: range) -> int:
    """Parameters of these layers, and the embedding before the first; no unit needs a head."""
    blocks = [parent.blocks[layer] for layer in layers]
    total = sum(parent.subblock_params(kind, own) for block in blocks for kind, own in block)
    return total + (parent.vocab_size * parent.hidden_size if layers.start == 0 else 0)


def unit_params(parent: ModelConfig, kind: str, word: str) -> int:
    return sum(parent.subblock_params(k, parse(w)) for k, w in Unit(0, kind, word).parts)


def kept_numbers(parent: ModelConfig, units: Sequence[Unit], *, working_too: bool = True) -> float:
    """Numbers a token that the largest unit keeps for its backward; the parent's FFN runs behind
    attention. working_too: and what the widest FFN's backward holds beside that."""
    most, variants = 0.0, list[Variant]()
    for unit in units:
        own = [parse(word) for _, word in unit.parts]
        own += [parent.blocks[unit.layer].ffn] if unit.kind == "attention" else []
        # It keeps its distance from the parent instead of what enters, which all units share.
        most = max(most, sum(kept(parent, variant) for variant in own))
        variants += own
    return most + (working(parent, variants) if working_too else 0)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def stage(config: BLDConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `bld`: prune and pool the parent into every word, then train them all at once."""
    space, units = units_of(config, load_config(inputs["parent"]), run.name)
    layers = {unit.layer for unit in units}
    local = Local(config, run, inputs, units)
    statistics = local.statistics(config.importance, layers)
    run.say(f"{len(units)} units in {len(layers)} layers")
    make = functools.partial(
        BlockLibrary.from_parent, local.parent, space, statistics, device=local.device
    )
    local.fit(make, statistics)
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
    parent = load_config(inputs["parent"])
    source = inputs["library"] / "library"
    space = read_space(inputs["library"])
    layers = layers_of(config.layers, parent, f"{run.name}.layers")
    found = [a["words"] for path in inputs["searches"] for a in read_json(path, "architectures")]
    pairs = choose_pairs(config, space, parent, found, layers)
    if not pairs:
        raise LibraryError(
            f"{run.name}: the searches' words make no pair to train: raise attention (now "
            f"{config.attention}) or ffn (now {config.ffn}), or search under tighter constraints"
        )
    run.say(f"{len(pairs)} pairs in {len({pair.layer for pair in pairs})} layers")
    local = Local(config, run, inputs, pairs)
    statistics = local.statistics("independent", layers)
    apart = functools.partial(BlockLibrary.from_pairs, local.parent, source, device=local.device)
    local.fit(apart, statistics)
    if dist.is_main():
        link_library(source, run.path / "library")
    dist.barrier()
    rows = _gains(local, apart, statistics)
    run.write_table("pairs", rows)
    means = {key: sum(row[key] for row in rows) / len(rows) for key in ("apart", "joint")}
    run.say(
        f"block loss, a mean over {len(rows)} pairs: {means['apart']:.4f} apart, "
        f"{means['joint']:.4f} together"
    )
    write_space(replace(space, pairs=tuple(sorted({*space.pairs, *pairs}))), run)
    run.inherit(inputs["library"], "block_influence")


def _gains(
    local: Local, apart: Callable[[Sequence[Unit]], BlockLibrary], statistics: ParentStatistics
) -> list[dict[str, Any]]:
    """The loss of every pair before and after, over the calibration batches."""
    rows: dict[Unit, dict[str, Any]] = {}
    config, dtype = local.parent.config, local.parent.head.dtype
    for group in local.passes:
        own = local.own(group)
        units = {str(u): load_unit(local.run.path / "library", config, u) for u in own}
        libraries = (apart(own), BlockLibrary(units))
        objective = local.objective(statistics, group)
        before, after = (
            objective.measure(one.to(dist.device(), dtype), local.batches) for one in libraries
        )
        rows |= {
            unit: {"layer": unit.layer, "word": unit.word, "apart": loss, "joint": after[unit]}
            for unit, loss in before.items()
        }
    everyone = {unit: row for part in dist.gather(rows) for unit, row in part.items()}
    return [everyone[unit] for group in local.passes for unit in group]
