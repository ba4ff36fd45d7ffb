"""The block library: trained subblocks on disk, one safetensors file a word, and a model from them.

library/03/ffn/swiglu-256.safetensors
library/03/block/gqa-2+swiglu-256.safetensors      two subblocks trained together
"""

from __future__ import annotations

import filecmp
import itertools
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save
from torch import nn

from tessera import dist
from tessera.model.checkpoint import Checkpoint, open_model, save_model, whole
from tessera.model.config import BlockConfig, ModelConfig, name, parse_kind
from tessera.model.layers import Subblock
from tessera.model.source import resolve
from tessera.model.tensors import LazyTensor, in_safetensors
from tessera.model.transformer import Block, Transformer
from tessera.puzzle.space import Space, Unit, read_space, write_space
from tessera.puzzle.surgery import ParentStatistics, copy_parameters, cut
from tessera.runs.files import atomic_write
from tessera.runs.recipe import Config
from tessera.runs.run import Run, read_json, read_manifest

T = TypeVar("T")


class LibraryError(ValueError):
    """A library that lacks what an architecture names; the text says what it holds."""


class BlockLibrary(nn.ModuleDict):
    """Trainable units of a space, keyed `03/ffn/swiglu-256`; pairs are of kind `block`."""

    @classmethod
    def from_parent(
        cls,
        parent: Transformer,
        space: Space,
        statistics: ParentStatistics,
        only: Collection[Unit] | None = None,
        device: torch.device | str | None = None,
    ) -> BlockLibrary:
        """All units (or `only` these) with weights cut from the parent; `noop` has none."""
        library = cls()
        for layer, kind, word in trainable_units(space) if only is None else only:
            source = getattr(parent.blocks[layer], kind)
            importance = statistics.channel_importance[layer] if kind == "ffn" else None
            scale = statistics.linear_scale[kind][layer]
            unit = cut(source, parent.config, parse_kind(kind, word), importance, scale)
            library[str(Unit(layer, kind, word))] = unit.to(device or dist.device())
        return library.requires_grad_()

    @classmethod
    def from_pairs(
        cls,
        parent: Transformer,
        directory: Path,
        pairs: Iterable[Unit],
        device: torch.device | str | None = None,
    ) -> BlockLibrary:
        """A block a pair, with the weights that a library trained apart."""
        library = cls()
        for pair in pairs:
            block = _empty(parent.config, pair)
            for kind, word in pair.parts:
                source = getattr(parent.blocks[pair.layer], kind)
                if word != name(source.variant):
                    source = load_unit(directory, parent.config, Unit(pair.layer, kind, word))
                copy_parameters(source, getattr(block, kind))
            library[str(pair)] = block.to(device or dist.device())
        return library.requires_grad_()

    def units(self, layer: int) -> Iterator[tuple[Unit, nn.Module]]:
        for key, module in self.items():
            number, kind, word = key.split("/")
            if int(number) == layer:
                yield Unit(layer, kind, word), module


def trainable_units(space: Space) -> list[Unit]:
    return [unit for unit in space.replacements() if unit.word != "noop"]


def unit_file(directory: Path, unit: Unit) -> Path:
    return directory / f"{unit}.safetensors"


def save_library(library: BlockLibrary, directory: Path, writes: bool = True) -> None:
    """One file a unit, each replaced atomically. All processes call this; of those that hold the
    same units one writes."""
    for key, unit in library.items():
        tensors = {k: whole(v.detach()).cpu().contiguous() for k, v in unit.state_dict().items()}
        if writes:
            path = directory / f"{key}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, save(tensors))
    dist.barrier()


def load_unit(directory: Path, config: ModelConfig, unit: Unit) -> Subblock | Block:
    """One unit from a library directory: a Subblock, or a Block for kind `block`. Raises
    LibraryError where `open_unit` does."""
    module = _empty(config, unit)
    found = open_unit(directory, config, unit)
    module.load_state_dict({key: one.read() for key, one in found.items()})
    return module


def open_unit(directory: Path, config: ModelConfig, unit: Unit) -> dict[str, LazyTensor]:
    """The tensors of a unit in a library directory; a `noop` has none and needs no file. Raises
    LibraryError naming what the library holds there."""
    if unit.word == "noop":
        return {}
    path = unit_file(directory, unit)
    if not path.exists():
        known = sorted(p.stem for p in path.parent.glob("*.safetensors"))
        raise LibraryError(
            f"the library {directory} has no {unit.word} for layer {unit.layer} ({unit.kind}); it "
            f"holds {', '.join(known) or 'nothing there'}. Add the word to bld.space, or [merge] "
            "the library that holds it"
        )
    found = in_safetensors(path)
    with torch.device("meta"):
        expected = {k: tuple(v.shape) for k, v in _empty(config, unit).state_dict().items()}
    if expected != {key: found[key].shape for key in expected if key in found}:
        raise LibraryError(f"{path} holds no {unit.word} of this parent: its shapes are others")
    return found


