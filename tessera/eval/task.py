"""What an evaluation asks, and by what it judges: a task is a reader of items and some measures.

A measure is a reward of `rl/rewards.py`, computed in the same killable workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tessera.data.conversation import Message, Mode
from tessera.rl.rewards import CheckedReward


class EvalError(ValueError):
    """An evaluation that cannot be run as asked; the text says what to change."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question; fields: what measures judge by; follow_ups: what the user says later."""

    id: str
    messages: list[Message]
    fields: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, Any] = field(default_factory=dict)
    follow_ups: tuple[str, ...] = ()


def follow_up(item: Item, chat: Sequence[Message]) -> str | None:
    """What the user says after one answer a turn, None where all is said."""
    turn = (len(chat) - len(item.messages)) // 2
    return item.follow_ups[turn] if turn < len(item.follow_ups) else None


@dataclass(frozen=True, slots=True)
class Measure:
    """A column: the mean of a reward's score over items, weighted by their field `weight`.

    modes: where it is shown; "text" is a base model that was asked without a template, "none" a
    model without a switch.
    """

    name: str
    reward: CheckedReward
    weight: str = ""
    modes: tuple[Mode | Literal["text", "none"], ...] = ("on", "off", "text", "none")


@dataclass(frozen=True, slots=True)
class Judging:
    """How another model judges.

    prompts: (item, the conversation with the answers) -> one conversation a question to the judge.
    read: the judge's replies -> a score, or None where they cannot be understood.
    """

    name: str
    prompts: Callable[[Item, Sequence[Message]], list[list[Message]]]
    read: Callable[[Sequence[str]], float | None]


@dataclass(frozen=True, slots=True)
class Task:
    """A benchmark.

    read: its items out of a `Data`. measures: the first is the one that pass@k counts. judging:
    where a model judges instead. max_tokens: of an answer, thought included. groups: told apart in
    a table of their own. limit: the items of a task that has no end. goes_on: (item, conversation)
    -> what is said after an answer, None where it is over; a function of its arguments alone.
    """

    name: str
    read: Callable[[Data], Iterable[Item]]
    measures: tuple[Measure, ...] = ()
    judging: Judging | None = None
    max_tokens: int = 32_768
    groups: tuple[str, ...] = ()
    limit: int | None = None
    goes_on: Callable[[Item, Sequence[Message]], str | None] = follow_up

    @property
    def metric(self) -> str:
        """The name of what counts."""
        return self.judging.name if self.judging else self.measures[0].name


@dataclass(frozen=True)
class Data:
    """Where a task's rows are: a file, a directory in this layout, or a dataset of the hub.

    rows("gsm8k/test.jsonl", hub="openai/gsm8k:main:test") reads that file below `place`, or
    `place` itself where it is a file, or what `place` names on the hub; "hub" is the default one.
    """

    task: str
    place: str = ""

    def rows(self, file: str, hub: str = "") -> Iterator[dict[str, Any]]:
        """The rows of one of the task's files. Raises EvalError where there is none."""
        found = self.path(file)
        if found is None:
            yield from self._hub(file, hub)
            return
        from tessera.data.readers import Bad, read_rows

        for number, row in read_rows(found):
            if isinstance(row, Bad) or not isinstance(row, dict):
                raise EvalError(f"{found}: row {number} is no JSON object: {row}"[:300])
            yield row

    def path(self, file: str) -> Path | None:
        """Where one of the task's files is; None where it is not on this machine."""
        if not self.place:
            return None
        root = Path(self.place).expanduser()
        candidates = (root, root / file, root / Path(file).name)
        return next((path for path in candidates if path.is_file()), None)

    def _hub(self, file: str, hub: str) -> Iterator[dict[str, Any]]:
        if not self.place or Path(self.place).expanduser().exists():
            where = f"{self.place}/{file} is not there" if self.place else "no data was given"
            raise EvalError(
                f"{self.task}: {where}; give --data DIR that holds {file}, --data "
                f"{self.task}=FILE, or a dataset of the hub"
                + (f" (--data {self.task}=hub is {hub})" if hub else "")
            )
        name = hub if self.place == "hub" else self.place
        if not name:
            raise EvalError(f"{self.task} has no dataset of its own on the hub; give --data PATH")
        from tessera.data.dataset import DatasetPart, read_dataset_rows

        parts = (*name.split(":"), "", "")[:3]
        dataset, subset, split = parts[0], parts[1] or None, parts[2] or "test"
        part = DatasetPart(dataset, subset, split, None, None, False)
        for _, row in read_dataset_rows(part):
            yield row


def ask(question: str, system: str = "") -> list[Message]:
    """A conversation of one question, after a system prompt where there is one."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": question}]
