"""Tasks of the reasoning-gym library under the names `gym/NAME`; the only file that imports it.

A level is the global level of the library's curriculum for that task, from 1; tasks without one
have a single level. The library gives questions and answers and no worked thought: its problems
can be asked, and trained on without reasoning, but not with it.
"""

from __future__ import annotations

import difflib
import importlib.util
from typing import Any

import numpy as np

PREFIX = "gym/"
TOP_LEVEL = 4
SEEDS = 2**31 - 1


class GymError(ValueError):
    """A task that the library has not, or the library is not installed."""


def levels_of(name: str) -> tuple[int, int]:
    """The levels (inclusive) of the task `gym/NAME`. Raises GymError for none of that name."""
    library = _library(name)
    task = name.removeprefix(PREFIX)
    if task not in library.DATASETS:
        near = difflib.get_close_matches(task, library.DATASETS, n=1)
        hint = f'did you mean "{PREFIX}{near[0]}"? ' if near else ""
        raise GymError(f'no task "{name}" in reasoning-gym; {hint}it has {len(library.DATASETS)}')
    return (1, TOP_LEVEL) if task in library.CURRICULA else (1, 1)


def draw(name: str, rng: np.random.Generator, level: int) -> tuple[str, str]:
    """(question, answer) of one problem of `gym/NAME`.

    Raises GymError where the library cannot make it, or judges answers by code of its own.
    """
    library = _library(name)
    task, settings = name.removeprefix(PREFIX), {"size": 1, "seed": int(rng.integers(SEEDS))}
    try:
        if task in library.CURRICULA:
            curriculum = library.create_curriculum(task)
            curriculum.set_global_level(level - 1)
            make, _ = library.DATASETS[task]
            entry = make(curriculum.generate_configuration(settings))[0]
        else:
            entry = library.create_dataset(task, **settings)[0]
    except Exception as error:  # each task raises its own
        raise GymError(f"reasoning-gym cannot draw {name} at level {level}: {error}") from error
    if not isinstance(entry["answer"], str):
        raise GymError(f"{name} has no answer in words; it can only be judged by the library")
    return entry["question"], entry["answer"]


def _library(name: str) -> Any:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise GymError(
            f'the task "{name}" needs the reasoning-gym library, which is not installed: '
            "pip install 'tessera[gym]'"
        )
    from reasoning_gym import factory  # pyright: ignore[reportMissingImports]

    return factory
