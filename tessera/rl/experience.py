"""What was sampled and what it was worth, and the rows that a trainer learns from.

The prompt of a group stands once in a row and all its answers go on from it (`Batch.prefix`), so
it is computed once and not once a sample. An answer's document begins with the prompt's last
token, because that predicts another token in each answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch

from tessera.data.batch import Batch, best_fit

Level = Literal["token", "sequence"]
STREAMS = ("advantage", "behaviour", "old")


@dataclass(slots=True)
class Answer:
    """One completion. logprobs: under the engine's weights. reward: None, it could not be judged.

    advantage: None, it is not trained on. parts: the score of each reward by name. old: log-probs
    under the trainer's weights of the rollout, where later steps need them. version: the rollout
    whose weights answered. unjudged: why there is no reward, where it could not be judged.
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    text: str
    reward: float | None
    parts: dict[str, float | None]
    obedient: bool
    advantage: float | None = None
    old: list[float] | None = None
    version: int = 0
    unjudged: str = ""

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(slots=True)
class Group:
    """A prompt and its answers. number: of the prompt among all. mode: of the switch."""

    number: int
    mode: str
    ids: list[int]
    answers: list[Answer]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Group:
        """The group of a line that `to_json` wrote."""
        row = json.loads(line)
        return cls(**{**row, "answers": [Answer(**answer) for answer in row["answers"]]})


@dataclass(frozen=True, slots=True)
class Piece:
    """What must stand in one row: a prompt, and some of its answers."""

    prompt: list[int]
    answers: list[Answer]

    def __len__(self) -> int:
        return len(self.prompt) - 1 + sum(len(answer.ids) for answer in self.answers)


def pieces(group: Group, row_length: int) -> Iterator[Piece]:
    """The trained answers of a group, as many in a piece as a row can hold.

    Raises ValueError for an answer that no row can hold.
    """
    room = row_length - (len(group.ids) - 1)
    held: list[Answer] = []
    for answer in group.answers:
        if answer.advantage is None or not answer.ids:
            continue
        if len(answer.ids) > room:
            raise ValueError(
                f"a prompt of {len(group.ids)} and an answer of {len(answer.ids)} tokens do not "
                f"fit into a row of {row_length}; raise train.microbatch_tokens"
            )
        if sum(len(one.ids) for one in held) + len(answer.ids) > room:
            yield Piece(group.ids, held)
            held = []
        held.append(answer)
    if held:
        yield Piece(group.ids, held)


def pack(groups: Sequence[Group], row_length: int) -> list[list[Piece]]:
    """The pieces of every row."""
    parts = [piece for group in groups for piece in pieces(group, row_length)]
    return [[parts[i] for i in row] for row in best_fit([len(p) for p in parts], row_length)]


def rows(groups: Sequence[Group], row_length: int, level: Level, scale: float = 1.0) -> list[Batch]:
    """Batches of one row each, as long as what it holds.

    level: "token" weighs every token alike, "sequence" every answer. scale: of the advantages.
    """
    return [row(parts, level, scale) for parts in pack(groups, row_length)]


def weight_of(answer: Answer, level: Level) -> float:
    """Σ w of an answer."""
    return 1.0 if level == "sequence" else float(len(answer.ids))


def row(parts: Sequence[Piece], level: Level = "token", scale: float = 1.0) -> Batch:
    """A batch of one row; one that trains nothing where there are no pieces."""
    length = max(2, sum(map(len, parts)))
    ints = {name: np.zeros(length, np.int64) for name in ("tokens", "labels")}
    ints |= {name: np.full(length, -1, np.int64) for name in ("segments", "prefix")}
    ints["positions"] = np.arange(length)
    floats = {name: np.zeros(length, np.float32) for name in ("weight", *STREAMS)}
    end = segment = 0
    for part in parts:
        shared, before = len(part.prompt) - 1, -1
        if shared:
            here, before = slice(end, end + shared), segment
            _write(ints, here, part.prompt[:-1], part.prompt[1:], range(shared), segment, -1)
            end, segment = end + shared, segment + 1
        for answer in part.answers:
            count = len(answer.ids)
            here = slice(end, end + count)
            tokens, places = [part.prompt[-1], *answer.ids[:-1]], range(shared, shared + count)
            _write(ints, here, tokens, answer.ids, places, segment, before)
            floats["weight"][here] = weight_of(answer, level) / count
            floats["advantage"][here] = scale * (answer.advantage or 0.0)
            floats["behaviour"][here] = answer.logprobs
            floats["old"][here] = answer.old or answer.logprobs
            end, segment = end + count, segment + 1
    tensors = {name: torch.from_numpy(array)[None] for name, array in (ints | floats).items()}
    streams = {name: tensors.pop(name) for name in STREAMS}
    if not any(answer.old for part in parts for answer in part.answers):
        del streams["old"]
    return Batch(**tensors, streams=streams)


def spans(parts: Sequence[Piece]) -> Iterator[tuple[Answer, slice]]:
    """Where each answer's predictions stand in a row of these pieces."""
    end = 0
    for part in parts:
        end += len(part.prompt) - 1
        for answer in part.answers:
            yield answer, slice(end, end + len(answer.ids))
            end += len(answer.ids)


def _write(
    ints: dict[str, Any],
    here: slice,
    tokens: Sequence[int],
    labels: Sequence[int],
    positions: range,
    segment: int,
    prefix: int,
) -> None:
    ints["tokens"][here], ints["labels"][here] = tokens, labels
    ints["positions"][here] = positions
    ints["segments"][here], ints["prefix"][here] = segment, prefix
