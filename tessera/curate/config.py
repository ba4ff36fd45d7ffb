"""What a [curate] table may say: sources, teachers, and steps in order.

[curate]
sources = [{ paths = "gsm8k/train.jsonl", question = "question", license = "mit" }]
teachers.teacher = { url = "http://10.0.0.1:8000/v1", model = "deepseek-ai/DeepSeek-R1" }
teachers.embedder = { kind = "embedder", model = "sentence-transformers/all-MiniLM-L6-v2" }
[[curate.steps]]
step = "dedupe"
field = "question"
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, SerializeAsAny, Tag, field_validator, model_validator

from tessera.ask.embedder import EmbedderConfig
from tessera.ask.endpoint import EndpointConfig
from tessera.ask.local import EngineConfig
from tessera.curate.sources import SourceConfig
from tessera.curate.steps.answers import Extract, Majority, PassRate, Verify
from tessera.curate.steps.arrange import Blend, Order, Pair
from tessera.curate.steps.ask import (
    Asking,
    Classify,
    ExtractKnown,
    ExtractProblems,
    Generate,
    Judge,
)
from tessera.curate.steps.contamination import Decontaminate, Nearest, SameProblem
from tessera.curate.steps.duplicates import Dedupe, NearDedupe
from tessera.curate.steps.filters import Code, Label, Language, Length, Licence, Tags, Where
from tessera.data.dialects import Dialect
from tessera.runs.recipe import Config, RecipeError, validate
from tessera.table import nearest

STEPS: dict[str, type[Config]] = {
    "extract_problems": ExtractProblems,
    "classify": Classify,
    "extract_known": ExtractKnown,
    "generate": Generate,
    "extract_answer": Extract,
    "verify": Verify,
    "judge": Judge,
    "majority": Majority,
    "pass_rate": PassRate,
    "tags": Tags,
    "where": Where,
    "label": Label,
    "licence": Licence,
    "length": Length,
    "language": Language,
    "code": Code,
    "dedupe": Dedupe,
    "near_dedupe": NearDedupe,
    "decontaminate": Decontaminate,
    "nearest": Nearest,
    "same_problem": SameProblem,
    "pair": Pair,
    "blend": Blend,
    "order": Order,
}
TeacherConfig = Annotated[
    Annotated[EndpointConfig, Tag("openai")]
    | Annotated[EngineConfig, Tag("engine")]
    | Annotated[EmbedderConfig, Tag("embedder")],
    Discriminator(lambda value: _kind(value)),
]


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("kind", "openai"))
    return getattr(value, "kind", "openai")


class CurateConfig(Config):
    """The table of the stage.

    dialect, format: of the rows that it gives. shard_mb: MB of a shard, the unit that is resumed
    and that processes share out. max_bad: the share of broken records that is not yet an error.
    """

    sources: list[SourceConfig] = Field(min_length=1)
    steps: list[SerializeAsAny[Config]] = []
    teachers: dict[str, TeacherConfig] = {}
    dialect: Dialect = "openai"
    format: Literal["jsonl", "parquet"] = "jsonl"
    shard_mb: float = Field(default=64.0, gt=0)
    max_bad: float = Field(default=0.01, ge=0, le=1)

    @field_validator("steps", mode="before")
    @classmethod
    def _known_steps(cls, value: Any) -> list[Config]:
        if not isinstance(value, list):
            raise ValueError("steps are a list of tables: [[curate.steps]]")
        return [_step(number, one) for number, one in enumerate(value, 1)]

    @model_validator(mode="after")
    def _teachers_are_named(self) -> CurateConfig:
        for number, step in enumerate(self.steps, 1):
            wanted = step.teacher if isinstance(step, Asking | Nearest) else None
            if wanted is not None and wanted not in self.teachers:
                raise ValueError(
                    f"step {number} asks the teacher {wanted!r}, and `teachers` names none such; "
                    + nearest(wanted, self.teachers)
                )
            if wanted is not None:
                _check_gives(self.teachers[wanted], f"step {number}", wanted, step)
        return self

    @property
    def files(self) -> list[str]:
        """Every file that the rows follow from."""
        found = [str(file) for source in self.sources for file in source.files()]
        for step in self.steps:
            for one in getattr(step, "against", []):
                found += [one.paths] if isinstance(one.paths, str) else one.paths
            found += [path] if (path := getattr(step, "tokenizer", None)) else []
        local = [one for one in self.teachers.values() if isinstance(one, EmbedderConfig)]
        return found + [one.model for one in local]

    def named(self) -> list[tuple[str, Any]]:
        """The steps under the names they are counted by: `2 dedupe`."""
        return [(f"{n} {getattr(one, 'step')}", one) for n, one in enumerate(self.steps, 1)]  # noqa: B009


def _check_gives(teacher: Config, where: str, name: str, step: Config) -> None:
    """Raises ValueError where answers are asked of an embedder, or vectors of an engine."""
    vectors = isinstance(step, Nearest)
    if vectors and isinstance(teacher, EngineConfig):
        raise ValueError(
            f"{where} asks the teacher {name!r} for vectors, and an engine gives none; make it "
            '{ kind = "embedder", model = "DIR OR HUB ID" }, or an endpoint that serves /embeddings'
        )
    if isinstance(teacher, EmbedderConfig) and not vectors:
        raise ValueError(
            f"{where} asks the teacher {name!r} for answers, and an embedder gives vectors alone; "
            'name an endpoint, or a teacher of kind "engine"'
        )


def _step(number: int, table: Any) -> Config:
    if isinstance(table, Config):
        return table
    name = table.get("step") if isinstance(table, dict) else None
    where = f"step {number}"
    if name not in STEPS:
        raise ValueError(f"{where}: there is no step {name!r}; {nearest(str(name), STEPS)}")
    try:
        return validate(STEPS[name], table, f"{where} ({name})")
    except RecipeError as error:
        raise ValueError(str(error)) from None
