"""Pairs of answers to one prompt, one better than the other by a margin of reward.

They come from rows (`prompt` or `messages`, `chosen`, `rejected`, and where known `chosen_reward`
and `rejected_reward`, as NeMo-Aligner's sets have them), or from what the policy writes: the best
and the worst of a group. Both stand in one row and go on from one prompt (`Batch.prefix`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tessera.data.batch import Batch, best_fit
from tessera.data.chat import ChatEncoder
from tessera.data.conversation import Message, SchemaError, tidy
from tessera.data.readers import Bad, DataError, expand, read_rows
from tessera.data.thought import split
from tessera.rl.experience import Answer, Group, Piece, row, spans


@dataclass(frozen=True, slots=True)
class Pair:
    """Ids of a prompt and of both answers; margin: by how much reward the chosen one is better."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float

    def __len__(self) -> int:
        return len(self.prompt) - 1 + len(self.chosen) + len(self.rejected)


def of_group(group: Group) -> Pair | None:
    """The best and the worst answer of a group; None where they are worth the same."""
    known = [answer for answer in group.answers if answer.reward is not None and answer.ids]
    if not known:
        return None
    best, worst = (pick(known, key=lambda one: one.reward or 0.0) for pick in (max, min))
    margin = (best.reward or 0.0) - (worst.reward or 0.0)
    return Pair(group.ids, best.ids, worst.ids, margin) if margin > 0 else None


def of_files(paths: Sequence[str], encoder: ChatEncoder) -> list[Pair]:
    """The pairs of files of rows. Raises DataError naming a row that is none."""
    return [pair for path in expand(paths) for pair in _of_file(path, encoder)]


def _of_file(path: Path, encoder: ChatEncoder) -> Iterator[Pair]:
    stop = list(encoder.tokenizer.eos_ids[:1])
    for number, found in read_rows(path):
        if isinstance(found, Bad):
            raise DataError(str(found))
        try:
            messages, chosen, rejected, margin = _read(found)
        except (SchemaError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}:{number}: no pair: {error}") from None
        mode = "off" if split(chosen).thought is None else "on"
        better, worse = (encoder.tokenizer.encode(text) + stop for text in (chosen, rejected))
        yield Pair(encoder.prompt(messages, mode), better, worse, margin)


def _read(found: Any) -> tuple[list[Message], str, str, float]:
    """(conversation, chosen, rejected, margin) of one row; chosen may hold messages, too."""
    if not isinstance(found, dict):
        raise SchemaError(f"a {type(found).__name__} and not an object")
    asked = found.get("messages") or found.get("prompt")
    messages = tidy([{"role": "user", "content": asked}] if isinstance(asked, str) else asked)
    chosen, rejected = (
        _text(found, ("chosen", "chosen_response")),
        _text(found, ("rejected", "rejected_response")),
    )
    given = found.get("chosen_reward"), found.get("rejected_reward")
    # NeMo-Aligner's defaults, for a null too.
    better, worse = (d if g is None else float(g) for g, d in zip(given, (1.0, 0.0), strict=True))
    margin = better - worse
    if margin <= 0:
        raise SchemaError(f"the chosen answer's reward {better} is not above {worse}")
    return messages, chosen, rejected, margin


def _text(found: dict[str, Any], names: Sequence[str]) -> str:
    value = next((found[name] for name in names if found.get(name)), None)
    if isinstance(value, list):
        value = value[-1].get("content")
    elif isinstance(value, dict):
        value = value.get("content")
    if not isinstance(value, str):
        raise SchemaError(f"no {' or '.join(names)}")
    return value


def rows(pairs: Sequence[Pair], row_length: int) -> list[Batch]:
    """Batches of one row each, every pair whole in one of them.

    streams: `pair`, k for the chosen and -k for the rejected answer of the k-th pair of the row;
    `margin`; `first`, 1 at the first prediction of each pair.
    Raises ValueError for a pair that no row can hold.
    """
    for pair in pairs:
        if len(pair) > row_length:
            raise ValueError(
                f"a pair of {len(pair)} tokens does not fit into a row of {row_length}; raise "
                "train.microbatch_tokens"
            )
    return [_row([pairs[i] for i in one]) for one in best_fit([len(p) for p in pairs], row_length)]


def _row(pairs: Sequence[Pair]) -> Batch:
    parts = [Piece(one.prompt, [_answer(one.chosen), _answer(one.rejected)]) for one in pairs]
    batch = row(parts)
    shape = batch.tokens.shape
    streams = {name: np.zeros(shape, np.float32) for name in ("pair", "margin", "first")}
    for number, (_, here) in enumerate(spans(parts)):
        pair, rejected = divmod(number, 2)
        streams["pair"][0, here] = -(pair + 1) if rejected else pair + 1
        streams["margin"][0, here] = pairs[pair].margin
        if not rejected:
            streams["first"][0, here.start] = 1.0
    batch.streams = {name: torch.from_numpy(value) for name, value in streams.items()}
    return batch


def _answer(ids: list[int]) -> Answer:
    return Answer(ids, [0.0] * len(ids), "stop", "", None, {}, True, advantage=1.0)
