"""What a [data] table may say: the sources, how each is read and split, and the tokenizer.

    [data]                              # one source: its keys stand in the table itself
    tokenizer = "byte"
    paths = "stories/*.jsonl"

    [data]                              # several, mixed by weight
    tokenizer = { bpe = 32000 }
    sources.web = { paths = "web/*.parquet", weight = 0.7 }
    sources.code = { dataset = "owner/name", field = "content", weight = 0.2 }
    sources.sums = { tasks = { calc = 8000 }, weight = 0.1 }

A weight is a share of the *trained tokens*; only ratios count. Epochs follow from it: a small
source with a large weight begins anew sooner than the others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tessera.data.dataset import local_dataset
from tessera.data.problems import family
from tessera.data.readers import Format, expand
from tessera.data.template import TemplateError, template_of
from tessera.data.tokenizer import Tokenizer, TokenizerError, byte_tokenizer, load_tokenizer
from tessera.runs.plan import Step, maker
from tessera.runs.run import is_done

SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # a directory of the run, too
CHAT_KEYS = ("reasoning", "turns", "switch", "hasty")


class BPE(BaseModel):
    """Train a byte-level BPE of `bpe` tokens on the training documents.

    tokens: texts that are one token wherever they stand, on top of those. chat: the marks of the
    built-in chat template and `<think>`, `</think>` are, too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bpe: int = Field(ge=259)
    tokens: list[str] = []
    chat: bool = False

    @field_validator("tokens")
    @classmethod
    def _not_empty(cls, value: list[str]) -> list[str]:
        if "" in value or len(set(value)) != len(value):
            raise ValueError("each of `tokens` is a text of its own, one sign or more")
        return value


class CacheConfig(BaseModel):
    """Where tokenised files are kept for the next recipe; changes nothing that is computed.

    directory: `.tokens` beside the recipes' directories unless given.
    gib: what was used least recently is deleted above so many GiB; 0 keeps nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    directory: str | None = None
    gib: float = Field(default=64.0, ge=0, allow_inf_nan=False)


class Reading(BaseModel):
    """What one source reads, and how it is cut into training and held-out documents.

    paths, heldout_paths: files or globs. heldout_paths hold out whole files instead of a share.
    dataset: a hub id, or a directory: what `save_to_disk` wrote, or of data files. `subset` (its
    configuration), `split`, `revision` (a commit or tag) say which; `heldout_split` is held out.
    tasks: numbers of problems to draw.
    field: the column or key that holds the text; separator: what stands between documents of .txt.
    heldout: a share (0.02) or a number (100) of the documents, taken from files and dataset (where
    none are held out by name) and drawn anew for each task.
    limit: the first so many documents of files and dataset, which is then streamed.
    format = "chat": rows of conversations in any dialect (dialects/), of .jsonl, .json, .parquet or
    a dataset, and problems as question, thought and answer. Then `reasoning` keeps the rows of one
    mode, `turns` says which answers are trained, and `switch` how the mode is said (switch.py).
    `hasty` is the share of problems whose thought skips intermediate results (problems.py).
    format = "completion": rows of `prompt` and `completion`, or problems and their solutions, of
    which only the completion is trained.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    paths: str | list[str] = []
    heldout_paths: str | list[str] = []
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    heldout_split: str | None = None
    revision: str | None = None
    tasks: dict[str, int] = {}
    format: Format = "auto"
    field: str = "text"
    separator: str = "<|endoftext|>"
    heldout: int | float = 0.02
    limit: int | None = Field(None, ge=1)
    reasoning: Literal["on", "off"] | None = None
    turns: Literal["last", "all"] = "all"
    switch: str = "detailed thinking"
    hasty: float = Field(default=0.0, ge=0, le=1)

    @field_validator("switch")
    @classmethod
    def _sayable(cls, value: str) -> str:
        if value not in ("detailed thinking", "/no_think") and not value.isidentifier():
            raise ValueError(
                'say the mode by "detailed thinking", "/no_think" or the name of a variable of the '
                'chat template, for example "enable_thinking"'
            )
        return value

    @field_validator("heldout")
    @classmethod
    def _share_or_number(cls, value: int | float) -> int | float:
        if value < 0 or (isinstance(value, float) and value >= 1):
            raise ValueError("give a share from 0.0 to below 1.0, or a whole number of documents")
        return value

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, value: dict[str, int]) -> dict[str, int]:
        for name, count in value.items():
            family(name)
            if count < 1:
                raise ValueError(f"{name} = {count}: give the number of documents, 1 or more")
        return value

    @model_validator(mode="after")
    def _belongs_to_chats(self) -> Reading:
        given = [key for key in CHAT_KEYS if getattr(self, key) != self._default(key)]
        if given and not self.chats:
            raise ValueError(f'`{given[0]}` is about chats; set format = "chat"')
        return self

    @model_validator(mode="after")
    def _belongs_to_a_dataset(self) -> Reading:
        lonely = [k for k in ("subset", "heldout_split", "revision") if getattr(self, k)]
        if self.dataset is None and lonely:
            raise ValueError(f"`{lonely[0]}` says which part of a `dataset`, and none is named")
        return self

    @classmethod
    def _default(cls, key: str) -> Any:
        return cls.model_fields[key].default

    @property
    def chats(self) -> bool:
        """True where the documents are conversations."""
        return self.format == "chat"

    @property
    def pairs(self) -> bool:
        """True where they are prompts with completions."""
        return self.format == "completion"

    @property
    def masked(self) -> bool:
        """True where not every token of a document is trained."""
        return self.chats or self.pairs

    @property
    def reads(self) -> bool:
        """True where anything to read is named."""
        return bool(self.paths or self.dataset or self.tasks)

    def inputs(self) -> list[Path]:
        """Files and directories on disk that it reads. Raises DataError naming what is absent."""
        found = [*expand(as_list(self.paths)), *expand(as_list(self.heldout_paths))]
        home = local_dataset(self.dataset) if self.dataset else None
        return [*found, home] if home else found

    def num_heldout(self, documents: int) -> int:
        """How many of so many documents are held out: at least one where any are asked for."""
        if isinstance(self.heldout, int):
            return self.heldout
        return max(1, round(self.heldout * documents)) if self.heldout else 0


