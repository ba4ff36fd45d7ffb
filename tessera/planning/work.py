"""What a stage of a recipe has to train, as far as words tell: the input of a plan.

Of a stage that trains a child nobody has searched yet, the parent's words stand in: an upper bound.
So do as many candidates of a race as its searches may give, and answers as long as they may become.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from tessera.model.config import ModelConfig, parse
from tessera.objectives.grpo import PolicyConfig
from tessera.objectives.kd import KDConfig
from tessera.objectives.lm import CPTConfig, ParentConfig
from tessera.objectives.rpo import RPOConfig
from tessera.objectives.sft import SFTConfig
from tessera.planning.experience import Experience, experience
from tessera.puzzle.bld import BLDConfig, units_of
from tessera.puzzle.frontier import FrontierConfig
from tessera.puzzle.library import Key, layer_groups
from tessera.puzzle.race import RaceConfig
from tessera.puzzle.search import SearchConfig
from tessera.runs.manifest import is_done, read_json
from tessera.runs.plan import Stage
from tessera.runs.recipe import Recipe, RecipeError, StageSpec, nearest, validate
from tessera.train.flops import Work, block_cost, model_cost, subblock_cost
from tessera.train.optim import TrainConfig


@dataclass(frozen=True)
class Job:
    """A training: of `student` whole (with a frozen `teacher`, perhaps), or of units of `parent`.

    passes: how often the data is gone through, a group of layers each (block-wise distillation).
    states: the teacher's residual streams are kept for a loss on them. heats: steps of each
    training of a race. experience: what a policy writes itself; `teacher` is its reference.
    """

    name: str
    train: TrainConfig
    student: ModelConfig | None = None
    teacher: ModelConfig | None = None
    states: bool = False
    units: tuple[Key, ...] = ()
    passes: int = 1
    heats: tuple[int, ...] = ()
    experience: Experience | None = None

    @property
    def config(self) -> ModelConfig:
        """The larger of the models."""
        found = self.teacher or self.student
        assert found is not None
        return found

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        return sum(self.heats) or self.passes * self.train.steps

    @property
    def tokens(self) -> int:
        """Positions of the whole training."""
        return self.steps * self.train.tokens_per_step

    def work(self) -> Work:
        """Of a step, whose documents are as long as the longest there may be."""
        if self.experience is not None:
            return self.experience.work(self.config.sliding_window)
        tokens, length = self.train.tokens_per_step, self.train.sequence_length
        window = min(length, self.config.sliding_window or length)
        return Work(tokens, round(tokens * (window - window * (window - 1) / (2 * length))))

    def flops(self) -> float:
        """Operations of a step."""
        work, total = self.work(), 0
        if self.student is not None:
            total += model_cost(self.student).training(work)
            total += model_cost(self.teacher).forward(work) if self.teacher else 0
            return total
        return self._unit_flops(work)

    def _unit_flops(self, work: Work) -> float:
        """Of one pass: the parent's blocks, and a share of the units."""
        parent = self.config
        total = sum(block_cost(parent, layer).forward(work) for layer in range(len(parent.blocks)))
        for layer, kind, word in self.units:
            own = subblock_cost(parent, parse(word)).training(work)
            behind = (
                subblock_cost(parent, parent.blocks[layer].ffn) if kind == "attention" else None
            )
            total += (own + (2 * behind.forward(work) if behind else 0)) / self.passes
        return total


def jobs(
    recipe: Recipe,
    stages: Mapping[str, Stage],
    parent: ModelConfig,
    child: ModelConfig | None = None,
) -> list[Job]:
    """The trainings of a recipe, in order, and what each trains. Raises RecipeError.

    child: what the search will find, where that is known.
    """
    found = [_job(spec, recipe, stages, parent, child or parent) for spec in recipe.stages]
    return [job for job in found if job is not None]


def _job(
    spec: StageSpec,
    recipe: Recipe,
    stages: Mapping[str, Stage],
    parent: ModelConfig,
    child: ModelConfig,
) -> Job | None:
    config = checked(spec, stages) if _trains(spec, stages) else None
    match config:
        case ParentConfig(train=TrainConfig() as train):
            return Job(spec.name, train, student=parent)
        case BLDConfig():
            keys = tuple(units_of(config, parent, spec.name)[1])
            groups = layer_groups(keys, config.layers_at_once)
            return Job(spec.name, config.train, None, parent, units=keys, passes=len(groups))
        case RaceConfig():
            heats = tuple(config.heats(_candidates(spec, recipe, stages)))
            return Job(spec.name, config.train, child, parent, config.cosine > 0, heats=heats)
        case KDConfig():
            return Job(spec.name, config.train, child, parent, config.cosine > 0)
        case CPTConfig() | SFTConfig():
            return Job(spec.name, config.train, student=child)
        case PolicyConfig() | RPOConfig():
            own = experience(config, config.train)
            reference = child if isinstance(config, RPOConfig) or config.kl else None
            return Job(spec.name, own.train(config.train), child, reference, experience=own)
        case _:
            return None


TRAINS = ("parent", "bld", "race", "kd", "cpt", "sft", "grpo", "rloo", "rpo")


def _trains(spec: StageSpec, stages: Mapping[str, Stage]) -> bool:
    if spec.stage not in stages:
        raise RecipeError(
            f"[{spec.name}]: there is no stage {spec.stage!r}; {nearest(spec.stage, stages)}"
        )
    imported = spec.stage == "parent" and "train" not in spec.table
    return spec.stage in TRAINS and not imported


def _candidates(spec: StageSpec, recipe: Recipe, stages: Mapping[str, Stage]) -> int:
    """How many architectures a race has at most: what its searches are asked for, or have found."""
    return sum(_found(str(name), recipe, stages) for name in spec.table.get("searches", [])) or 1


def _found(name: str, recipe: Recipe, stages: Mapping[str, Stage]) -> int:
    search = next((one for one in recipe.stages if one.name == name), None)
    if search is None:
        return len(read_json(Path(name), "architectures")) if is_done(Path(name)) else 1
    match checked(search, stages):
        case SearchConfig(method="mip") as config:
            return config.solutions + (config.conditional is not None)
        case FrontierConfig() as config:
            return len(config.methods) * len(config.points)
        case _:
            return 1


def checked(spec: StageSpec, stages: Mapping[str, Stage]) -> BaseModel:
    """The config of a stage; its needs are not looked for. Raises RecipeError."""
    stage = stages[spec.stage]
    needs = {mark.rstrip("?=*") for mark in stage.needs}
    table = {key: value for key, value in spec.table.items() if key not in needs}
    kind = getattr(importlib.import_module(stage.module), stage.config)
    return validate(kind, table, spec.name)


def unplanned(recipe: Recipe) -> Sequence[str]:
    """Names of the stages that a plan says nothing of."""
    return [spec.name for spec in recipe.stages if spec.stage not in TRAINS]
