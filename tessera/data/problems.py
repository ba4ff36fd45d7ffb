"""Procedural documents with answers, for pipelines that must show an effect in minutes.

    start 6 m+3 n*3 o-3 p-3 mod 10          the question: labelled register arithmetic (`calc`)
    Work: m+3=9 n*3=7 o-3=4 p-3=1           the reasoning, left out of a quarter of the documents
    Answer: 1

`gym/NAME` draws from the reasoning-gym library, whose problems show no work. A problem is a pure
function of (name, seed, index, split), and the hash of its question alone decides its split.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from tessera.data import wishes
from tessera.data.conversation import Chat, Mode
from tessera.data.switch import DETAILED, set_switch
from tessera.data.thought import CLOSE, OPEN
from tessera.table import nearest

PREFIX = "gym/"
Split = Literal["train", "heldout"]
SPLITS: tuple[Split, Split] = ("train", "heldout")
MODES: tuple[Mode, Mode] = ("on", "off")
LETTERS = string.ascii_lowercase
# Every operation that occurs: with ten register values, 120 facts to learn.
OPERATIONS = [f"{sign}{d}" for sign in "+-" for d in range(1, 6)] + ["*2", "*3"]


class TaskError(ValueError):
    """A task that is none, or cannot be drawn as asked."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A question; results: what each step of `work` found (a hasty thought skips some). fields:
    what rewards judge by beside the answer. part: its split, where its family decides that.
    """

    name: str
    question: str
    work: str
    answer: str
    level: int
    results: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    part: Split | None = None

    @property
    def split(self) -> Split:
        """Where this question belongs, by the hash of its text unless its family says."""
        return self.part or split_of(self.question)

    def text(self, work: bool = True) -> str:
        """The document of this problem. Raises TaskError where it has no answer."""
        self._require_answer()
        reasoning = f"Work: {self.work}\n" if work and self.work else ""
        return f"{self.question}\n{reasoning}Answer: {self.answer}"

    def chat(self, mode: Mode) -> Chat:
        """The conversation of this problem. Raises TaskError where it has no answer, and for "on"
        where it shows no work."""
        self._require_answer()
        if mode == "on" and not self.work:
            raise TaskError(
                f'{self.name} shows no work to think: set reasoning = "off", or ask a teacher'
            )
        thought = f"{OPEN}\nWork: {self.work}\n{CLOSE}\n\n" if mode == "on" else ""
        messages = [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": f"{thought}Answer: {self.answer}"},
        ]
        extra = {"category": self.name, "level": self.level, "answer": self.answer}
        return Chat(messages, mode, [], extra)

    def _require_answer(self) -> None:
        if not self.answer:
            raise TaskError(
                f"{self.name} has no answer to train on: let a model answer it (curate), or take "
                "it as a task of profile and eval"
            )


def split_of(question: str) -> Split:
    """ "heldout" for a tenth of all questions, for ever the same ones."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") < 0.1 * 2**64 else "train"


def calc(rng: np.random.Generator, level: int) -> Problem:
    """A register mod 10 through `level` operations labelled with consecutive letters."""
    value = start = int(rng.integers(10))
    first = int(rng.integers(26))
    steps, results = [], []
    for i in range(level):
        label, operation = LETTERS[(first + i) % 26], OPERATIONS[int(rng.integers(12))]
        sign, operand = operation[0], int(operation[1])
        value = {"+": value + operand, "-": value - operand, "*": value * operand}[sign] % 10
        steps.append(label + operation)
        results.append(f"={value}")
    work = " ".join(step + result for step, result in zip(steps, results, strict=True))
    question = f"start {start} {' '.join(steps)} mod 10"
    return Problem("calc", question, work, str(value), level, tuple(results))


def sort(rng: np.random.Generator, level: int) -> Problem:
    """`level` distinct letters into alphabetical order, the work inserting one at a time."""
    letters = [LETTERS[int(i)] for i in rng.choice(26, size=level, replace=False)]
    grown = ["".join(sorted(letters[: i + 1])) for i in range(level)]
    question, answer = f"sort {' '.join(letters)}", " ".join(sorted(letters))
    return Problem("sort", question, " ".join(grown), answer, level)


