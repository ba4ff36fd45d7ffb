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


@dataclass(slots=True)
class Answer:
    """One completion. logprobs: under the engine's weights. reward: None, it could not be judged.

    advantage: None, it is not trained on. parts: the score of each reward by name.
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    text: str
    reward: float | None
    parts: dict[str, float | None]
    obedient: bool
    advantage: float | None = None

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


def rows(
    groups: Sequence[Group], row_length: int, level: Level, scale: float = 1.0, pad_id: int = 0
) -> list[Batch]:
    """Batches of one row each, as long as what it holds.

    level: "token" weighs every token alike, "sequence" every answer. scale: of the advantages.
    """
    parts = [piece for group in groups for piece in pieces(group, row_length)]
    packed = best_fit([len(part) for part in parts], row_length)
    return [_row([parts[i] for i in row], level, scale, pad_id) for row in packed]


def empty_row(pad_id: int = 0) -> Batch:
    """A row that trains nothing, for a process that has less to do than another."""
    return _row([], "token", 1.0, pad_id)


def weight_of(answer: Answer, level: Level) -> float:
    """Σ w of an answer."""
    return 1.0 if level == "sequence" else float(len(answer.ids))


def _row(parts: Sequence[Piece], level: Level, scale: float, pad_id: int) -> Batch:
    length = max(2, sum(map(len, parts)))
    ints = {
        "tokens": np.full(length, pad_id, np.int64),
        "labels": np.full(length, pad_id, np.int64),
        "positions": np.arange(length),
        "segments": np.full(length, -1, np.int64),
        "prefix": np.full(length, -1, np.int64),
    }
    floats = {name: np.zeros(length, np.float32) for name in ("weight", "advantage", "behaviour")}
    end = segment = 0
    for part in parts:
        shared = len(part.prompt) - 1
        before = -1
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
            end, segment = end + count, segment + 1
    tensors = {name: torch.from_numpy(array)[None] for name, array in (ints | floats).items()}
    streams = {name: tensors.pop(name) for name in ("advantage", "behaviour")}
    return Batch(**tensors, streams=streams)


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
