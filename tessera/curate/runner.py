"""Stage `curate`: rows in, chats out, step by step, with counts in and out of each.

Steps that need no barrier between them go over a shard together, as a pass. A set step ends a pass:
the main process decides from the digests of all rows, and the next pass carries its verdicts out.
A step that asks begins one. Each process of a job works on its own shards. Files of a pass:

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
from tessera.ask.ask import Answerer, Reply, Request, ask_all
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

BATCH = 1024  # rows that go through the steps together
READ, WRITE = "read", "write"
REASONS = 50  # kept apart a step and shard; the rest are counted together


@dataclass
class Count:
    """What came into a step, what went out, and why the rest did not."""

    rows_in: int = 0
    rows_out: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        """As JSON, with the most frequent reasons."""
        most = Counter(dict(self.reasons.most_common(REASONS)))
        most["other"] += self.reasons.total() - most.total()
        return {"in": self.rows_in, "out": self.rows_out, "reasons": +most}


@dataclass
class ShardWriter:
    """The files of one shard of one pass, whole or not there.

    closing: the set step that ends the pass. dialect: of the rows, in the last pass.
    """

    home: Path
    number: int
    closing: SetStep | None
    dialect: Dialect | None
    counts: dict[str, Count] = field(default_factory=lambda: defaultdict(Count))
    groups: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    rows: int = 0
    _digests: list[NDArray[Any]] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """True where an earlier process, or this one, has finished the shard."""
        return self.path("counts", "json").is_file()

    def path(self, what: str, suffix: str) -> Path:
        return self.home / f"{what}-{self.number:05}.{suffix}"

    def write(self, chats: Iterable[Chat], steps: Sequence[tuple[str, RowStep]]) -> None:
        """Sends rows, which their maker counted through `note`, through steps, and writes them."""
        coming = iter(chats)
        with writing(self.home):
            self.home.mkdir(parents=True, exist_ok=True)
            part, removed = (self.home / f".{n}-{self.number:05}.tmp" for n in ("part", "removed"))
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
        summary = {"rows": self.rows, "steps": counts, "groups": groups}
        atomic_write(self.path("counts", "json"), json.dumps(summary, ensure_ascii=False))

    def note(self, name: str, chat: Chat, result: Result) -> Iterator[Chat]:
        """Counts what a step made of a row, and yields what goes on."""
        count = self.counts[name]
        count.rows_in += 1
        for one in [result] if isinstance(result, Chat | Drop) else result:
            if isinstance(one, Chat):
                count.rows_out += 1
                yield one
            else:
                count.reasons[one.reason] += 1
                self._removed.write(rows.removed_line(chat, name, one.reason))

    def note_bad(self, bad: Bad) -> None:
        self.counts[READ].rows_in += 1
        self.counts[READ].reasons[bad.reason] += 1
        row = {"row": f"{bad.file}:{bad.line}", "step": READ, "reason": bad.reason}
        self._removed.write(json.dumps({**row, "excerpt": bad.excerpt}) + "\n")

    def _apply(self, name: str, step: RowStep, batch: list[Chat]) -> list[Chat]:
        self.counts[name]  # a step that no row reaches is counted, too
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


class Parts:
    """The rows that a finished pass left, and what its set step decided about them, if any."""

    def __init__(self, home: Path, shards: int, decided: bool) -> None:
        counts = [json.loads((home / f"counts-{n:05}.json").read_text()) for n in range(shards)]
        self.rows = [one["rows"] for one in counts]
        self.paths = [home / f"part-{n:05}.jsonl" for n in range(shards)]
        self.verdicts: Any = np.load(home / "verdicts.npy", mmap_mode="r") if decided else None

    def read(self, number: int) -> Iterator[tuple[Chat, Any]]:
        """The rows of a shard with their verdicts."""
        with self.paths[number].open(encoding="utf-8") as lines:
            for index, line in enumerate(lines, sum(self.rows[:number])):
                yield Chat.from_json(line), None if self.verdicts is None else self.verdicts[index]

    def read_in_order(self, number: int) -> Iterator[Chat]:
        """The shard's rows in the new order of all rows, at 8 bytes of memory a row of the set."""
        starts = np.concatenate([_line_starts(path) for path in self.paths])
        bounds = np.linspace(0, len(self.verdicts), len(self.rows) + 1).astype(np.int64)
        wanted = self.verdicts[bounds[number] : bounds[number + 1]]
        shard = np.searchsorted(np.cumsum(self.rows), wanted, "right")
        files: dict[int, BinaryIO] = {}
        try:
            for row, of in zip(wanted.tolist(), shard.tolist(), strict=True):
                if of not in files:
                    if len(files) >= 256:  # below the usual limit of open files
                        files.pop(next(iter(files))).close()
                    files[of] = self.paths[of].open("rb")
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
    """What goes over a shard together; steps stand with the names that they are counted by."""

    opening: tuple[str, SetStep] | None = None
    ask: tuple[str, AskStep] | None = None
    steps: list[tuple[str, RowStep]] = field(default_factory=list)
    closing: tuple[str, SetStep] | None = None

    @property
    def title(self) -> str:
        parts = [self.ask, *self.steps, self.closing]
        return ", ".join(one[0] for one in parts if one) or (WRITE if self.opening else READ)


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

    def execute(self) -> None:
        """Brings every pass to its end. Raises DataError, AskError, FailureError."""
        for index, one in enumerate(self.passes):
            if not all(writer.done for writer in self._writers(index)):
                self._pass(index, one)
            dist.barrier()
            if dist.is_main():
                for what in ("part-*.jsonl", "digest-*.npy", "verdicts.npy"):
                    for path in self._home(index - 1).glob(what) if index else ():
                        path.unlink(missing_ok=True)
                if index == 0:
                    self._check_bad()

    def _home(self, index: int) -> Path:
        return self.home / f"{index:02}"

    def _writers(self, index: int) -> list[ShardWriter]:
        """The writers of all shards of a pass."""
        closing = self.passes[index].closing
        dialect = self.config.dialect if index == len(self.passes) - 1 else None
        step, shards = closing[1] if closing else None, range(len(self.shards))
        return [ShardWriter(self._home(index), number, step, dialect) for number in shards]

    def _pass(self, index: int, one: Pass) -> None:
        before = None
        if index:
            home, shards = self._home(index - 1), len(self.shards)
            previous, decided = self.passes[index - 1].closing, one.opening is not None
            if previous and dist.is_main():
                decide(home, shards, previous[1], self.run.seed)
            dist.barrier()
            before = Parts(home, shards, decided)
        if one.ask and isinstance(one.ask[1], Nearest):
            self._learn(index, one.ask[1])
        teacher = self._held_together(one)
        if teacher is not None and not teacher.placement.layout.leads:
            teacher.follow()
            return
        rank, world = dist.rank(), dist.world()
        if teacher is not None:
            rank, world = (layout := teacher.placement.layout).data_rank, layout.data_world
        mine = self._writers(index)[rank::world]
        label = f"{index + 1}/{len(self.passes)} {one.title}"
        with Progress(label, len(mine), "rows", quiet=self.run.quiet or one.ask is not None) as bar:
            for writer in mine:
                if not writer.done:
                    writer.write(self._coming(writer, one, before), one.steps)
                    writer.path("journal", "jsonl").unlink(missing_ok=True)
                bar.advance(1, writer.rows)
        if teacher is not None:
            teacher.tell(None)

    def _held_together(self, one: Pass) -> local.LocalAnswerer | None:
        """A pass's teacher whose model several processes hold, each a part of it."""
        if one.ask is None or dist.world() == 1:
            return None
        config = self.config.teachers[one.ask[1].teacher]
        if isinstance(config, local.EngineConfig) and self.model is not None:
            if config.placement(self.model).config.tensor > 1:
                teacher = self._teacher(one.ask[1].teacher)
                assert isinstance(teacher, local.LocalAnswerer)
                return teacher
        return None

    def _coming(self, writer: ShardWriter, one: Pass, before: Parts | None) -> Iterator[Chat]:
        """The rows of a shard as they come to row steps, asked about by way of the journal."""
        if before is None:
            shard = self.shards[writer.number]
            for found in read_shard(shard, self.config.sources[shard.source]):
                if isinstance(found, Bad):
                    writer.note_bad(found)
                else:
                    yield from writer.note(READ, found, found)
            return
        if one.ask is None:
            yield from _arrivals(writer, one, before, writer.note)
            return
        name, step = one.ask
        with _journal(writer.path("journal", "jsonl")) as journal:
            chats = _arrivals(writer, one, before, _uncounted)
            coming = (request for chat in chats for request in step.requests(chat))
            reply = self._ask(journal, self._teacher(step.teacher), coming, name)
            for chat in _arrivals(writer, one, before, writer.note):
                requests = step.requests(chat)
                result = step.receive(chat, [*map(reply, requests)]) if requests else chat
                yield from writer.note(name, chat, result)

    def _ask(
        self, journal: Journal, teacher: Answerer, requests: Iterator[Request], name: str
    ) -> Callable[[Request], Reply]:
        """Asks for what the journal lacks; returns what gives the reply to a request."""
        failed: dict[str, Reply] = {}
        if journal.skipped:
            self.run.say(f"{journal.path}: {journal.skipped} lines are no replies; asked again")
        missing = list(_missing(requests, journal, teacher.model))
        known = len(journal)
        total, quiet = known + len(missing), self.run.quiet

        def receive(request: Request, reply: Reply) -> None:
            key = request.key(teacher.model)
            if reply.error is None:
                row = {"reply": asdict(reply)}
                journal.add(key, row if request.embed else {"messages": request.messages, **row})
            else:
                failed[key] = reply

        with Progress(name, total, "tokens", steps="replies", quiet=quiet) as bar:
            bar.advance(known, 0)
            if missing:
                if isinstance(teacher, local.LocalAnswerer):
                    teacher.tell(missing)
                ask_all(teacher, missing, receive, bar)

        def reply(request: Request) -> Reply:
            key = request.key(teacher.model)
            if key in failed:
                return failed[key]
            found = Reply.read(journal.get(key)["reply"])
            assert found is not None  # the journal accepts no others
            return found

        return reply

    def _learn(self, index: int, step: Nearest) -> None:
        """Gives `nearest` the embeddings of its problems; the main process asks for them."""
        teacher, requests = self._teacher(step.teacher), step.problems()
        for asks in (True, False):
            if dist.is_main() == asks:
                with _journal(self._home(index) / "problems.jsonl") as journal:
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

    def counted(
        self, passes: Iterable[int]
    ) -> tuple[dict[str, Count], Counter[tuple[str, str, str]]]:
        """What the shards of some passes have counted: by step; by source, license and mode."""
        counts: dict[str, Count] = defaultdict(Count)
        groups: Counter[tuple[str, str, str]] = Counter()
        for writer in (one for index in passes for one in self._writers(index)):
            summary = json.loads(writer.path("counts", "json").read_text(encoding="utf-8"))
            for name, found in summary["steps"].items():
                counts[name].rows_in += found["in"]
                counts[name].rows_out += found["out"]
                counts[name].reasons.update(found["reasons"])
            for *group, rows_out in summary["groups"]:
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
    several = result if isinstance(result, list) else [result]
    yield from (one for one in several if isinstance(one, Chat))


def _journal(path: Path) -> Journal:
    """Replies by key, without those of other types, which an odd server may have given."""
    return Journal(path, accepts=lambda row: Reply.read(row.get("reply")) is not None)


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
    with writing(run.path):
        for name in ("chats", "removed"):
            (run.path / name).mkdir(exist_ok=True)
        for path in sorted((pipeline.home / f"{last:02}").glob("part-*.jsonl")):
            os.replace(path, run.path / "chats" / path.name)
        if pipeline.config.format == "parquet":
            try:
                parquet.convert(sorted((run.path / "chats").glob("*.jsonl")))
            except DataError as error:  # no columns hold them; what teachers said is not lost
                run.say(f"the rows stay JSON lines: {error}")
        for path in sorted(pipeline.home.glob("*/removed-*.jsonl")):
            number = path.stem.removeprefix("removed-")
            if path.stat().st_size:
                os.replace(path, run.path / "removed" / f"{path.parent.name}-{number}.jsonl")
            else:
                path.unlink()


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
