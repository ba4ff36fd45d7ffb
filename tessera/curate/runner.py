"""Stage `curate`: rows in, chats out, step by step, with counts in and out of each.

    chats/part-*         the rows that came through, in the dialect and format of the table
    removed/*.jsonl      every other row: where it came from, which step left it out, and why
    tables/steps.jsonl   rows in and out of each step; reasons.jsonl, sources.jsonl

Steps that need no barrier between them go over a shard together, as a pass. A set step ends a pass:
the main process decides from the digests of all rows, and the next pass carries its verdicts out.
A step that asks begins one. Each process of a job works on its own shards, on a disk that all see.
Files of a pass:

    part-00007.jsonl     rows; digest-00007.npy: what the set step has to know of them
    removed-00007.jsonl  what was left out and why
    counts-00007.json    in, out, reasons; written last, by rename: the shard is done
    journal-00007.jsonl  replies, each written as it comes; verdicts.npy: of the whole set
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
from numpy.typing import NDArray

from tessera import dist
from tessera.ask import local
from tessera.ask.ask import Answerer, Reply, Request
from tessera.ask.endpoint import Endpoint, EndpointConfig
from tessera.ask.local import EmbedderConfig
from tessera.curate.config import CurateConfig, Step
from tessera.curate.sources import Shard, plan_shards, read_shard
from tessera.curate.steps import rows
from tessera.curate.steps.contamination import Nearest
from tessera.curate.steps.rows import AskStep, Drop, Result, RowStep, SetStep
from tessera.data import parquet
from tessera.data.conversation import Chat, SchemaError
from tessera.data.dialects import Dialect, write_row
from tessera.data.readers import Bad, DataError
from tessera.progress import Progress
from tessera.runs.files import Journal, atomic_write, sync, writing
from tessera.runs.run import Run

__all__ = ["CurateConfig", "stage"]
BATCH = 1024  # rows that go through the steps together
READ, WRITE = "read", "write"
REASONS = 50  # kept apart a step and shard; the rest are counted together


@dataclass
class Count:
    """What came into a step, what went out, and why the rest did not."""

    rows_in: int = 0
    rows_out: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, found: Mapping[str, Any]) -> None:
        """Adds what `as_json` gave."""
        self.rows_in += found["in"]
        self.rows_out += found["out"]
        self.reasons.update(found["reasons"])

    def as_json(self) -> dict[str, Any]:
        """As JSON, with the most frequent reasons."""
        most = Counter(dict(self.reasons.most_common(REASONS)))
        most["other"] += self.reasons.total() - most.total()
        return {"in": self.rows_in, "out": self.rows_out, "reasons": +most}


class ShardWriter:
    """The files of one shard of one pass, whole or not there."""

    def __init__(
        self,
        home: Path,
        number: int,
        closing: SetStep | None = None,
        dialect: Dialect | None = None,
    ) -> None:
        """closing: the set step that ends the pass. dialect: of the rows, in the last pass."""
        self.home, self.number, self.closing = home, number, closing
        self.dialect: Dialect | None = dialect
        self.counts: dict[str, Count] = {}
        self.groups: Counter[tuple[str, str, str]] = Counter()
        self.rows = 0
        self._digests: list[NDArray[Any]] = []

    @property
    def done(self) -> bool:
        """True where an earlier process, or this one, has finished the shard."""
        return self.path("counts", "json").is_file()

    def path(self, what: str, suffix: str) -> Path:
        """The name of one of the shard's files."""
        return self.home / f"{what}-{self.number:05}.{suffix}"

    def write(self, chats: Iterable[Chat], steps: Sequence[tuple[str, RowStep]]) -> None:
        """Sends the rows through row steps and writes what comes out.

        steps: with their names for the counts. Whoever makes the rows counts through `note`.
        """
        coming = iter(chats)
        with writing(self.home):
            self.home.mkdir(parents=True, exist_ok=True)
            part, removed = self._temporary("part"), self._temporary("removed")
            with part.open("w", encoding="utf-8") as out, removed.open("w", encoding="utf-8") as no:
                self._removed = no
                while batch := list(islice(coming, BATCH)):
                    for name, step in steps:
                        batch = self._apply(name, step, batch)
                    self._keep(batch, out)
            if self.closing is not None:
                found = self._digests or [self.closing.digest([])]
                save_array(self.path("digest", "npy"), np.concatenate(found))
            sync(part, removed)
            os.replace(part, self.path("part", "jsonl"))
            os.replace(removed, self.path("removed", "jsonl"))
        counts = {name: count.as_json() for name, count in self.counts.items()}
        groups = [[*group, number] for group, number in sorted(self.groups.items())]
        told = {"rows": self.rows, "steps": counts, "groups": groups}
        atomic_write(self.path("counts", "json"), json.dumps(told, ensure_ascii=False))

    def note(self, name: str, chat: Chat, result: Result) -> Iterator[Chat]:
        """Counts what a step made of a row, and yields what goes on."""
        count = self.counts.setdefault(name, Count())
        count.rows_in += 1
        for one in [result] if isinstance(result, Chat | Drop) else result:
            if isinstance(one, Chat):
                count.rows_out += 1
                yield one
            else:
                count.reasons[one.reason] += 1
                self._removed.write(rows.removed_line(chat, name, one.reason))

    def note_bad(self, bad: Bad) -> None:
        """Counts a record that is no row."""
        self.counts.setdefault(READ, Count()).add({"in": 1, "out": 0, "reasons": {bad.reason: 1}})
        told = {"row": f"{bad.file}:{bad.line}", "step": READ, "reason": bad.reason}
        self._removed.write(json.dumps({**told, "excerpt": bad.excerpt}) + "\n")

    def _apply(self, name: str, step: RowStep, batch: list[Chat]) -> list[Chat]:
        self.counts.setdefault(name, Count())
        return [one for chat in batch for one in self.note(name, chat, step.apply(chat))]

    def _keep(self, batch: list[Chat], out: TextIO) -> None:
        if self.dialect is not None:
            lines = [line for chat in batch if (line := self._line(chat, self.dialect))]
        else:
            lines = [chat.to_json() + "\n" for chat in batch]
        out.writelines(lines)
        self.rows += len(lines)
        if self.closing is not None:
            self._digests.append(self.closing.digest(batch))

    def _line(self, chat: Chat, dialect: Dialect) -> str | None:
        """The row in the dialect of the result; None where the dialect has no words for it."""
        try:
            line = json.dumps(write_row(chat, dialect), ensure_ascii=False) + "\n"
        except SchemaError as error:
            list(self.note(WRITE, chat, Drop(str(error))))
            return None
        list(self.note(WRITE, chat, chat))
        self.groups[str(chat.extra.get("source")), str(chat.extra.get("license")), chat.mode] += 1
        return line

    def _temporary(self, what: str) -> Path:
        return self.home / f".{what}-{self.number:05}.tmp"


