"""A file of answers, judged row by row: what `tessera judge` does.

A row is an object with `answer`, `kind` and what the kind judges by: `gold`, or `tests` (with
`entry_point` and `setup`), `inputs` and `outputs`, or `instruction_id_list` and `kwargs`. Without
`kind`, rows with tests or inputs are code, and rows with instructions are those. Other keys are
passed over, but for `want`: the verdict that somebody expects.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tessera.rl.pool import Pool
from tessera.rl.rewards import CodeReward, FunctionReward, Sample
from tessera.rl.verifiers.instructions import read_instructions
from tessera.rl.verifiers.judge import KINDS, JudgeError, judge, require_arguments, takes
from tessera.rl.verifiers.outcome import VERDICTS, Outcome
from tessera.table import nearest

AT_ONCE = 64  # rows whose verdicts come together
ANSWER_SECONDS = 30.0  # for a verdict but of code; the first of a process imports its libraries
_TYPES: dict[str, tuple[type, ...]] = {
    "gold": (str, int, float, list),
    "tests": (str, list),
    **dict.fromkeys(("inputs", "outputs", "instruction_id_list", "kwargs"), (list,)),
    **dict.fromkeys(("setup", "entry_point"), (str,)),
    **dict.fromkeys(("ignore_case", "loose", "partial", "truncated"), (bool,)),
    "tolerance": (int, float),
    "choices": (int,),
}
_NAMES = {str: "a text", list: "a list", bool: "true or false", int: "a number", float: "a number"}


class RowError(ValueError):
    """A row that cannot be judged; the text names its line and what is allowed."""


@dataclass(frozen=True)
class Row:
    """One answer: its line in the file, its kind, and what it is judged by."""

    line: int
    kind: str
    answer: str
    fields: Mapping[str, Any]
    want: str = ""

    def arguments(self) -> dict[str, Any]:
        """What of its fields the kind takes, `gold` aside."""
        known = set(takes(self.kind)) & _TYPES.keys()
        return {key: self.fields[key] for key in known if self.fields.get(key) is not None}


def read_rows(lines: Iterable[str]) -> list[Row]:
    """The rows of JSON lines; empty lines are passed over. Raises RowError."""
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_row(number, line))
            except ValueError as error:
                raise RowError(f"line {number}: {error}") from None
    return found


def _row(number: int, line: str) -> Row:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RowError(f"no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise RowError("a row is an object with `kind`, `answer`, and `gold` or `tests`")
    if not isinstance(fields.get("answer"), str):
        raise RowError(f"`answer` must be a text; {nearest('answer', fields)}")
    row = Row(number, _kind(fields), fields["answer"], fields, fields.get("want") or "")
    if row.want and row.want not in VERDICTS:
        raise RowError(f"`want` is {row.want!r}; {nearest(str(row.want), VERDICTS)}")
    for key, value in [("gold", fields.get("gold")), *row.arguments().items()]:
        if value is not None and not isinstance(value, _TYPES[key]):
            names = dict.fromkeys(_NAMES[kind] for kind in _TYPES[key])
            raise RowError(f"`{key}` must be {' or '.join(names)}, not {json.dumps(value)[:40]}")
        if isinstance(value, list) and key not in ("kwargs", "gold"):
            if not all(isinstance(one, str) for one in value):
                raise RowError(f"`{key}` must be a list of texts")
    require_arguments(row.kind, fields.get("gold"), row.arguments())
    if row.kind == "instructions":
        read_instructions(fields["instruction_id_list"], fields["kwargs"])
    return row


def _kind(fields: Mapping[str, Any]) -> str:
    kind = fields.get("kind")
    if kind is None and ("tests" in fields or "inputs" in fields):
        return "code"
    if kind is None and "instruction_id_list" in fields:
        return "instructions"
    if not isinstance(kind, str) or kind not in KINDS:
        raise JudgeError(f"`kind` is {json.dumps(kind)}; {nearest(str(kind), KINDS)}")
    return kind


def judge_row(sample: Sample) -> Outcome:
    """The verdict on the row that the sample's fields are, in a process that can be killed."""
    row = Row(0, sample.fields["kind"], sample.completion, sample.fields["row"])
    return judge(row.kind, row.answer, row.fields.get("gold"), **row.arguments())


def judged(rows: Sequence[Row], workers: int = 2) -> Iterator[tuple[Row, Outcome]]:
    """The verdict on each row, in order; one whose checker hangs is could-not-judge."""
    function = f"{__name__}:{judge_row.__name__}"
    times = (ANSWER_SECONDS, CodeReward(kind="code").deadline)
    checkers = [FunctionReward(kind="function", function=function, deadline=t) for t in times]
    with Pool(checkers, workers) as pool:
        for start in range(0, len(rows), AT_ONCE):
            part = rows[start : start + AT_ONCE]
            samples = [Sample([], r.answer, {"kind": r.kind, "row": dict(r.fields)}) for r in part]
            tasks = [(int(r.kind == "code"), one) for r, one in zip(part, samples, strict=True)]
            yield from zip(part, pool.check(tasks), strict=True)


def shown(row: Row, outcome: Outcome) -> dict[str, Any]:
    """A row of the table that people read."""
    verdict = {"line": row.line, "kind": row.kind, "verdict": outcome.verdict}
    want = {"want": row.want} if row.want else {}
    texts = {"answer": row.answer[-200:], "gold": row.fields.get("gold"), "why": outcome.reason}
    short = {
        k: " ".join(str(v).split())[-40 if k == "answer" else 0 :][:60]
        for k, v in texts.items()
        if v
    }
    return verdict | want | {"answer": "", "gold": "", "why": ""} | short


def summary(found: Sequence[tuple[Row, Outcome]]) -> str:
    """How many rows have which verdict, and how many the one that is wanted."""
    counts = {verdict: sum(o.verdict == verdict for _, o in found) for verdict in VERDICTS}
    text = f"{len(found):,} rows: " + ", ".join(f"{n:,} {name}" for name, n in counts.items())
    wanted = [(row.want, outcome.verdict) for row, outcome in found if row.want]
    agreed = sum(want == verdict for want, verdict in wanted)
    return text + (f"; {agreed:,} of {len(wanted):,} as wanted" if wanted else "")
