"""Stage `curate`: rows in, chats out, step by step, with counts in and out of each.

    chats/part-*         the rows that came through, in the dialect and format of the table
    removed/*.jsonl      every other row: where it came from, which step left it out, and why
    tables/steps.jsonl   rows in and out of each step; reasons.jsonl, sources.jsonl

Passes (passes.py) go over shards; in a job of several processes every one takes its share of the
shards, over a disk that all see, and the main one decides what all rows together decide.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tessera import dist
from tessera.ask import embedder, local
from tessera.ask.ask import Answerer, Reply, Request
from tessera.ask.embedder import EmbedderConfig
from tessera.ask.endpoint import Endpoint, EndpointConfig
from tessera.curate.config import CurateConfig, TeacherConfig
from tessera.curate.passes import Count, Parts, ShardWriter, decide, in_batches
from tessera.curate.replies import Replies
from tessera.curate.sources import Shard, plan_shards, read_shard
from tessera.curate.steps import AskStep, SetStep
from tessera.curate.steps.arrange import Order
from tessera.curate.steps.similar import Nearest
from tessera.data import parquet
from tessera.data.conversation import Chat
from tessera.data.readers import Bad, DataError
from tessera.progress import Progress
from tessera.runs.files import atomic_write, writing
from tessera.runs.run import Run

__all__ = ["CurateConfig", "stage"]

READ = "read"
Named = tuple[str, Any]


@dataclass
class Pass:
    """What goes over a shard together: a verdict, what is asked, row steps, the next digest."""

    opening: Named | None = None
    ask: Named | None = None
    steps: list[Named] = field(default_factory=list)
    closing: Named | None = None

    @property
    def title(self) -> str:
        """The names of its steps."""
        parts = [self.ask, *self.steps, self.closing]
        return ", ".join(one[0] for one in parts if one) or (READ if not self.opening else "write")


def passes_of(named: Sequence[Named]) -> list[Pass]:
    """The steps as passes: one more behind every set step, and before every step that asks."""
    found = [Pass()]
    for name, step in named:
        if isinstance(step, SetStep | Order):
            found[-1].closing = (name, step)
            found.append(Pass(opening=(name, step)))
        elif isinstance(step, AskStep):
            untouched = len(found) > 1 and not (found[-1].steps or found[-1].ask)
            if not untouched:
                found.append(Pass())
            found[-1].ask = (name, step)
        else:
            found[-1].steps.append((name, step))
    return found


class Pipeline:
    """One run of the stage in one process."""

    def __init__(self, config: CurateConfig, run: Run, model: Path | None) -> None:
        self.config, self.run, self.model = config, run, model
        self.home = run.path / "passes"
        self.passes = passes_of(config.named())
        self.shards = self._planned()
        self._teachers: dict[str, Answerer] = {}

    def execute(self) -> None:
        """Brings every pass to its end. Raises DataError, AskError, FailureError."""
        for index, one in enumerate(self.passes):
            if not self._done(index):
                self._pass(index, one)
            dist.barrier()
            if dist.is_main():
                self._clean(index - 1)
                if index == 0:
                    self._check_bad()

    def _pass(self, index: int, one: Pass) -> None:
        before = None
        if index:
            previous, decided = self.passes[index - 1].closing, one.opening is not None
            if previous and dist.is_main():
                decide(self._home(index - 1), len(self.shards), previous[1], self.run.seed)
            dist.barrier()
            before = Parts.of(self._home(index - 1), len(self.shards), decided)
        if one.ask and isinstance(one.ask[1], Nearest):
            self._learn(index, one.ask[1])
        mine = range(dist.rank(), len(self.shards), dist.world())
        label = f"{index + 1}/{len(self.passes)} {one.title}"
        with Progress(label, len(mine), "rows", quiet=self.run.quiet or one.ask is not None) as bar:
            for number in mine:
                writer = self._writer(index, number)
                if not writer.done:
                    writer.write(self._batches(writer, index, one, before), one.steps)
                    self._journal(index, number).unlink(missing_ok=True)
                    bar.advance(1, writer.rows)
                else:
                    bar.advance(1, 0)

    def _batches(
        self, writer: ShardWriter, index: int, one: Pass, before: Parts | None
    ) -> Iterator[list[Chat]]:
        """The rows of a shard as they come to the row steps of a pass."""
        if before is None:
            return in_batches(self._read(writer))
        if one.ask is None:
            return in_batches(_arrivals(writer, one, before, writer.note))
        return in_batches(self._asked(writer, index, one, before))

    def _read(self, writer: ShardWriter) -> Iterator[Chat]:
        shard = self.shards[writer.number]
        for found in read_shard(shard, self.config.sources[shard.source]):
            if isinstance(found, Bad):
                writer.note_bad(READ, found)
            else:
                yield from writer.note(READ, found, found)

    def _asked(self, writer: ShardWriter, index: int, one: Pass, before: Parts) -> Iterator[Chat]:
        """The rows behind a step that asks: all replies into the journal, then out of it."""
        assert one.ask
        name, step = one.ask
        teacher = self._teacher(step.teacher)
        with Replies(self._journal(index, writer.number)) as journal:
            coming = (
                request
                for chat in _arrivals(writer, one, before, _uncounted)
                for request in step.requests(chat)
            )
            self._ask(journal, teacher, list(_missing(coming, journal, teacher.model)), name)
            for chat in _arrivals(writer, one, before, writer.note):
                requests = step.requests(chat)
                replies = [journal.get(one.key(teacher.model)) for one in requests]
                result = step.receive(chat, replies) if requests else chat
                yield from writer.note(name, chat, result)

    def _ask(
        self, journal: Replies, teacher: Answerer, requests: Sequence[Request], name: str
    ) -> None:
        """Asks what the journal lacks, and keeps each reply as it comes."""
        if not requests:
            return
        known = len(journal)
        with Progress(name, known + len(requests), "requests", quiet=self.run.quiet) as bar:
            bar.advance(known, 0)

            def receive(request: Request, reply: Reply) -> None:
                journal.add(request.key(teacher.model), reply)
                bar.advance()

            teacher.ask(requests, receive)

    def _learn(self, index: int, step: Nearest) -> None:
        """Gives `nearest` the embeddings of its problems; the main process asks for them."""
        teacher, requests = self._teacher(step.teacher), step.problems()
        path = self._home(index) / "problems.jsonl"
        if dist.is_main():
            with Replies(path) as journal:
                missing = list(_missing(iter(requests), journal, teacher.model))
                self._ask(journal, teacher, missing, "problems")
                step.learn([journal.get(one.key(teacher.model)) for one in requests])
        dist.barrier()
        if not dist.is_main():
            with Replies(path) as journal:
                step.learn([journal.get(one.key(teacher.model)) for one in requests])

    def _teacher(self, name: str) -> Answerer:
        if name not in self._teachers:
            self._teachers[name] = self._open(self.config.teachers[name])
        return self._teachers[name]

    def _open(self, config: TeacherConfig) -> Answerer:
        if isinstance(config, EndpointConfig):
            return Endpoint(config, self.run.seed)
        if isinstance(config, EmbedderConfig):
            return embedder.load(config)
        return local.load(config, self.model, self.run.seed)

    def _planned(self) -> list[Shard]:
        """The shards, cut once, so that a resumed run cuts the same."""
        path = self.home / "shards.json"
        if dist.is_main() and not path.is_file():
            shards = plan_shards(self.config.sources, self.config.shard_mb)
            with writing(self.home):
                self.home.mkdir(parents=True, exist_ok=True)
            atomic_write(path, json.dumps([asdict(one) for one in shards]))
        dist.barrier()
        return [Shard(**one) for one in json.loads(path.read_text(encoding="utf-8"))]

    def _home(self, index: int) -> Path:
        return self.home / f"{index:02}"

    def _journal(self, index: int, number: int) -> Path:
        return self._home(index) / f"journal-{number:05}.jsonl"

    def _writer(self, index: int, number: int) -> ShardWriter:
        closing = self.passes[index].closing
        last = index == len(self.passes) - 1
        step, dialect = closing[1] if closing else None, self.config.dialect if last else None
        return ShardWriter(self._home(index), number, step, dialect)

    def _done(self, index: int) -> bool:
        return all(self._writer(index, number).done for number in range(len(self.shards)))

    def _clean(self, index: int) -> None:
        """Deletes the rows of a pass whose successor is done."""
        for what in ("part-*.jsonl", "digest-*.npy", "verdicts.npy"):
            for path in self._home(index).glob(what) if index >= 0 else ():
                path.unlink(missing_ok=True)

    def told(self, index: int) -> Iterator[dict[str, Any]]:
        """What each shard of a pass has counted."""
        for number in range(len(self.shards)):
            path = self._writer(index, number).path("counts", "json")
            yield json.loads(path.read_text(encoding="utf-8"))

    def _check_bad(self) -> None:
        read = Count()
        for one in self.told(0):
            if READ in one["steps"]:
                read.add(one["steps"][READ])
        bad = read.rows_in - read.rows_out
        if bad > self.config.max_bad * read.rows_in:
            most = "\n".join(f"  {n:,} x {why}" for why, n in read.reasons.most_common(5))
            raise DataError(
                f"{bad:,} of {read.rows_in:,} records are broken, more than max_bad = "
                f"{self.config.max_bad:g} allows (all are listed in "
                f"{self._home(0)}/removed-*.jsonl):\n{most}\nRepair them, or raise `max_bad`"
            )


def _arrivals(writer: ShardWriter, one: Pass, before: Parts, note: Any) -> Iterator[Chat]:
    """The rows of a shard, the verdicts of the set step before carried out."""
    if one.opening is None:
        yield from (chat for chat, _ in before.read(writer.number))
    elif isinstance(one.opening[1], Order):
        for chat in before.read_in_order(writer.number):
            yield from note(one.opening[0], chat, chat)
    else:
        name, step = one.opening
        for chat, verdict in before.read(writer.number):
            yield from note(name, chat, step.judge(chat, verdict))


def _uncounted(name: str, chat: Chat, result: Any) -> Iterator[Chat]:
    """As `ShardWriter.note`, and counts nothing."""
    several = [result] if not isinstance(result, list) else result
    yield from (one for one in several if isinstance(one, Chat))


def _missing(requests: Iterator[Request], journal: Replies, model: str) -> Iterator[Request]:
    """The requests whose replies are not in the journal, each once."""
    seen: set[str] = set()
    for request in requests:
        key = request.key(model)
        if key not in journal and key not in seen:
            seen.add(key)
            yield request


def write_tables(pipeline: Pipeline, run: Run) -> list[dict[str, Any]]:
    """tables/steps, reasons and sources from all counts; returns the rows of `steps`."""
    counts: dict[str, Count] = {}
    groups: Counter[tuple[str, str, str]] = Counter()
    for index in range(len(pipeline.passes)):
        for one in pipeline.told(index):
            for name, found in one["steps"].items():
                counts.setdefault(name, Count()).add(found)
            for *names, rows in one["groups"]:
                groups[tuple(names)] += rows  # type: ignore[index]
    order = [READ, *(name for name, _ in pipeline.config.named()), "write"]
    steps = [
        {"step": name, "in": counts[name].rows_in, "out": counts[name].rows_out}
        | {"removed": counts[name].reasons.total()}
        for name in order
        if name in counts
    ]
    reasons = [
        {"step": name, "reason": why, "rows": rows}
        for name in order
        if name in counts
        for why, rows in counts[name].reasons.most_common()
    ]
    keys = ("source", "license", "reasoning")
    sources = [{**dict(zip(keys, g, strict=True)), "rows": n} for g, n in sorted(groups.items())]
    run.write_table("steps", steps)
    run.write_table("reasons", reasons)
    run.write_table("sources", sources)
    return steps


def collect(pipeline: Pipeline, run: Run) -> None:
    """Moves the last pass's rows into chats/ and what every pass left out into removed/."""
    last = len(pipeline.passes) - 1
    for name in ("chats", "removed"):
        with writing(run.path):
            (run.path / name).mkdir(exist_ok=True)
    with writing(run.path):
        for path in sorted((pipeline.home / f"{last:02}").glob("part-*.jsonl")):
            os.replace(path, run.path / "chats" / path.name)
        if pipeline.config.format == "parquet":
            _convert(run)
        for path in sorted(pipeline.home.glob("*/removed-*.jsonl")):
            number = path.stem.removeprefix("removed-")
            if path.stat().st_size:
                os.replace(path, run.path / "removed" / f"{path.parent.name}-{number}.jsonl")
            else:
                path.unlink()


def _convert(run: Run) -> None:
    """Makes Parquet of the rows; they stay as they are where no columns hold them.

    Whatever teachers were asked for is in the rows by now, so this fails no run.
    """
    try:
        parquet.convert(sorted((run.path / "chats").glob("*.jsonl")))
    except DataError as error:
        run.say(f"the rows stay JSON lines: {error}")


def stage(config: CurateConfig, run: Run, inputs: Mapping[str, Path | None]) -> None:
    """Stage `curate`. Raises DataError where no row comes through."""
    pipeline = Pipeline(config, run, inputs.get("model"))
    pipeline.execute()
    if not dist.is_main():
        return
    steps = write_tables(pipeline, run)
    collect(pipeline, run)
    for row in steps:
        run.say(f"{row['step']}: {row['in']:,} rows in, {row['out']:,} out")
    if not any((run.path / "chats").glob("part-*")) or not steps or not steps[-1]["out"]:
        emptied = next((row["step"] for row in steps if not row["out"]), READ)
        raise DataError(f'no row came through: the step "{emptied}" left none; see tables/reasons')
