"""What a [data] table may say: the sources, how each is read and split, and the tokenizer.

    [data]                              # one source: its keys stand in the table itself
    tokenizer = "byte"
    paths = "stories/*.jsonl"

    [data]                              # several, mixed by weight
    tokenizer = { bpe = 32000 }
    sources.web = { paths = "web/*.parquet", weight = 0.7 }
    sources.code = { dataset = "owner/name", field = "content", weight = 0.2 }
    sources.sums = { tasks = { calc = 8000 }, weight = 0.1 }

A weight is a share of the *trained tokens*; only ratios count.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from tessera.data.chat import ChatEncoder, Turns
from tessera.data.conversation import Chat
from tessera.data.dataset import local_dataset
from tessera.data.dialects import read_chats
from tessera.data.problems import family
from tessera.data.readers import (
    DataError,
    Format,
    expand,
    no_chats,
    with_chats,
    without_chats,
)
from tessera.data.switch import DETAILED, NO_THINK, NONE, Switch, switch_of_model
from tessera.data.template import TemplateError, template_of
from tessera.data.tokenizer import Tokenizer, TokenizerError, byte_tokenizer, load_tokenizer
from tessera.runs.plan import Step, maker
from tessera.runs.recipe import Config
from tessera.runs.run import is_done

SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # a directory of the run, too
ROWS_LOOKED_AT = 100  # before anything is read whole
CHAT_KEYS = ("reasoning", "turns", "switch", "hasty")


class BPE(Config):
    """Train a byte-level BPE of `bpe` tokens on the training documents.

    tokens: texts that are one token wherever they stand, on top of those. chat: the marks of the
    built-in chat template and `<think>`, `</think>` are, too.
    """

    bpe: int = Field(ge=259)
    tokens: list[Annotated[str, Field(min_length=1)]] = []
    chat: bool = False


class CacheConfig(Config):
    """Where tokenised files are kept for the next recipe; changes nothing that is computed.

    directory: `.tokens` beside the recipes' directories unless given. gib: what was used least
    recently is deleted above so many GiB; 0 keeps nothing.
    """

    directory: str | None = None
    gib: float = Field(default=64.0, ge=0, allow_inf_nan=False)


class Reading(Config):
    """What one source reads, and how it is cut into training and held-out documents.

    paths, heldout_paths: files or globs. heldout_paths hold out whole files instead of a share.
    paths = "chats" are the rows of the run of `curate` that the stage's `chats` names.
    dataset: a hub id, or a directory: what `save_to_disk` wrote, or of data files.
    tasks: numbers of problems to draw.
    field: the column or key that holds the text. separator: between documents of .txt.
    heldout: a share (0.02) or a number (100) of the documents, taken from files and dataset (where
    none are held out by name) and drawn anew for each task.
    limit: the first so many documents of files and dataset, which is then streamed.
    format: "chat" reads rows of conversations in any dialect (dialects.py), and problems as
    question, thought and answer; "completion" rows of `prompt` and `completion`, or problems and
    their solutions, of which only the completion is trained.
    reasoning, turns, switch, hasty are about chats: the rows of one mode, which answers are
    trained, how the mode is said (switch.py; the tokenizer's own where not given), and the share of
    problems whose thought skips results.
    """

    paths: str | list[str] = []
    heldout_paths: str | list[str] = []
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    heldout_split: str | None = None
    revision: str | None = None
    tasks: dict[str, Annotated[int, Field(ge=1)]] = {}
    format: Format = "auto"
    field: str = "text"
    separator: str = "<|endoftext|>"
    heldout: int | float = 0.02
    limit: int | None = Field(None, ge=1)
    reasoning: Literal["on", "off"] | None = None
    turns: Literal["last", "all"] = "all"
    switch: Switch | None = None
    hasty: float = Field(default=0.0, ge=0, le=1)

    @field_validator("heldout")
    @classmethod
    def _share_or_number(cls, value: int | float) -> int | float:
        if value < 0 or (isinstance(value, float) and value >= 1):
            raise ValueError("give a share from 0.0 to below 1.0, or a whole number of documents")
        return value

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, value: dict[str, int]) -> dict[str, int]:
        for name in value:
            family(name)
        return value

    @model_validator(mode="after")
    def _keys_that_need_another(self) -> Reading:
        several = getattr(self, "sources", None)  # whose own `format` it is
        if not self.chats and not several and (given := self._given(*CHAT_KEYS)):
            raise ValueError(f'`{given[0]}` is about chats; set format = "chat"')
        if self.dataset is None and (given := self._given("subset", "heldout_split", "revision")):
            raise ValueError(f"`{given[0]}` says which part of a `dataset`, and none is named")
        return self

    def _given(self, *keys: str) -> list[str]:
        """Those of some keys that differ from their defaults."""
        return [k for k in keys if getattr(self, k) != type(self).model_fields[k].default]

    @property
    def chats(self) -> bool:
        """True where the documents are conversations."""
        return self.format == "chat"

    @property
    def masked(self) -> bool:
        """True where not every token of a document is trained."""
        return self.format in ("chat", "completion")

    @property
    def reads(self) -> bool:
        """True where anything to read is named."""
        return bool(self.paths or self.dataset or self.tasks)

    def inputs(self) -> list[Path]:
        """Files and directories on disk that it reads. Raises DataError naming what is absent."""
        found = [*expand(without_chats(self.paths)), *expand(self.heldout_paths)]
        home = local_dataset(self.dataset) if self.dataset else None
        return [*found, home] if home else found

    def reading(self, chats: Path | None) -> Self:
        """With the files of that run of `curate` for "chats" in `paths`. Raises DataError."""
        return self.model_copy(update={"paths": with_chats(self.paths, chats)})

    def num_heldout(self, documents: int) -> int:
        """How many of so many documents are held out: at least one where any are asked for."""
        if isinstance(self.heldout, int):
            return self.heldout
        return max(1, round(self.heldout * documents)) if self.heldout else 0


class SourceConfig(Reading):
    """One of several sources; weight: its share of the trained tokens, over the sum of all."""

    weight: float = Field(1.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _something(self) -> SourceConfig:
        if not self.reads:
            raise ValueError("nothing to read: set `paths`, `dataset` or `tasks`")
        return self


class DataConfig(Reading):
    """What to read and how to cut it: one source in the table itself, or several in `sources`.

    switch: also beside `sources`, for all of them that hold chats.
    tokenizer: "byte", { bpe = N } or a path; not given where the table names a `model`.
    bos: whether a text begins with <s>; left out, as the tokenizer's own rule says.
    end: what the last token of a document predicts; "none" lets it predict nothing.
    max_bad: share of a source's records that may be broken and is quarantined; more stop the stage.
    """

    sources: dict[str, SourceConfig] = {}
    tokenizer: str | BPE | None = None
    bos: bool | None = None
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
        if self.sources and (here := self._given(*Reading.model_fields.keys() - {"switch"})):
            raise ValueError(f"`{here[0]}` stands beside `sources`; move it into one of them")
        if not self.sources and not self.reads:
            raise ValueError(
                "nothing to read: set `paths`, `dataset`, `tasks` (as { calc = 1000 }) or `sources`"
            )
        return self

    @property
    def holds_chats(self) -> bool:
        return any(one.chats for one in self.readings.values())

    def warnings(self, step: Step, steps: Sequence[Step]) -> list[str]:
        from tessera.data.sources import forewarn

        told = no_chat_template(step, steps) if self.holds_chats else []
        for one in self.readings.values():
            told += no_chats(one.paths, step.inputs.get("chats"))
            chats = one.chats and not told
            told += forewarn(
                one, encoder_for(step, steps, one.turns, one.switch) if chats else None
            )
        return [*told, *(_unsaid(step, steps) if self.holds_chats else [])]

    def reading(self, chats: Path | None) -> Self:
        sources = {name: one.reading(chats) for name, one in self.sources.items()}
        return super().reading(chats).model_copy(update={"sources": sources})

    @property
    def readings(self) -> dict[str, Reading]:
        """The sources by name, in the order of their names; the only one of a flat table is ""."""
        if not self.sources:
            return {"": self}
        own = {"switch": self.switch}
        return {
            name: one if one.switch or not one.chats else one.model_copy(update=own)
            for name, one in sorted(self.sources.items())
        }

    @property
    def shares(self) -> dict[str, float]:
        """The share of the trained tokens that each source is to have; they sum to 1."""
        named = sorted(self.sources.items())
        total = sum(source.weight for _, source in named)
        return {name: source.weight / total for name, source in named} or {"": 1.0}

    @property
    def files(self) -> list[Path]:
        """All that these settings read from disk. Raises DataError naming what is not there."""
        found = [path for one in self.readings.values() for path in one.inputs()]
        named = isinstance(self.tokenizer, str) and self.tokenizer != "byte"
        return [*found, Path(self.tokenizer)] if named else found  # type: ignore[arg-type]


def no_chat_template(step: Step, steps: Sequence[Step]) -> list[str]:
    """A warning for a stage that renders chats, where its tokenizer cannot."""
    try:
        tokenizer = _tokenizer_of(step, steps)
        if tokenizer is not None:
            template_of(tokenizer)
    except TemplateError as error:
        return [f"it renders chats, and {error}"]
    return []


def encoder_for(
    step: Step, steps: Sequence[Step], turns: Turns, switch: str | None
) -> ChatEncoder | None:
    """How a stage's chats will be rendered; None where its tokenizer or template is not there."""
    try:
        tokenizer = _tokenizer_of(step, steps)
        return ChatEncoder.of(tokenizer, turns, switch) if tokenizer else None
    except TemplateError:
        return None


def unsaid(reading: Reading) -> str | None:
    """What is wrong with rows that say how to think, where the model has no switch to be told by.

    None where no switch is wanted, or none of the first rows says anything.
    """
    if reading.switch == NONE or not reading.chats:
        return None
    rows = (row for path in expand(without_chats(reading.paths)) for _, row in read_chats(path))
    chats = (one for one in itertools.islice(rows, ROWS_LOOKED_AT) if isinstance(one, Chat))
    if not (reading.reasoning or reading.tasks or any(one.reasoning for one in chats)):
        return None
    return (
        "the chats are with and without reasoning, and the model has no switch, so nothing in a "
        f'prompt says which is wanted; to teach it one set switch = "{DETAILED}" (or "{NO_THINK}", '
        f'or a variable of its chat template), else switch = "{NONE}"'
    )


def _unsaid(step: Step, steps: Sequence[Step]) -> list[str]:
    """`unsaid` of each source, where the model's switch is known before anything is run."""
    assert isinstance(step.config, DataConfig)
    try:
        known = _switch_of(step, steps)
        found = step.config.readings.items() if known == NONE else ()
        told = ((name, unsaid(one)) for name, one in found if one.switch is None)
        return [f"sources.{name}: {text}" if name else text for name, text in told if text]
    except (TemplateError, DataError):
        return []  # said by others


def _switch_of(step: Step, steps: Sequence[Step]) -> str | None:
    """The switch of the model whose tokenizer a stage takes, None where it is not known yet."""
    if isinstance(step.config, DataConfig) and isinstance(step.config.tokenizer, BPE):
        return NONE  # the built-in template's
    needs = ("data", "model") if step.stage.name == "sft" else ("model", "parent", "data")
    makers = (maker(step.inputs.get(need), steps) for need in needs)
    origin = next((one for one in makers if one is not None), None)
    if origin is not None and not is_done(origin.path):
        made = origin.config.readings if isinstance(origin.config, DataConfig) else {}
        said = [one.switch for one in made.values() if one.switch not in (None, NONE)]
        return said[0] if said else _switch_of(origin, steps)
    tokenizer = _tokenizer_of(step, steps)
    return None if tokenizer is None else switch_of_model(tokenizer.home, template_of(tokenizer))


def _tokenizer_of(step: Step, steps: Sequence[Step]) -> Tokenizer | None:
    """The tokenizer of what a model is made from, down to a checkpoint or to data.

    None where it is not there yet. Raises TemplateError for one to be trained without marks.
    """
    wanted = step.config.tokenizer if isinstance(step.config, DataConfig) else None
    if isinstance(wanted, BPE):
        if not (wanted.chat or wanted.tokens):
            raise TemplateError("its tokenizer is trained without chat = true, so it has no marks")
        return None
    if wanted == "byte":
        return byte_tokenizer()
    if wanted is not None:
        source = Path(wanted)
    elif step.stage.name == "parent" and "path" in step.spec.table:
        source = step.files["path"]
    else:
        needs = ("model", "parent", "data")
        source = next((step.inputs[need] for need in needs if step.inputs.get(need)), None)
    if not isinstance(source, Path):
        return None
    origin = maker(source, steps)
    if origin is not None and not is_done(source):
        return _tokenizer_of(origin, steps)
    try:
        return load_tokenizer(source)
    except TokenizerError:
        return None
