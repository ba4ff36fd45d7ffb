"""Block-wise local distillation: the whole library in one pass over the parent (Puzzle §2.3).

    attention a_j trained in [a_j, f_parent],  FFN f_k in [a_parent, f_k]
    ℓ = ‖o_parent - o_unit‖² / mean ‖o_parent‖²        o the output of the whole block

Every unit reads the parent's own activations and is compared with the parent's own output, so
units never see each other: each learns in the crowd exactly as it would alone, and is clipped
as a group of its own. The parent runs layer by layer, **once a batch**; a layer's units are
trained on its activations and their graph is dropped before the next layer runs, so memory
holds one layer's units, not the library's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from tessera.data.batch import Batch
from tessera.model.context import Context
from tessera.model.transformer import Transformer
from tessera.model.weights import load_model
from tessera.objectives.lm import documents
from tessera.puzzle.library import BlockLibrary, save_library
from tessera.puzzle.space import SpaceConfig, build_space, write_space
from tessera.puzzle.surgery import ParentStatistics, collect_statistics
from tessera.run import Run
from tessera.train.engine import Stats, Trainer
from tessera.train.optim import TrainConfig


class BLDConfig(BaseModel):
    """Which words, and how long each unit trains."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    space: SpaceConfig = SpaceConfig()
    train: TrainConfig
    calibration_tokens: int = Field(default=16_384, ge=1)  # for channel importance and loss scales


class BLD:
    """Trains every unit of a BlockLibrary against a frozen parent."""

    def __init__(self, parent: Transformer, statistics: ParentStatistics) -> None:
        self.parent = parent
        self.scales = statistics.output_scale  # per layer: mean over tokens of ‖o_parent‖²

    def losses(self, module: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Stats]]:
        assert isinstance(module, BlockLibrary)
        context = self.parent.prepare(Context(batch.positions, batch.segments))
        with torch.no_grad():
            x = self.parent.embed_tokens(batch.tokens)
        for layer, block in enumerate(self.parent.blocks):
            with torch.no_grad():
                middle = x + block.attention(x, context)
                out = middle + block.ffn(middle, context)
            weight = batch.weight / self.scales[layer]
            total, stats = x.new_zeros(()), {}
            for word, unit in module.units(layer, "attention"):
                found = x + unit(x, context)
                loss = _distance(found + block.ffn(found, context), out, weight)
                total, stats[f"bld/{layer:02d}.attention.{word}"] = total + loss, loss.detach()
            for word, unit in module.units(layer, "ffn"):
                loss = _distance(middle + unit(middle, context), out, weight)
                total, stats[f"bld/{layer:02d}.ffn.{word}"] = total + loss, loss.detach()
            if stats:
                yield total, stats
            x = out

    def weight(self, batch: Batch) -> Tensor:
        return batch.weight.sum()

    def groups(self, module: nn.Module) -> Mapping[str, Sequence[nn.Parameter]]:
        assert isinstance(module, BlockLibrary)
        return {key: list(unit.parameters()) for key, unit in module.items()}


def _distance(out: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return ((out - target).square().sum(-1) * weight).sum()


def stage(config: BLDConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `bld`: prune and pool the parent into every word, then train them all at once."""
    parent = load_model(inputs["parent"], frozen=True)
    source = documents(inputs["data"], config.train, run.seed)
    statistics = collect_statistics(parent, source.heldout_batches(config.calibration_tokens))
    space = build_space(config.space, parent.config)
    library = BlockLibrary.from_parent(parent, space, statistics)
    run.say(f"{len(library)} units in {parent.config.num_hidden_layers} layers")
    Trainer(library, BLD(parent, statistics), source, config.train, run).fit()
    save_library(library, run.path / "library")
    write_space(space, run)
    run.write_json("block_influence", statistics.block_influence)