@dataclass(frozen=True)
class Parts:
    """The rows that a finished pass left, and what was decided about them."""

    home: Path
    rows: tuple[int, ...]
    verdicts: NDArray[Any] | None = None

    @classmethod
    def of(cls, home: Path, shards: int, decided: bool) -> Parts:
        """Those of a pass whose shards are all done."""
        told = [json.loads((home / f"counts-{n:05}.json").read_text()) for n in range(shards)]
        verdicts = np.load(home / "verdicts.npy", mmap_mode="r") if decided else None
        return cls(home, tuple(one["rows"] for one in told), verdicts)

    def read(self, number: int) -> Iterator[tuple[Chat, Any]]:
        """The rows of a shard with their verdicts."""
        begin = sum(self.rows[:number])
        with (self.home / f"part-{number:05}.jsonl").open(encoding="utf-8") as lines:
            for index, line in enumerate(lines, begin):
                verdict = None if self.verdicts is None else self.verdicts[index]
                yield Chat.from_json(line), verdict

    def read_in_order(self, number: int) -> Iterator[Chat]:
        """The rows of a shard where the verdicts are a new order of all rows.

        Memory is 8 bytes a row of the whole set, for where each line begins.
        """
        assert self.verdicts is not None
        parts = [self.home / f"part-{n:05}.jsonl" for n in range(len(self.rows))]
        starts = np.concatenate([_line_starts(part) for part in parts])
        bounds = np.linspace(0, len(self.verdicts), len(self.rows) + 1).astype(np.int64)
        wanted = self.verdicts[bounds[number] : bounds[number + 1]]
        shard = np.searchsorted(np.cumsum(self.rows), wanted, "right")
        files: dict[int, BinaryIO] = {}
        try:
            for row, of in zip(wanted.tolist(), shard.tolist(), strict=True):
                if of not in files:
                    if len(files) >= 256:  # below the usual limit of open files
                        files.pop(next(iter(files))).close()
                    files[of] = parts[of].open("rb")
                files[of].seek(int(starts[row]))
                yield Chat.from_json(files[of].readline().decode())
        finally:
            for file in files.values():
                file.close()


