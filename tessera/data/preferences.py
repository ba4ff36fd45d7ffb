"""Rows of preference sets: a prompt and two answers, of which one is better by a margin.

    prompt or any dialect's conversation, `chosen` and `rejected` (or `chosen_response` …), each a
        text, a message, or messages: TRL's explicit rows, LlamaFactory's, NeMo-Aligner's
    `chosen` and `rejected` alone, whole conversations that begin alike: TRL's implicit rows;
        beside a prompt that they repeat, UltraFeedback's
    `context`, `response1`, `response2`, `overall_preference` from -3 to 3: HelpSteer3's; with
        `prompt`, `response_1`, `response_2`, `preference_strength`: HelpSteer2's
    `context` and `completions`, each with its `rank`: NeMo-RL's

Both answers go through the reader, the template and the refusals of chats (dialects.py, chat.py).
Only the chosen one must do what the switch says: a rejected one may be rejected for not doing it.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tessera.data.chat import ChatEncoder, Document
from tessera.data.conversation import (
    ANSWERS,
    Chat,
    Message,
    SchemaError,
    check,
    misnamed,
    present,
    tidy,
)
from tessera.data.dialects import QUESTIONS, Row, messages_of, read_row
from tessera.data.readers import EXCERPT, Bad, DataError, read_rows

ROWS_AT_ONCE = 256
SIDES = ("chosen", "rejected")
CONVERSATIONS = ("messages", "conversations", "input")
# Which of two numbered answers is better, with the names of the answers and of the prompt.
COMPARISONS = {
    "overall_preference": ("response1", "response2", "context"),
    "preference_strength": ("response_1", "response_2", "prompt"),
}
# What is known of how good both answers are, in the order in which it is looked for.
REWARDS = ("{}_reward", "reward_{}", "{}_score", "score_{}", "{}_rating", "rating_{}")
_KNOWN = (*SIDES, *(f"{side}_response" for side in SIDES), *QUESTIONS, *CONVERSATIONS)


@dataclass(frozen=True, slots=True)
class Pair:
    """Ids of a prompt and of both answers; margin: by how much reward the chosen one is better."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float

    def __len__(self) -> int:
        return len(self.prompt) - 1 + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True, slots=True)
class Preference:
    """One conversation with the better and with the worse last answer, in the same mode."""

    chosen: Chat
    rejected: Chat
    margin: float


def is_preference(row: Any) -> bool:
    """Whether a row names two answers, whatever else is wrong with it."""
    if not isinstance(row, dict):
        return False
    names = {*SIDES, *(f"{side}_response" for side in SIDES), *COMPARISONS}
    return bool(names & row.keys()) or {"context", "completions"} <= row.keys()


def read_preference(row: Any) -> Preference:
    """The pair of a row. Raises SchemaError with the reason where it is none."""
    if not isinstance(row, dict):
        raise SchemaError(f"a {type(row).__name__}, not an object")
    row = {str(key): value for key, value in present(row).items()}
    answers, margin, rest = _sides(row)
    prompt = _prompt(rest)
    chosen, rejected = (_messages(side, one) for side, one in zip(SIDES, answers, strict=True))
    history = chosen[:-1]
    if history != rejected[:-1]:
        raise SchemaError("chosen and rejected differ in more than their last message")
    if history and prompt is None:
        prompt = read_row({**rest, "messages": history})
        history = prompt.messages
    elif not history:
        history = prompt.messages if prompt else []
    elif prompt and not _within(prompt.messages[: -1 if prompt.answered else None], history):
        raise SchemaError("chosen and rejected begin with another conversation than the prompt")
    if not history:
        raise SchemaError(
            f"no prompt: {', '.join(rest) or 'no other key'} beside chosen and rejected"
            f"{misnamed(rest, _KNOWN)}"
        )
    if history[-1]["role"] == "assistant":
        raise SchemaError("the prompt ends with an answer")
    tools, mode = (prompt.tools, prompt.reasoning) if prompt else ([], None)
    better = check(Chat([*history, chosen[-1]], mode, tools))
    worse = check(Chat([*history, rejected[-1]], better.mode, tools))
    return Preference(better, worse, margin)


def _sides(row: Row) -> tuple[list[Any], float, Row]:
    """(both answers, the better one first, the margin, the row's other keys)."""
    if name := next((one for one in COMPARISONS if one in row), None):
        return _of_comparison(row, name)
    if "completions" in row:
        return _of_ranks(row)
    names = [next((n for n in (s, f"{s}_response") if n in row), None) for s in SIDES]
    for side, name in zip(SIDES, names, strict=True):
        if name is None:
            raise SchemaError(f"no {side} or {side}_response{misnamed(row, _KNOWN)}")
    rest = {key: value for key, value in row.items() if key not in names}
    return [row[str(name)] for name in names], _margin(row), rest


def _of_comparison(row: Row, name: str) -> tuple[list[Any], float, Row]:
    """The better of two numbered responses first; a preference below 0 is for the first."""
    preference, names = row[name], COMPARISONS[name]
    if lacking := [key for key in names if key not in row]:
        raise SchemaError(f"{name}, and no {lacking[0]}{misnamed(row, names)}")
    if not _finite(preference):
        raise SchemaError(f"{name} is {preference!r}, which is no finite number")
    if preference == 0:
        raise SchemaError(f"{name} is 0: neither answer is better")
    answers = [row[one] for one in names[:2]]
    return answers[:: -1 if preference > 0 else 1], abs(float(preference)), _with_context(row)