def compare(rng: np.random.Generator, level: int) -> Problem:
    """The greater of two numbers of `level` digits that share a random number of first digits."""
    left = [int(rng.integers(1, 10)), *(int(d) for d in rng.integers(10, size=level - 1))]
    same = int(rng.integers(level))
    right = left[:same] + [int(d) for d in rng.integers(10, size=level - same)]
    others = [d for d in range(same == 0, 10) if d != left[same]]  # no number begins with 0
    right[same] = others[int(rng.integers(len(others)))]
    signs = ["=" if a == b else "<" if a < b else ">" for a, b in zip(left, right, strict=True)]
    work = " ".join(f"{left[i]}{signs[i]}{right[i]}" for i in range(same + 1))
    a, b = ("".join(map(str, digits)) for digits in (left, right))
    return Problem("compare", f"compare {a} and {b}", work, max(a, b), level)


def hop(rng: np.random.Generator, level: int) -> Problem:
    """`level` steps along a ring of digits, each one's successor read off the question's table.

    The ring has two digits more than steps, so none comes twice; beyond eight steps it is walked
    again. (A sink could be guessed as the digit without a successor; a ring has none.)
    """
    size = min(level + 2, 10)
    ring = [int(i) for i in rng.permutation(10)[:size]]
    entries = [f"{ring[i]}={ring[(i + 1) % size]}" for i in range(size)]
    table = " ".join(entries[int(i)] for i in rng.permutation(size))
    first = int(rng.integers(26))
    labels = [LETTERS[(first + i) % 26] for i in range(level)]
    results = tuple(f" {entries[i % size]}" for i in range(level))
    work = " ".join(label + result for label, result in zip(labels, results, strict=True))
    question = f"table {table} start={ring[0]} {' '.join(labels)} stop"
    return Problem("hop", question, work, str(ring[level % size]), level, results)


THINGS = "apples books buttons cards coins eggs keys nuts pens shells stamps stones".split()
GAINS = ("buy {}", "find {}", "get {} more", "win {}")
LOSSES = ("lose {}", "sell {}", "give away {}", "break {}")


def story(rng: np.random.Generator, level: int) -> Problem:
    """How many things somebody has after `level` events, in words; numbers to 20."""
    things = THINGS[int(rng.integers(len(THINGS)))]
    value = start = int(rng.integers(3, 13))
    told, steps, results = [], [], []
    for _ in range(level):
        gain = value < 6 or (value < 16 and rng.random() < 0.5)
        n, (texts, sign) = int(rng.integers(1, 6)), (GAINS, "+") if gain else (LOSSES, "-")
        value += n if gain else -n
        told.append(f"I {texts[int(rng.integers(4))].format(n)}.")
        steps.append(f"{sign}{n}")
        results.append(f"={value}")
    work = " ".join([str(start), *map("".join, zip(steps, results, strict=True))])
    question = f"I have {start} {things}. {' '.join(told)} How many {things} do I have?"
    return Problem("story", question, work, str(value), level, tuple(results))


def wish(rng: np.random.Generator, level: int) -> Problem:
    """A request with `level` constraints (data/wishes.py); it has no answer, only a verdict."""
    held = bool(rng.random() < 0.1)
    question, found = wishes.draw(rng, level, held)
    judged = {
        "instruction_id_list": [one.name for one in found],
        "kwargs": [one.arguments for one in found],
    }
    return Problem("wish", question, "", "", level, (), judged, SPLITS[held])


@dataclass(frozen=True, slots=True)
class Family:
    """How to draw a problem, and the levels (inclusive) that documents are drawn from."""

    draw: Callable[[np.random.Generator, int], Problem]
    levels: tuple[int, int]


TASKS: dict[str, Family] = {
    "calc": Family(calc, (2, 6)),
    "hop": Family(hop, (1, 6)),
    "sort": Family(sort, (3, 7)),
    "compare": Family(compare, (2, 6)),
    "story": Family(story, (2, 5)),
    "wish": Family(wish, (1, 2)),
}