def _line_starts(path: Path) -> NDArray[np.int64]:
    with path.open("rb") as file:
        sizes = np.fromiter(map(len, file), np.int64)
    return np.cumsum(sizes) - sizes


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Writes a .npy, whole or not at all. Raises WriteError."""
    temporary = path.with_name(f".{path.name}")
    with writing(path):
        np.save(temporary, array)
        sync(temporary)
        os.replace(temporary, path)


def decide(home: Path, shards: int, closing: SetStep, seed: int) -> None:
    """Writes verdicts.npy from all digests of a pass, unless it is there."""
    if (home / "verdicts.npy").is_file():
        return
    found = np.concatenate([np.load(home / f"digest-{n:05}.npy") for n in range(shards)])
    verdicts = closing.decide(found, seed) if len(found) else np.zeros(0, np.int8)
    save_array(home / "verdicts.npy", verdicts)


@dataclass
class Pass:
    """What goes over a shard together: a verdict, what is asked, row steps, the next digest.

    Steps stand with the names that they are counted by.
    """

    opening: tuple[str, SetStep] | None = None
    ask: tuple[str, AskStep] | None = None
    steps: list[tuple[str, RowStep]] = field(default_factory=list)
    closing: tuple[str, SetStep] | None = None

    @property
    def title(self) -> str:
        """The names of its steps."""
        parts = [self.ask, *self.steps, self.closing]
        return ", ".join(one[0] for one in parts if one) or (READ if not self.opening else "write")


def passes_of(named: Sequence[tuple[str, Step]]) -> list[Pass]:
    """The steps as passes: a new one behind every set step, and for every step that asks."""
    found = [Pass()]
    for name, step in named:
        if isinstance(step, SetStep):
            found[-1].closing = (name, step)
            found.append(Pass(opening=(name, step)))
        elif isinstance(step, AskStep):
            if len(found) == 1 or found[-1].steps or found[-1].ask:
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
                    writer.write(self._coming(writer, index, one, before), one.steps)
                    self._journal(index, number).unlink(missing_ok=True)
                    bar.advance(1, writer.rows)
                else:
                    bar.advance(1, 0)

    def _coming(
        self, writer: ShardWriter, index: int, one: Pass, before: Parts | None
    ) -> Iterator[Chat]:
        """The rows of a shard as they come to the row steps of a pass."""
        if before is None:
            return self._read(writer)
        if one.ask is None:
            return _arrivals(writer, one, before, writer.note)
        return self._asked(writer, index, one, before)

    def _read(self, writer: ShardWriter) -> Iterator[Chat]:
        shard = self.shards[writer.number]
        for found in read_shard(shard, self.config.sources[shard.source]):
            if isinstance(found, Bad):
                writer.note_bad(found)
            else:
                yield from writer.note(READ, found, found)

    def _asked(self, writer: ShardWriter, index: int, one: Pass, before: Parts) -> Iterator[Chat]:
        """The rows behind a step that asks: all replies into the journal, then out of it."""
        assert one.ask
        name, step = one.ask
        teacher = self._teacher(step.teacher)
        with Journal(self._journal(index, writer.number)) as journal:
            coming = (
                request
                for chat in _arrivals(writer, one, before, _uncounted)
                for request in step.requests(chat)
            )
            reply = self._ask(journal, teacher, coming, name)
            for chat in _arrivals(writer, one, before, writer.note):
                requests = step.requests(chat)
                result = step.receive(chat, [*map(reply, requests)]) if requests else chat
                yield from writer.note(name, chat, result)

    def _ask(
        self, journal: Journal, teacher: Answerer, requests: Iterator[Request], name: str
    ) -> Callable[[Request], Reply]:
        """Asks what the journal lacks, and keeps each reply as it comes.

        Returns what gives the reply to a request. Failed requests are not kept.
        """
        failed: dict[str, Reply] = {}
        missing = list(_missing(requests, journal, teacher.model))
        known = len(journal)
        with Progress(name, known + len(missing), "requests", quiet=self.run.quiet) as bar:
            bar.advance(known, 0)

            def receive(request: Request, reply: Reply) -> None:
                key = request.key(teacher.model)
                if reply.error is None:
                    journal.add(key, asdict(reply))
                else:
                    failed[key] = reply
                bar.advance()

            if missing:
                teacher.ask(missing, receive)

        def reply(request: Request) -> Reply:
            key = request.key(teacher.model)
            if key in failed:
                return failed[key]
            row = journal.get(key)
            del row["key"]
            return Reply(**row)

        return reply

    def _learn(self, index: int, step: Nearest) -> None:
        """Gives `nearest` the embeddings of its problems; the main process asks for them."""
        teacher, requests = self._teacher(step.teacher), step.problems()
        for asks in (True, False):
            if dist.is_main() == asks:
                with Journal(self._home(index) / "problems.jsonl") as journal:
                    reply = self._ask(journal, teacher, iter(requests), "problems")
                    step.learn([reply(one) for one in requests])
            dist.barrier()

    def _teacher(self, name: str) -> Answerer:
        if name not in self._teachers:
            config = self.config.teachers[name]
            if isinstance(config, EndpointConfig):
                self._teachers[name] = Endpoint(config, self.run.seed)
            elif isinstance(config, EmbedderConfig):
                self._teachers[name] = local.Embedder(config)
            else:
                self._teachers[name] = local.LocalAnswerer(config, self.model, self.run.seed)
        return self._teachers[name]

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

    def counted(
        self, passes: Iterable[int]
    ) -> tuple[dict[str, Count], Counter[tuple[str, str, str]]]:
        """What the shards of some passes have counted: by step; by source, license and mode."""
        counts: dict[str, Count] = defaultdict(Count)
        groups: Counter[tuple[str, str, str]] = Counter()
        for index in passes:
            for number in range(len(self.shards)):
                path = self._writer(index, number).path("counts", "json")
                told = json.loads(path.read_text(encoding="utf-8"))
                for name, found in told["steps"].items():
                    counts[name].add(found)
                for *group, rows_out in told["groups"]:
                    groups[tuple(group)] += rows_out
        return counts, groups

    def _check_bad(self) -> None:
        read = self.counted([0])[0][READ]
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
    elif one.opening[1].reorders:
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


def _missing(requests: Iterator[Request], journal: Journal, model: str) -> Iterator[Request]:
    """The requests whose replies are not in the journal, each once."""
    seen: set[str] = set()
    for request in requests:
        key = request.key(model)
        if key not in journal and key not in seen:
            seen.add(key)
            yield request


def write_tables(pipeline: Pipeline, run: Run) -> list[dict[str, Any]]:
    """tables/steps, reasons and sources from all counts; returns the rows of `steps`."""
    counts, groups = pipeline.counted(range(len(pipeline.passes)))
    order = [READ, *(name for name, _ in pipeline.config.named()), WRITE]
    found = [(name, counts[name]) for name in order if name in counts]
    steps = [
        {"step": name, "in": one.rows_in, "out": one.rows_out, "removed": one.reasons.total()}
        for name, one in found
    ]
    reasons = [
        {"step": name, "reason": why, "rows": rows}
        for name, one in found
        for why, rows in one.reasons.most_common()
    ]
    sources = [
        {"source": source, "license": license, "reasoning": mode, "rows": rows}
        for (source, license, mode), rows in sorted(groups.items())
    ]
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