def _of_ranks(row: Row) -> tuple[list[Any], float, Row]:
    found = row["completions"]
    ranked = isinstance(found, list) and all(
        isinstance(one, dict) and _finite(one.get("rank")) and "completion" in one for one in found
    )
    if not ranked or len(found) < 2:
        raise SchemaError("completions is no list of two or more with `rank` and `completion`")
    best, *_, worst = sorted(found, key=lambda one: one["rank"])
    if best["rank"] == worst["rank"]:
        raise SchemaError(f"all completions have rank {best['rank']}: none is better")
    return [best["completion"], worst["completion"]], 1.0, _with_context(row)


def _with_context(row: Row) -> Row:
    """The row with its `context` as the conversation."""
    kept = {name: row[name] for name in ("prompt", "tools", "system") if name in row}
    if "context" not in row:
        return kept
    return kept | {"messages" if isinstance(row["context"], list) else "prompt": row["context"]}


def _prompt(rest: Row) -> Chat | None:
    """What was asked, by any dialect; None where only the answers' own history says it."""
    keys = [key for key in (*QUESTIONS, *CONVERSATIONS) if key in rest]
    if not keys:
        return None
    # `messages` beside a prompt is UltraFeedback's copy of it, and an `answer` is the solution.
    given = ("input", "context") if isinstance(rest[keys[0]], str) else ()
    away = {*ANSWERS, *QUESTIONS, *CONVERSATIONS} - {keys[0], *given}
    return read_row({key: value for key, value in rest.items() if key not in away})


def _messages(side: str, value: Any) -> list[Message]:
    if not isinstance(value, str | dict | list) or not value:
        told = "empty" if value in ("", [], {}) else f"a {type(value).__name__}"
        raise SchemaError(f"{side} is {told}; give a text, a message or messages")
    found = tidy(messages_of(value, "assistant"))
    if found[-1]["role"] != "assistant":
        raise SchemaError(f"{side} does not end with an answer")
    found[-1].pop("weight", None)
    return found


def _within(few: list[Message], many: list[Message]) -> bool:
    """Whether all messages of `few` stand in `many`, in their order."""
    left = iter([(one["role"], one["content"].strip()) for one in many])
    return all((one["role"], one["content"].strip()) in left for one in few)


def _finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _margin(row: Row) -> float:
    """How much better the chosen answer is; 1, NeMo-Aligner's default, where nothing says so."""
    for form in REWARDS:
        names = [form.format(side) for side in SIDES]
        known = [name for name in names if name in row]
        if not known:
            continue
        if len(known) == 1:
            (lacking,) = set(names) - set(known)
            raise SchemaError(f"{known[0]} and no {lacking}: give both or neither")
        for name in names:
            if not _finite(row[name]):
                raise SchemaError(f"{name} is {row[name]!r}, which is no finite number")
        better, worse = (float(row[name]) for name in names)
        if better <= worse:
            raise SchemaError(f"the chosen answer's reward {better:g} is not above {worse:g}")
        return better - worse
    return 1.0


Encoded = tuple[Pair, Preference, list[Document]]


def encode_preferences(
    label: str, rows: Iterable[tuple[int, Any]], encoder: ChatEncoder
) -> Iterator[tuple[int, Encoded | Bad]]:
    """Of numbered rows: the pair with the chosen and the rejected document, or what is wrong.

    Raises DataError where the first row is of another kind: then the whole file is.
    """
    encoder, numbered = replace(encoder, turns="last"), iter(rows)
    while some := list(itertools.islice(numbered, ROWS_AT_ONCE)):
        found = [_read(label, number, row) for number, row in some]
        read = [one for one in found if isinstance(one, Preference)]
        chosen = iter(encoder.encode_batch([one.chosen for one in read]))
        rejected = iter(encoder.encode_batch([one.rejected for one in read], _anything))
        for (number, row), one in zip(some, found, strict=True):
            if isinstance(one, Preference):
                pair = _pair(one, next(chosen), next(rejected))
                yield number, _bad(label, number, pair, row) if isinstance(pair, str) else pair
            else:
                yield number, one


def _anything(chat: Chat) -> None:
    """Nothing speaks against an answer that is rejected anyway."""


def _read(label: str, number: int, row: Any) -> Preference | Bad:
    if isinstance(row, Bad):
        return row
    try:
        return read_preference(row)
    except SchemaError as error:
        if number == 1 and isinstance(row, dict) and not is_preference(row):
            raise DataError(f"{label}:1 is no preference row: {error}") from None
        return _bad(label, number, str(error), row)


def _bad(label: str, number: int, reason: str, row: Any) -> Bad:
    return Bad(label, number, reason, json.dumps(row, ensure_ascii=True, default=str)[:EXCERPT])


def _pair(
    one: Preference, chosen: list[Document] | str, rejected: list[Document] | str
) -> Encoded | str:
    """The pair of two documents, or why they make none."""
    for side, found in zip(SIDES, (chosen, rejected), strict=True):
        if isinstance(found, str):
            return found if chosen == rejected else f"{side}: {found}"
    documents = [found[-1] for found in (chosen, rejected) if not isinstance(found, str)]
    starts = [len(one.ids) - one.trained[::-1].index(False) for one in documents]
    (prompt, better), (other, worse) = (
        (document.ids[:start], document.ids[start:])
        for document, start in zip(documents, starts, strict=True)
    )
    if prompt != other:
        return "the template asks for both answers in different words"
    if better == worse:
        return "both answers are the same"
    return Pair(prompt, better, worse, one.margin), one, documents


def read_pairs(path: Path, encoder: ChatEncoder) -> Iterator[tuple[int, Pair | Bad]]:
    """The pairs of a file with the numbers of their rows, and the rows that are none."""
    for number, found in encode_preferences(str(path), read_rows(path), encoder):
        yield number, found if isinstance(found, Bad) else found[0]
