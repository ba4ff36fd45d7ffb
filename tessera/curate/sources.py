"""The files of rows that curation reads, cut into shards that are worked on one at a time.

A file of JSON lines is cut at lines, every `shard_mb`; Parquet, JSON lists and packed files are one
shard each. A row keeps its fields and gets its licence, source and place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from tessera.data.conversation import Chat, SchemaError, check
from tessera.data.dialects import read_row
from tessera.data.problems import family, problem
from tessera.data.readers import EXCERPT, Bad, expand, is_lines, read_rows
from tessera.runs.recipe import Config


class SourceConfig(Config):
    """Files of rows: chats of any dialect (schema.py), or `question` names the key of the text.
    tasks: instead, numbers of problems by name (data/problems.py), as questions without answers.

    question, answer: keys whose texts become the user's and the assistant's turn. expected: the key
    of the known answer. license: of rows that name none. labels: more keys for every row.
    """

    paths: str | list[str] = []
    tasks: dict[str, Annotated[int, Field(ge=1)]] = {}
    name: str | None = None
    license: str | None = None
    question: str | None = None
    answer: str | None = None
    expected: str | None = None
    labels: dict[str, Any] = {}

    @model_validator(mode="after")
    def _something_to_read(self) -> SourceConfig:
        if bool(self.paths) == bool(self.tasks):
            raise ValueError("name either `paths` of files or `tasks` to draw")
        for name in self.tasks:
            family(name)
        return self

    @model_validator(mode="after")
    def _answers_have_questions(self) -> SourceConfig:
        if self.answer and not self.question:
            raise ValueError("`answer` without `question`: name the key of the question, too")
        return self

    def files(self) -> list[Path]:
        """The files. Raises DataError where a pattern matches none."""
        return expand([self.paths] if isinstance(self.paths, str) else self.paths)


@dataclass(frozen=True, slots=True)
class Shard:
    """Bytes `start` to `stop` of a file, or all of it (`stop` is None); line: of its first row.
    Of a task, which `path` names, problems `start` to `stop`.
    """

    source: int
    path: str
    start: int = 0
    stop: int | None = None
    line: int = 1


def plan_shards(sources: Sequence[SourceConfig], shard_mb: float) -> list[Shard]:
    """The shards of all files, in order."""
    found: list[Shard] = []
    for index, source in enumerate(sources):
        found += [Shard(index, name, 0, count) for name, count in source.tasks.items()]
        for path in source.files():
            if is_lines(path):
                found += _cut(index, path, max(1, int(shard_mb * 1e6)))
            else:
                found.append(Shard(index, str(path)))
    return found


def _cut(index: int, path: Path, size: int) -> Iterator[Shard]:
    start = at = 0
    first = 1
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            at += len(line)
            if at - start >= size:
                yield Shard(index, str(path), start, at, first)
                start, first = at, number + 1
    if at > start or not at:
        yield Shard(index, str(path), start, at, first)


def read_shard(shard: Shard, source: SourceConfig) -> Iterator[Chat | Bad]:
    """The rows of a shard; a record that is no row is `Bad`."""
    if source.tasks:
        yield from _drawn(shard, source)
        return
    path = Path(shard.path)
    name = source.name or path.stem
    for number, row in read_rows(path, shard.start, shard.stop, shard.line):
        if isinstance(row, Bad):
            yield replace(row, reason=re.sub(r" at column \d+", "", row.reason))
            continue
        try:
            yield _placed(_chat(row, source), source, name, f"{path}:{number}")
        except SchemaError as error:
            excerpt = json.dumps(row, ensure_ascii=True, default=str)[:EXCERPT]
            yield Bad(shard.path, number, str(error), excerpt)


def _drawn(shard: Shard, source: SourceConfig) -> Iterator[Chat]:
    """Problems of the training split, each question once."""
    drawn = (problem(shard.path, 0, index) for index in range(shard.start, shard.stop or 0))
    for number, one in enumerate({one.question: one for one in drawn}.values(), 1):
        extra = {"category": one.name, "level": one.level, **one.fields}
        if one.answer:
            extra["expected_answer"] = one.answer
        chat = Chat([{"role": "user", "content": one.question}], None, [], extra)
        yield _placed(chat, source, source.name or one.name, f"{one.name}:{number}")


def _chat(row: Any, source: SourceConfig) -> Chat:
    if source.question is None:
        return read_row(row)
    if not isinstance(row, dict):
        raise SchemaError(f"a {type(row).__name__}, not an object")
    messages = [{"role": "user", "content": _text(row, source.question)}]
    if source.answer:
        messages.append({"role": "assistant", "content": _text(row, source.answer)})
    used = (source.question, source.answer)
    return check(Chat(messages, None, [], {k: v for k, v in row.items() if k not in used}))


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise SchemaError(f"{key} is {'absent' if value is None else 'no text'}")
    return value


def _placed(chat: Chat, source: SourceConfig, name: str, place: str) -> Chat:
    extra = {**source.labels, **chat.extra}
    if source.expected and (known := chat.extra.get(source.expected)) is not None:
        extra["expected_answer"] = str(known)
    if extra.get("license") is None and source.license:
        extra["license"] = source.license
    before = extra.get("lineage")
    lineage = before if before and isinstance(before, list) else [place]
    return replace(chat, extra={**extra, "source": name, "lineage": lineage})
