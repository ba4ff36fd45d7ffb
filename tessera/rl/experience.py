"""What was sampled, what it was worth, and the packed rows that a trainer learns from.

The prompt of a group stands once in a row and all its answers continue it (`Batch.prefix`). An
answer's document begins with the prompt's last token, which predicts another token in each answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from tessera.data.batch import Batch, best_fit

Level = Literal["token", "sequence"]
STREAMS = ("advantage", "behaviour", "old")


@dataclass(slots=True)
class Answer:
    """One completion.

    logprobs: under the engine's weights. reward: None, it could not be judged. parts: the score of
    each reward by name. advantage: None, it is not trained on. old: log-probs under the trainer's
    weights of the rollout, where later steps need them. version: the rollout whose weights
    answered. unjudged: why there is no reward.
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    text: str
    reward: float | None
    parts: dict[str, float | None]
    obedient: bool | None
    advantage: float | None = None
    old: list[float] | None = None
    version: int = 0
    unjudged: str = ""

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    def weight(self, level: Level) -> float:
        """Σ w of its tokens: their number, or 1 at level "sequence"."""
        return 1.0 if level == "sequence" else float(len(self.ids))


@dataclass(slots=True)
class Group:
    """A prompt and its answers. number: of the prompt among all. mode: of the switch."""

    number: int
    mode: str | None
    ids: list[int]
    answers: list[Answer]

    @property
    def num_tokens(self) -> int:
        """Predictions in a row: of the prompt once, and of every answer."""
        return len(self.ids) - 1 + sum(len(answer.ids) for answer in self.answers)

    @property
    def has_signal(self) -> bool:
        """Whether any answer has an advantage that is not 0."""
        return any(answer.advantage for answer in self.answers)


def split_group(group: Group, row_length: int) -> Iterator[Group]:
    """The trained answers of a group, in groups that a row can hold; ValueError where none can."""
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
            yield replace(group, answers=held)
            held = []
        held.append(answer)
    if held:
        yield replace(group, answers=held)


def pack(groups: Sequence[Group], row_length: int) -> list[list[Group]]:
    """The groups of every row, split where one does not fit."""
    parts = [part for group in groups for part in split_group(group, row_length)]
    rows = best_fit([part.num_tokens for part in parts], row_length)
    return [[parts[i] for i in row] for row in rows]


def rows(groups: Sequence[Group], row_length: int, level: Level, scale: float = 1.0) -> list[Batch]:
    """Batches of one row each, as long as what it holds.

    level: "token" weighs every token alike, "sequence" every answer. scale: of the advantages.
    """
    return [row(parts, level, scale) for parts in pack(groups, row_length)]


def row(groups: Sequence[Group], level: Level = "token", scale: float = 1.0) -> Batch:
    """A batch of one row; without groups it trains nothing."""
    length = max(2, sum(group.num_tokens for group in groups))
    ints = {name: np.zeros(length, np.int64) for name in ("tokens", "labels")}
    ints |= {name: np.full(length, -1, np.int64) for name in ("segments", "prefix")}
    ints["positions"] = np.arange(length)
    floats = {name: np.zeros(length, np.float32) for name in ("weight", *STREAMS)}
    end = segment = 0
    for group in groups:
        shared, prefix = len(group.ids) - 1, -1
        if shared:
            here, prefix = slice(end, end + shared), segment
            ints["tokens"][here], ints["labels"][here] = group.ids[:-1], group.ids[1:]
            ints["positions"][here], ints["segments"][here] = range(shared), segment
            end, segment = end + shared, segment + 1
        for answer in group.answers:
            count = len(answer.ids)
            here = slice(end, end + count)
            ints["tokens"][here] = [group.ids[-1], *answer.ids[:-1]]
            ints["labels"][here] = answer.ids
            ints["positions"][here] = range(shared, shared + count)
            ints["segments"][here], ints["prefix"][here] = segment, prefix
            floats["weight"][here] = answer.weight(level) / count
            floats["advantage"][here] = scale * (answer.advantage or 0.0)
            floats["behaviour"][here] = answer.logprobs
            floats["old"][here] = answer.old or answer.logprobs
            end, segment = end + count, segment + 1
    tensors: dict[str, Any] = {
        name: torch.from_numpy(array)[None] for name, array in (ints | floats).items()
    }
    streams = {name: tensors.pop(name) for name in STREAMS}
    if not any(answer.old for group in groups for answer in group.answers):
        del streams["old"]
    return Batch(**tensors, streams=streams)


def spans(groups: Sequence[Group]) -> Iterator[tuple[Answer, slice]]:
    """Where each answer's predictions stand in the row of these groups."""
    end = 0
    for group in groups:
        end += len(group.ids) - 1
        for answer in group.answers:
            yield answer, slice(end, end + len(answer.ids))
            end += len(answer.ids)
