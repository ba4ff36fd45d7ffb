"""The block library: trained subblocks on disk, one safetensors file a word, and a model from them.

    library/03/ffn/swiglu-256.safetensors
    library/03/block/gqa-2+swiglu-256.safetensors       two words trained together

A library can be trained by layer range on several machines and merged by copying files. Words
of the parent and `noop` have no file. `assemble` builds any architecture; one of parent words
is the parent, bit for bit. Where a library holds a pair, those two words mean its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save
from torch import nn

from tessera.model.config import KINDS, BlockConfig, ModelConfig, NoOp, name, parse_kind
from tessera.model.layers import Subblock
from tessera.model.transformer import Block, Transformer
from tessera.model.weights import load_model, resolve, save_model
from tessera.puzzle.space import Space, join
from tessera.puzzle.surgery import ParentStatistics, cut
from tessera.run import Run, atomic_write, read_json


class LibraryError(ValueError):
    """A library that lacks what an architecture names; the text says what it holds."""


class BlockLibrary(nn.ModuleDict):
    """Every trainable unit of a space, keyed `03/ffn/swiglu-256`."""

    @classmethod
    def from_parent(
        cls, parent: Transformer, space: Space, statistics: ParentStatistics
    ) -> BlockLibrary:
        """All units with weights cut from the parent; `noop` needs none and has none."""
        library = cls()
        for layer, kind, word in space.replacements():
            variant = parse_kind(kind, word)
            if isinstance(variant, NoOp):
                continue
            source = getattr(parent.blocks[layer], kind)
            importance = statistics.channel_importance[layer] if kind == "ffn" else None
            scale = statistics.linear_scale[kind][layer]
            unit = cut(source, parent.config, variant, importance, scale)
            library[unit_key(layer, kind, word)] = unit
        return library.requires_grad_()

    def units(self, layer: int, kind: str) -> Iterator[tuple[str, Subblock]]:
        """(word, subblock) of one layer and kind."""
        prefix = unit_key(layer, kind, "")
        for key, unit in self.items():
            if key.startswith(prefix):
                assert isinstance(unit, Subblock)
                yield key.removeprefix(prefix), unit


def unit_key(layer: int, kind: str, word: str) -> str:
    return f"{layer:02d}/{kind}/{word}"


def save_library(library: BlockLibrary, directory: Path) -> None:
    """One file a unit, each replaced atomically."""
    for key, unit in library.items():
        path = directory / f"{key}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().contiguous() for k, v in unit.state_dict().items()}
        atomic_write(path, save(tensors))


def load_unit(directory: Path, config: ModelConfig, layer: int, kind: str, word: str) -> Subblock:
    """One subblock from a library directory; `noop` is made without a file.

    Raises LibraryError naming what the library does hold at that layer.
    """
    unit = Subblock(config, parse_kind(kind, word))
    if isinstance(unit.variant, NoOp):
        return unit
    path = directory / f"{unit_key(layer, kind, word)}.safetensors"
    if not path.exists():
        known = sorted(p.stem for p in path.parent.glob("*.safetensors"))
        raise LibraryError(
            f"the library {directory} has no {word} for layer {layer} ({kind}); it holds "
            f"{', '.join(known) or 'nothing there'}. Add the word to bld.space, or merge the "
            "library that holds it by copying its files."
        )
    unit.load_state_dict(load_file(path))
    return unit


def load_pair(directory: Path, config: ModelConfig, layer: int, attention: str, ffn: str) -> Block:
    """The block of two words that were trained together. Raises LibraryError where it is not."""
    path = pair_path(directory, layer, attention, ffn)
    if not path.exists():
        known = sorted(p.stem for p in path.parent.glob("*.safetensors"))
        raise LibraryError(
            f"the library {directory} has no pair {path.stem} for layer {layer}; it holds "
            f"{', '.join(known) or 'none there'}"
        )
    variants = parse_kind("attention", attention), parse_kind("ffn", ffn)
    block = Block(config, BlockConfig(*variants))  # type: ignore[arg-type]
    block.load_state_dict(load_file(path))
    return block


def pair_path(directory: Path, layer: int, attention: str, ffn: str) -> Path:
    return directory / f"{unit_key(layer, 'block', join(attention, ffn))}.safetensors"


@torch.no_grad()
def assemble(parent: Transformer, directory: Path, words: Sequence[Sequence[str]]) -> Transformer:
    """`parent` itself, changed in place to `words` (one (attention, ffn) pair a layer)."""
    if len(words) != len(parent.blocks):
        raise LibraryError(
            f"the architecture has {len(words)} layers and the parent {len(parent.blocks)}"
        )
    for layer, (attention, ffn) in enumerate(words):
        if pair_path(directory, layer, attention, ffn).exists():
            block = load_pair(directory, parent.config, layer, attention, ffn)
            parent.replace(layer, "attention", block.attention)
            parent.replace(layer, "ffn", block.ffn)
            continue
        for kind, word in zip(KINDS, (attention, ffn), strict=True):
            if word != name(getattr(parent.blocks[layer], kind).variant):
                unit = load_unit(directory, parent.config, layer, kind, word)
                parent.replace(layer, kind, unit)
    return parent


class ChildConfig(BaseModel):
    """Nothing to set: the library and the architecture say it all."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def stage(config: ChildConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `child`: assemble the architecture the search chose."""
    architecture = read_json(inputs["architecture"], "architecture")
    parent = load_model(inputs["parent"])
    child = assemble(parent, inputs["library"] / "library", architecture["words"])
    save_model(child, run.model_path, tokenizer_from=resolve(inputs["parent"]))
    run.write_json("architecture", architecture)
