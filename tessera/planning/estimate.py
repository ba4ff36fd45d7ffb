"""What a planned stage will take, as far as it can be said before anything has run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tessera.model.config import ModelConfig
from tessera.model.source import load_config
from tessera.puzzle.bld import BLDConfig, LocalConfig, units_of
from tessera.puzzle.couple import CoupleConfig, largest_pairs
from tessera.puzzle.library import pair_keys, union
from tessera.puzzle.memory import Memory, training_memory
from tessera.puzzle.space import Space, read_space
from tessera.runs.manifest import is_done
from tessera.runs.plan import Step


def memory(step: Step, steps: Sequence[Step]) -> Memory | None:
    """Of a stage that trains units. None for others, and while the parent is not known.

    `couple` is bounded by the largest pairs its searches could choose. Raises ConfigError where
    the words or layers asked for do not fit the parent.
    """
    config = step.config
    if not isinstance(config, LocalConfig) or (parent := _parent(step, steps)) is None:
        return None
    if isinstance(config, BLDConfig):
        _, keys = units_of(config, parent, step.name)
    else:
        assert isinstance(config, CoupleConfig)
        if (space := _library_space(_one(step, "library"), steps)) is None:
            return None
        keys = pair_keys(largest_pairs(config, space, parent, step.name))
    return training_memory(parent, keys, config.layers_at_once, config.train.microbatch_tokens)


def _one(step: Step, need: str) -> Path:
    path = step.inputs[need]
    assert isinstance(path, Path)
    return path


def _parent(step: Step, steps: Sequence[Step]) -> ModelConfig | None:
    """The parent's config, from its run or from the checkpoint that is to be imported."""
    path = _one(step, "parent")
    origin = next((other for other in steps if other.path == path), None)
    if origin is None or is_done(path):
        return load_config(path)
    imported = origin.files.get("path")
    return load_config(imported) if isinstance(imported, Path) else None


def _library_space(path: Path, steps: Sequence[Step]) -> Space | None:
    """The space of a library run, finished or planned."""
    if is_done(path):
        return read_space(path)
    step = next(other for other in steps if other.path == path)
    if isinstance(step.config, BLDConfig):
        parent = _parent(step, steps)
        return None if parent is None else units_of(step.config, parent, step.name)[0]
    if "libraries" not in step.inputs:
        return _library_space(_one(step, "library"), steps)
    libraries = step.inputs["libraries"]
    assert isinstance(libraries, list)
    spaces = [_library_space(one, steps) for one in libraries]
    known = [space for space in spaces if space is not None]
    return union(known) if len(known) == len(spaces) else None