class SourceConfig(Reading):
    """One of several sources.

    weight: its share of the trained tokens, over the sum of all weights.
    """

    weight: float = 1.0

    @field_validator("weight")
    @classmethod
    def _positive(cls, value: float) -> float:
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(
                "a weight is a share of the trained tokens: give a number above 0, or leave the "
                "source out"
            )
        return value

    @model_validator(mode="after")
    def _something(self) -> SourceConfig:
        if not self.reads:
            raise ValueError("nothing to read: set `paths`, `dataset` or `tasks`")
        return self


class DataConfig(Reading):
    """What to read and how to cut it: one source in the table itself, or several in `sources`.

    tokenizer: "byte", { bpe = N } or a path; not given where the table names a `model`.
    end: what the last token of a document predicts; "none" lets it predict nothing.
    max_bad: share of a source's records that may be broken and is quarantined; more stop the stage.
    """

    sources: dict[str, SourceConfig] = {}
    tokenizer: str | BPE | None = None
    bos: bool = True
    end: Literal["eos", "bos", "none"] = "eos"
    max_bad: float = Field(0.01, ge=0, le=1)
    cache: CacheConfig = Field(default_factory=CacheConfig, exclude=True)

    @field_validator("sources")
    @classmethod
    def _names(cls, value: dict[str, SourceConfig]) -> dict[str, SourceConfig]:
        for name in value:
            if not SOURCE_NAME.fullmatch(name):
                raise ValueError(f"{name!r} names no directory; use letters, digits, - and _")
        return value

    @model_validator(mode="after")
    def _one_or_several(self) -> DataConfig:
        here = [key for key in Reading.model_fields if getattr(self, key) != self._default(key)]
        if self.sources and here:
            raise ValueError(
                f"`{here[0]}` stands beside `sources`; move it into the source that it is about "
                f"({', '.join(self.sources)})"
            )
        if not self.sources and not self.reads:
            raise ValueError(
                "nothing to read: set `paths` (files or globs), `dataset` (a hub id or a "
                "directory), `tasks` (as { calc = 1000 }), or several `sources`"
            )
        return self

    @property
    def holds_chats(self) -> bool:
        return any(one.chats for one in self.readings.values())

    def warnings(self, step: Step, steps: Sequence[Step]) -> list[str]:
        return no_chat_template(step, steps) if self.holds_chats else []

    @property
    def readings(self) -> dict[str, Reading]:
        """The sources by name, in the order of their names; the only one of a flat table is ""."""
        return dict(sorted(self.sources.items())) if self.sources else {"": self}

    @property
    def shares(self) -> dict[str, float]:
        """The share of the trained tokens that each source is to have; they sum to 1."""
        weights = {name: source.weight for name, source in sorted(self.sources.items())}
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items()} or {"": 1.0}

    @property
    def files(self) -> list[Path]:
        """All that these settings read from disk. Raises DataError naming what is not there."""
        found = [path for one in self.readings.values() for path in one.inputs()]
        named = isinstance(self.tokenizer, str) and self.tokenizer != "byte"
        return [*found, Path(self.tokenizer)] if named else found  # type: ignore[arg-type]


def no_chat_template(step: Step, steps: Sequence[Step]) -> list[str]:
    """A warning for a stage that renders chats, where its tokenizer cannot.

    A model keeps the tokenizer of what it is made from, down to a checkpoint or to data. Nothing is
    said of a tokenizer that is not there yet.
    """
    reason = _no_template(step, steps)
    return [f"it renders chats, and {reason}"] if reason else []


def _no_template(step: Step, steps: Sequence[Step]) -> str:
    config = step.config
    if isinstance(config, DataConfig) and isinstance(config.tokenizer, BPE):
        lacks = not (config.tokenizer.chat or config.tokenizer.tokens)
        return "its tokenizer is trained without chat = true, so it has no marks" if lacks else ""
    if isinstance(config, DataConfig) and config.tokenizer == "byte":
        return _template_error(byte_tokenizer())
    if isinstance(config, DataConfig) and isinstance(config.tokenizer, str):
        source = Path(config.tokenizer)
    elif step.stage.name == "parent" and "path" in step.spec.table:
        source = step.files["path"]
    else:
        needs = ("model", "parent", "data")
        source = next((step.inputs[need] for need in needs if step.inputs.get(need)), None)
    if not isinstance(source, Path):
        return ""
    origin = maker(source, steps)
    if origin is not None and not is_done(source):
        return _no_template(origin, steps)
    try:
        return _template_error(load_tokenizer(source))
    except TokenizerError:
        return ""


def _template_error(tokenizer: Tokenizer) -> str:
    try:
        template_of(tokenizer)
    except TemplateError as error:
        return str(error)
    return ""


def as_list(value: str | list[str]) -> list[str]:
    """A key that may hold one string or several."""
    return [value] if isinstance(value, str) else value
