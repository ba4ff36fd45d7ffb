"""Whether the right tokens of a set of conversations are trained: `tessera data audit`.

The checks read the ids and the mask, not the code that made them, so a template or a tokenizer that
spoils them is found before the training is paid for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessera.data.chat import ChatEncoder, Document, without_old_thoughts
from tessera.data.conversation import Chat, trained_answers
from tessera.data.dialects import chats_of
from tessera.data.preferences import encode_preferences, is_preference
from tessera.data.readers import Bad, DataError, read_rows
from tessera.data.switch import NONE
from tessera.data.thought import CLOSE, OPEN, opens, split, split_message

if TYPE_CHECKING:
    from rich.text import Text

ROWS_AT_ONCE = 256
ROWS_NAMED = 10
CHECKS = {
    "first thought": "<think> of an on-row is neither trained nor opened by the prompt",
    "answer": "the answer is not all trained",
    "stop token": "a trained stretch does not end where generation stops",
    "prompt": "the prompt is not what an engine is asked with, or some of it is trained",
    "off-row": "an off-row trains a thought",
    "history": "an old thought stands in the history",
    "once": "an answer is trained twice, or a stretch is trained that is none",
}


@dataclass
class Report:
    """What was found in a set: rows by the names of CHECKS, and by the reason of a refusal."""

    rows: dict[str, int] = field(default_factory=lambda: {"on": 0, "off": 0})
    documents: int = 0
    tokens: int = 0
    trained: dict[str, int] = field(default_factory=lambda: {"on": 0, "off": 0})
    longest: int = 0
    violations: dict[str, list[int]] = field(default_factory=dict)
    refused: dict[str, list[int]] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """True where nothing is wrong with any row."""
        return not self.violations and not self.refused and any(self.rows.values())

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        found: dict[str, Any] = {**vars(self), "clean": self.clean}
        for name in ("violations", "refused"):
            some = found[name].items()
            found[name] = {k: {"count": len(rows), "rows": rows[:ROWS_NAMED]} for k, rows in some}
        return found

    def lines(self) -> list[str]:
        """The report as text."""
        total, trained = sum(self.rows.values()), sum(self.trained.values())
        share = trained / max(1, self.tokens)
        lines = [
            f"{total:,} rows ({self.rows['on']:,} on, {self.rows['off']:,} off) in "
            f"{self.documents:,} documents of {self.tokens:,} tokens, the longest {self.longest:,}",
            f"{trained:,} trained tokens ({share:.1%}): {self.trained['on']:,} on, "
            f"{self.trained['off']:,} off",
        ]
        for name, told in CHECKS.items() if total else ():
            rows = self.violations.get(name)
            lines.append(f"FAIL  {name}: {told}{rows_named(rows)}" if rows else f"ok    {name}")
        return lines + [
            f"refused  {reason}{rows_named(rows)}" for reason, rows in self.refused.items()
        ]


def rows_named(rows: list[int]) -> str:
    """How many rows, and the numbers of the first."""
    more = ", …" if len(rows) > ROWS_NAMED else ""
    return f"  [{len(rows):,}: rows {', '.join(map(str, rows[:ROWS_NAMED]))}{more}]"


def audit(
    path: Path,
    encoder: ChatEncoder,
    limit: int | None = None,
    seen: Callable[[int, list[Document] | str], None] = lambda row, found: None,
    pairs: bool | None = None,
) -> Report:
    """Checks the masks of a file; `seen` is given each row's documents or refusal.

    pairs: whether its rows are preferences, by their keys where None. Of those both answers are
    encoded, and the chosen one is checked.
    """
    report = Report()
    for number, chat, documents, num_checked in _encoded(path, encoder, limit, pairs):
        seen(number, documents)
        if chat is None or isinstance(documents, str):
            report.refused.setdefault(str(documents), []).append(number)
            continue
        report.rows[chat.mode] += 1
        report.documents += len(documents)
        for document in documents:
            report.tokens += len(document.ids)
            report.trained[document.mode] += sum(document.trained)
            report.longest = max(report.longest, len(document.ids))
        for name in violations(chat, documents[:num_checked], encoder):
            report.violations.setdefault(name, []).append(number)
    if not report.refused and not any(report.rows.values()):
        raise DataError(f"{path} holds no row")
    return report


def _encoded(
    path: Path, encoder: ChatEncoder, limit: int | None, pairs: bool | None
) -> Iterator[tuple[int, Chat | None, list[Document] | str, int | None]]:
    """(number, conversation, documents, how many of them to check) of each row.

    No conversation, and the reason for documents, of one that is refused.
    """
    rows = itertools.islice(read_rows(path), limit)
    first = list(itertools.islice(rows, 1))
    rows = itertools.chain(first, rows)
    if pairs if pairs is not None else any(is_preference(row) for _, row in first):
        for number, found in encode_preferences(str(path), rows, encoder):
            if isinstance(found, Bad):
                yield number, None, found.reason, 0
            else:
                yield number, found[1].chosen, found[2], 1
        return
    chats = chats_of(str(path), rows)
    while some := list(itertools.islice(chats, ROWS_AT_ONCE)):
        found = iter(encoder.encode_batch([chat for _, chat in some if isinstance(chat, Chat)]))
        for number, chat in some:
            if isinstance(chat, Bad):
                yield number, None, chat.reason, 0
            else:
                yield number, chat, next(found), None


def violations(chat: Chat, documents: list[Document], encoder: ChatEncoder) -> list[str]:
    """The checks that the documents of a conversation do not pass, by the names of CHECKS."""
    decode = encoder.tokenizer.decode
    stretches = [(one.ids, *span) for one in documents for span in _stretches(one)]
    if not stretches:
        return ["answer"]
    last, (start, stop) = documents[-1], _stretches(documents[-1])[-1]
    messages = chat.messages[: trained_answers(chat.messages)[-1] + 1]  # the last that is trained
    wanted = split_message(messages[-1])
    written, before = decode(last.ids[start:stop]), decode(last.ids[:start])
    asked = encoder.prompt(without_old_thoughts(messages[:-1]), chat.mode, chat.tools)
    opened = opens(decode(asked))
    told = split(written, opened)
    begins = opened or written.lstrip().startswith(OPEN)
    found: list[str] = []
    if chat.mode == "on" and not (begins and told.thought == wanted.thought):
        found.append("first thought")
    if told.answer.strip() != wanted.answer.strip() and not messages[-1].get("tool_calls"):
        found.append("answer")
    if not {ids[b - 1] for ids, _, b in stretches} <= set(encoder.tokenizer.eos_ids):
        found.append("stop token")
    if not encoder.template.marks_generation and (
        last.ids[: len(asked)] != asked or start != len(asked)
    ):
        found.append("prompt")
    texts = [decode(ids[a:b]) for ids, a, b in stretches]
    ruled = texts[-1:] if encoder.switch == NONE else texts  # the rest may think or not
    if chat.mode == "off" and any(OPEN in text or CLOSE in text for text in ruled):
        found.append("off-row")
    asked_at = max(i for i, one in enumerate(chat.messages) if one["role"] == "user")
    history = [one for one in chat.messages[:asked_at] if one["role"] == "assistant"]
    old = [split_message(one).thought for one in history]
    if any(one and f"{one}\n{CLOSE}" in before for one in old):
        found.append("history")
    answers = [one for one in chat.messages if one["role"] == "assistant"]
    said = [split_message(one).answer.strip() for one in answers]
    wrote = [split(text).answer.strip() for text in texts]
    twice = any(wrote.count(text) > max(1, said.count(text)) for text in set(wrote) if text)
    if len(stretches) > len(answers) or twice:
        found.append("once")
    return found


def _stretches(document: Document) -> list[tuple[int, int]]:
    """[start, stop) of each run of trained ids; a stop token ends a run."""
    runs, at = [], 0
    for trained, group in itertools.groupby(document.trained):
        size = len(list(group))
        if trained:
            runs.append((at, at + size))
        at += size
    return runs


def coloured(document: Document, encoder: ChatEncoder, number: int) -> Text:
    """A document with its trained tokens in green between ⟦ and ⟧, and special tokens shown."""
    from rich.text import Text

    shown = Text(f"row {number}, {document.mode}: {len(document.ids)} tokens, ", style="bold")
    shown.append(f"{sum(document.trained)} trained\n")
    pairs = zip(document.ids, document.trained, strict=True)
    for trained, group in itertools.groupby(pairs, key=lambda pair: pair[1]):
        text = encoder.tokenizer.decode([i for i, _ in group], special=True)
        shown.append(f"⟦{text}⟧" if trained else text, style="bold green" if trained else "dim")
    return shown


def print_rows(rows: dict[int, list[Document] | str], encoder: ChatEncoder) -> None:
    """Prints rows: their documents in colour where that can be shown, or why there are none."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for number, documents in sorted(rows.items()):
        if isinstance(documents, str):
            console.print(f"row {number} is refused: {documents}", style="bold red", markup=False)
            continue
        for document in documents:
            console.print(coloured(document, encoder, number), end="\n\n")
