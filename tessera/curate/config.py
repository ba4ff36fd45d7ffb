"""What a [curate] table may say: sources, teachers, and steps in order."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, SerializeAsAny, Tag, field_validator, model_validator

from tessera.ask.endpoint import EndpointConfig
from tessera.ask.local import EmbedderConfig, EngineConfig
from tessera.curate.sources import SourceConfig
from tessera.curate.steps import arrange, ask, contamination, duplicates, filters
from tessera.curate.steps.contamination import Nearest
from tessera.curate.steps.rows import AskStep, RowStep, SetStep
from tessera.data.dialects import Dialect
from tessera.runs.recipe import Config, RecipeError, validate
from tessera.table import nearest

Step = RowStep | SetStep | AskStep
TeacherConfig = Annotated[
    Annotated[EndpointConfig, Tag("openai")]
    | Annotated[EngineConfig, Tag("engine")]
    | Annotated[EmbedderConfig, Tag("embedder")],
    Discriminator(lambda value: _kind(value)),
]
# Every step by the name that its config's `step` allows.
STEPS: dict[str, type[Step]] = {
    name: one
    for module in (ask, filters, duplicates, contamination, arrange)
    for one in vars(module).values()
    if isinstance(one, type) and issubclass(one, RowStep | SetStep | AskStep)
    for name in get_args(one.model_fields["step"].annotation)
}


def _kind(value: Any) -> str:
    known = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return str(known or "openai")


class CurateConfig(Config):
    """The table of the stage.

    dialect, format: of the rows that it gives. shard_mb: MB of a shard, the unit that is resumed
    and that processes share out. max_bad: the share of broken records that is not yet an error.
    """

    sources: list[SourceConfig] = Field(min_length=1)
    steps: list[SerializeAsAny[Step]] = []
    teachers: dict[str, TeacherConfig] = {}
    dialect: Dialect = "openai"
    format: Literal["jsonl", "parquet"] = "jsonl"
    shard_mb: float = Field(default=64.0, gt=0)
    max_bad: float = Field(default=0.01, ge=0, le=1)

    @field_validator("steps", mode="before")
    @classmethod
    def _known_steps(cls, value: Any) -> list[Step]:
        if not isinstance(value, list):
            raise ValueError("steps are a list of tables: [[curate.steps]]")
        return [_step(number, one) for number, one in enumerate(value, 1)]

    @model_validator(mode="after")
    def _teachers_are_named(self) -> CurateConfig:
        for number, step in enumerate(self.steps, 1):
            if not isinstance(step, AskStep):
                continue
            name, vectors = step.teacher, isinstance(step, Nearest)
            asks, teacher = f"step {number} asks the teacher {name!r}", self.teachers.get(name)
            if teacher is None:
                known = nearest(name, self.teachers)
                raise ValueError(f"{asks}, which `teachers` does not name; {known}")
            if isinstance(teacher, EngineConfig) and vectors:
                raise ValueError(
                    f"{asks} for vectors, and an engine gives none; make it {{ kind = "
                    '"embedder", model = "DIR OR HUB ID" }, or an endpoint with /embeddings'
                )
            if isinstance(teacher, EmbedderConfig) and not vectors:
                raise ValueError(
                    f"{asks} for answers, and an embedder gives vectors; "
                    'name an endpoint, or a teacher of kind "engine"'
                )
        return self

    @property
    def files(self) -> list[str]:
        """Every file that the rows follow from."""
        found = [str(file) for source in self.sources for file in source.files()]
        for step in self.steps:
            for one in getattr(step, "against", []):
                found += one.patterns
            found += [path] if (path := getattr(step, "tokenizer", None)) else []
        local = [one for one in self.teachers.values() if isinstance(one, EmbedderConfig)]
        return found + [one.model for one in local]

    def named(self) -> list[tuple[str, Step]]:
        """The steps under the names they are counted by: `2 dedupe`."""
        return [(f"{number} {one.step}", one) for number, one in enumerate(self.steps, 1)]


def _step(number: int, table: Any) -> Step:
    if isinstance(table, Step):
        return table
    name = table.get("step") if isinstance(table, dict) else None
    if name not in STEPS:
        raise ValueError(f"step {number}: there is no step {name!r}; {nearest(str(name), STEPS)}")
    try:
        return validate(STEPS[name], table, f"step {number} ({name})")
    except RecipeError as error:
        raise ValueError(str(error)) from None