def family(name: str) -> Family:
    """The family of that name; a TaskError names the nearest one."""
    if not name.startswith(PREFIX):
        if name in TASKS:
            return TASKS[name]
        raise TaskError(f'no task "{name}"; {nearest(name, TASKS)}')
    if importlib.util.find_spec("reasoning_gym") is None:
        raise TaskError(
            f'the task "{name}" needs the reasoning-gym library, which is not installed: '
            "pip install 'tessera[gym]'"
        )
    from reasoning_gym import factory  # pyright: ignore[reportMissingImports]

    task = name.removeprefix(PREFIX)
    if task not in factory.DATASETS:
        near = difflib.get_close_matches(task, factory.DATASETS, n=1)
        hint = f'did you mean "{PREFIX}{near[0]}"? ' if near else ""
        raise TaskError(f'no task "{name}" in reasoning-gym; {hint}it has {len(factory.DATASETS)}')
    levels = (1, 4) if task in factory.CURRICULA else (1, 1)
    return Family(functools.partial(_gym_problem, factory, name), levels)


def _gym_problem(library: Any, name: str, rng: np.random.Generator, level: int) -> Problem:
    """A problem at a global level of the task's curriculum, from 1.

    Raises TaskError where the library cannot make it, or judges answers by code of its own.
    """
    task, settings = name.removeprefix(PREFIX), {"size": 1, "seed": int(rng.integers(2**31 - 1))}
    try:
        if task in library.CURRICULA:
            curriculum = library.create_curriculum(task)
            curriculum.set_global_level(level - 1)
            make, _ = library.DATASETS[task]
            entry = make(curriculum.generate_configuration(settings))[0]
        else:
            entry = library.create_dataset(task, **settings)[0]
    except Exception as error:  # each task raises its own
        raise TaskError(f"reasoning-gym cannot draw {name} at level {level}: {error}") from error
    if not isinstance(entry["answer"], str):
        raise TaskError(f"{name} has no answer in words; it can only be judged by the library")
    return Problem(name, entry["question"], "", entry["answer"], level)


def problem(
    name: str, seed: int, index: int, split: Split = "train", level: int | None = None
) -> Problem:
    """The problem with this index; `level` fixes the difficulty, which is else drawn uniformly."""
    return _draw(name, _generator(name, seed, index, split), split, level)


def completion(name: str, seed: int, index: int, split: Split = "train") -> tuple[str, str]:
    """(question, solution) of the document with this index: three in four show their work."""
    rng = _generator(name, seed, index, split)
    drawn = _draw(name, rng, split, None)
    text = drawn.text(work=bool(rng.random() < 0.75))
    return f"{drawn.question}\n", text.removeprefix(f"{drawn.question}\n")


def document(name: str, seed: int, index: int, split: Split = "train") -> str:
    """The whole of `completion`."""
    return "".join(completion(name, seed, index, split))


def problem_chat(
    name: str,
    seed: int,
    index: int,
    split: Split = "train",
    mode: Mode | None = None,
    hasty: float = 0.0,
) -> Chat:
    """The conversation with this index, reasoning on and off in turn unless `mode` says.

    hasty: the share of problems whose thought skips each result but the last half of the time.
    """
    drawn = problem(name, seed, index, split)
    rng = _generator(f"{name}/hasty", seed, index, split)
    if rng.random() < hasty:
        kept, rest = "", drawn.work
        for result in drawn.results[:-1]:
            step, _, rest = rest.partition(result)
            kept += step + (result if rng.random() < 0.5 else "")
        drawn = replace(drawn, work=kept + rest)
    return drawn.chat(mode or ("off" if index % 2 else "on"))


def problem_rows(
    name: str, count: int, seed: int = 0, split: Split = "train", level: int | None = None
) -> Iterator[Chat]:
    """Both variants of `count` problems, the switch said; off alone where no work is shown."""
    for index in range(count):
        drawn = problem(name, seed, index, split, level)
        for mode in MODES if drawn.work else MODES[1:]:
            chat = drawn.chat(mode)
            yield replace(chat, messages=set_switch(chat.messages, mode, DETAILED)[0])


def _generator(name: str, seed: int, index: int, split: Split) -> np.random.Generator:
    key = int.from_bytes(hashlib.blake2b(f"{name}/{split}".encode(), digest_size=4).digest(), "big")
    return np.random.default_rng([seed, key, index])


def _draw(name: str, rng: np.random.Generator, split: Split, level: int | None) -> Problem:
    """Draws until the question is of this split: ten draws on average for a held-out one."""
    drawn = family(name)
    low, high = drawn.levels
    if level is not None and level < 1:
        raise TaskError(f"level {level} of {name}: give 1 or more")
    while True:
        chosen = int(rng.integers(low, high + 1)) if level is None else level
        candidate = drawn.draw(rng, chosen)
        if candidate.split == split:
            return candidate