def _empty(config: ModelConfig, unit: Unit) -> Subblock | Block:
    if unit.kind == "block":
        return Block(config, BlockConfig.of(*unit.word.split("+")))
    return Subblock(config, parse_kind(unit.kind, unit.word))


def assemble(parent: Checkpoint, directory: Path, words: Sequence[Sequence[str]]) -> Checkpoint:
    """`parent` with other words, one (attention, ffn) pair a layer: says where each tensor is.

    Where the library holds a pair, its two words mean that pair's weights; parent words elsewhere
    are the parent, bit for bit. Nothing is read before the result is loaded or saved.
    """
    config = parent.config
    if len(words) != len(config.blocks):
        raise LibraryError(f"{len(words)} layers of words, and the parent has {len(config.blocks)}")
    tensors = dict(parent.tensors)

    def put(prefix: str, unit: Unit) -> None:
        for key in [key for key in tensors if key.startswith(prefix)]:
            del tensors[key]
        found = open_unit(directory, config, unit)
        tensors.update({prefix + key: one for key, one in found.items()})

    for layer, both in enumerate(words):
        pair = Unit.pair(layer, *both)
        if unit_file(directory, pair).exists():
            put(f"layers.{layer}.", pair)
            continue
        for (kind, word), own in zip(pair.parts, config.words[layer], strict=True):
            if word != own:
                put(f"layers.{layer}.{kind}.", Unit(layer, kind, word))
    return Checkpoint(config.with_words(words), tensors)


class ChildConfig(Config):
    point: str | None = None  # METHOD-SHARE, as "mip-1.5"


def stage(config: ChildConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `child`: assemble the architecture the search chose."""
    directory, point = inputs["architecture"], config.point
    single = (directory / "tables" / "architecture.json").is_file()  # of a search or race
    if single and point is None:
        architecture = read_json(directory, "architecture")
    else:
        found = {row.get("name"): row for row in read_json(directory, "architectures")}
        if single or point not in found:
            names = "none, for it is no frontier" if single else ", ".join(map(str, found))
            raise LibraryError(f"child.point = {point!r}: the points of {directory} are {names}")
        architecture = found[point]
    parent, library = open_model(inputs["parent"]), inputs["library"] / "library"
    child = assemble(parent, library, architecture["words"])
    save_model(child, run.model_path, tokenizer_from=resolve(inputs["parent"]))
    run.write_json("architecture", architecture)


class MergeConfig(Config):
    """Nothing to set: `libraries` names the runs."""


def merge(config: MergeConfig, run: Run, inputs: dict[str, list[Path]]) -> None:
    """Stage `merge`: one library of several of the same parent, their files linked, not copied."""
    libraries = inputs["libraries"]
    parents = [_parent_fingerprint(library) for library in libraries]
    strangers = [lib.name for lib, own in zip(libraries, parents, strict=True) if own != parents[0]]
    if strangers:
        raise LibraryError(
            f"{', '.join(strangers)} and {libraries[0].name} are made from different parents; "
            "merge libraries of one parent"
        )
    for library in libraries:
        link_library(library / "library", run.path / "library")
    write_space(union(read_space(library) for library in libraries), run)
    run.inherit(libraries[0], "block_influence")


def union(spaces: Iterable[Space]) -> Space:
    """Every word, pair and engine of several spaces of one parent, in the order they come."""

    def merged(lists: Iterable[Sequence[T]]) -> tuple[T, ...]:
        return tuple(dict.fromkeys(itertools.chain.from_iterable(lists)))

    every = list(spaces)
    layers = tuple(
        (merged(a for a, _ in layer), merged(f for _, f in layer))
        for layer in zip(*(space.layers for space in every), strict=True)
    )
    return Space(layers, merged(s.pairs for s in every), merged(s.servable for s in every))


def _parent_fingerprint(library: Path) -> str:
    inputs = read_manifest(library).inputs
    if "parent" in inputs:
        return inputs["parent"]["fingerprint"]
    return _parent_fingerprint(library.parent / inputs["libraries"][0]["path"])  # a merged one


def link_library(source: Path, target: Path) -> None:
    """Every unit of a library directory under `target` too, as a hard link or a copy. Raises
    LibraryError where `target` holds other weights under the same name."""
    for file in sorted(source.rglob("*.safetensors")):
        path = target / file.relative_to(source)
        if path.exists():
            if not filecmp.cmp(file, path, shallow=False):
                raise LibraryError(
                    f"{file} differs from {path}: two libraries trained the same word; give each "
                    "layers of its own"
                )
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, path)
        except OSError:  # another file system, or one without hard links
            atomic_write(path, file.read_bytes())
