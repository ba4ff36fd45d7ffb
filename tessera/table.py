"""Text for a person: aligned tables, numbers with their units, the nearest allowed name."""

from __future__ import annotations

import difflib
import itertools
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
GAP = 2


@dataclass(frozen=True)
class Column:
    """One key of the rows: the heading it stands under, line by line, and its value as text."""

    key: str
    heading: tuple[str, ...]
    text: Callable[[Any], str]


def render_table(
    rows: Sequence[Row],
    limit: int | None = None,
    view: Sequence[Column] = (),
    width: int | None = None,
) -> str:
    """The rows as aligned text under their headings; the last line names what was left out.

    view: how known keys are shown; the others follow under their own names. width: the last
    columns that do not fit into so many characters are left out; the first always stands.
    """
    shown = list(rows if limit is None else rows[:limit])
    columns = columns_of(shown, view)
    texts = [_column_lines(column, shown) for column in columns]
    ends = list(itertools.accumulate(len(lines[0]) + GAP for lines in texts))
    fitting = max(1, sum(width is None or end - GAP <= width for end in ends))
    height = max((len(lines) for lines in texts[:fitting]), default=0)
    spaced = [
        [" " * (len(lines[0]) + GAP)] * (height - len(lines)) + [text + " " * GAP for text in lines]
        for lines in texts[:fitting]
    ]
    lines = ["".join(parts).rstrip() for parts in zip(*spaced, strict=True)]
    left_out = [" ".join(column.heading) for column in columns[fitting:]]
    hidden = len(rows) - len(shown)
    left_out += [f"{hidden} more row{'s' * (hidden > 1)}"] if hidden else []
    lines += [f"... and {', '.join(left_out)} (--json prints all)"] if left_out else []
    return "\n".join(lines)


def columns_of(rows: Sequence[Row], view: Sequence[Column]) -> list[Column]:
    """The view's columns that the rows have, then their other keys."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    columns = [one for one in view if one.key in keys]
    known = {one.key for one in columns}
    return columns + [Column(key, (key,), cell) for key in keys if key not in known]


def _column_lines(column: Column, rows: Sequence[Row]) -> list[str]:
    """Heading, rule and cells of one column, all of one width; numbers to the right."""
    values = [row.get(column.key) for row in rows]
    cells = [cell(None) if value is None else column.text(value) for value in values]
    width = max(map(len, (*column.heading, *cells)))
    numbers = all(value is None or isinstance(value, int | float) for value in values)
    align = str.rjust if numbers else str.ljust
    padded = [align(text, width) for text in (*column.heading, *cells)]
    padded.insert(len(column.heading), "-" * width)
    return padded


def terminal_width() -> int | None:
    """The width of the terminal that stdout is; None for a file or a pipe, which have none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def cell(value: Any) -> str:
    """One value: counts with thousands grouped, other numbers to four digits, `-` for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " ".join(map(cell, value))
    return str(value)


def count(value: float) -> str:
    """A count: every digit while that is short, then `8.03 B`."""
    for size, name in ((1e12, "T"), (1e9, "B")):
        if value >= size:
            return f"{value / size:.4g} {name}"
    return f"{value:,.0f}"


def seconds(value: float) -> str:
    """A short time: `123 µs`, `4.56 ms`, `7.89 s`."""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if abs(value) >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value * 1e6:.3g} µs"


def clock(seconds: float) -> str:
    """A duration as people read it: 42 -> `0:42`, 4000 -> `1:06:40`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(value: float) -> str:
    """Bytes: `512 B`, `1.5 KiB`, `2.33 GiB`."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.3g} B"


def nearest(given: str, allowed: Iterable[str]) -> str:
    """The end of an error message: the nearest allowed name, and all of them."""
    names = list(allowed)
    near = difflib.get_close_matches(given, names, 1, 0.6)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Allowed: {', '.join(names) or 'none'}"


def spans(numbers: Iterable[int], what: str = "layer") -> str:
    """Numbers as a person writes them: `layers 0-3, 7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return f"{what}{'s' if sum(map(len, runs)) > 1 else ''} {', '.join(parts)}"


nats, percent, times = "{:.3f}".format, "{:.1%}".format, "{:.2f}x".format


# Heading, "|" between its lines, and format of the columns that are not shown under their own key.
HEADINGS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "heldout_loss": ("loss|(nats)", nats),
    "lm_loss": ("loss|(nats)", nats),
    "kl": ("KL|(nats)", nats),
    "kl_before": ("KL before|(nats)", nats),
    "pair_kl": ("pair's KL|(nats)", nats),
    "score": ("summed|score", nats),
    "agreement": ("agree-|ment", percent),
    "obedience": ("obedi-|ence", percent),
    "speedup": ("speed-|up", times),
    "promised": ("promised", times),
    "point": ("point", times),
    "share": ("share", times),
    "parameters": ("params", count),
    "kv_bytes_per_token": ("KV bytes|a token", count),
    "bytes": ("bytes in|scenario", count),
    "prefill_seconds": ("prefill|a batch", seconds),
    "decode_seconds": ("decode|a step", seconds),
    "decode_tokens_per_second": ("decode|tok/s", count),
    "prefill_tokens_per_second": ("prefill|tok/s", count),
    "tokens": ("tokens", count),
    "mode": ("thinking", cell),
    "stderr": ("±", cell),
    "items": ("items", count),
    "samples": ("samples", count),
    "truncated": ("trun-|cated", count),
    "unjudged": ("could not|be judged", count),
    "failed": ("missing", count),
}
AFTER = ("KL after|(nats)", nats)
AN_ANSWER = ("tokens|an answer", count)


def view(keys: str, **headings: tuple[str, Callable[[Any], str]]) -> tuple[Column, ...]:
    """Columns of space-separated keys, by `HEADINGS` where they are not given."""
    known = {**HEADINGS, **headings}
    return tuple(
        Column(key, tuple(heading.split("|")), text)
        for key in keys.split()
        for heading, text in [known.get(key, (key, cell))]
    )


SAVED = "{0}_kl {0}_parameters {0}_kv_bytes_per_token {0}_bytes {0}_seconds"
TAKEN: dict[str, tuple[str, Callable[[Any], str]]] = {
    f"{kind}_{key}": heading
    for kind in ("attention", "ffn")
    for key, heading in {
        "kl": ("KL|(nats)", nats),
        "parameters": ("params|saved", count),
        "kv_bytes_per_token": ("KV bytes|saved", count),
        "bytes": ("bytes|saved", size),
        "seconds": ("time|saved", seconds),
    }.items()
}


VIEWS: dict[str, tuple[Column, ...]] = {
    "compare": view(
        "model heldout_loss agreement speedup promised parameters kv_bytes_per_token "
        "decode_tokens_per_second prefill_tokens_per_second kl"
    ),
    "race": view(
        "rung place candidate lr kl_before kl agreement promised meets tokens lm_loss method",
        kl=AFTER,
    ),
    "frontier": view(
        "method point share promised speedup meets score kl_before kl agreement parameters lr "
        "lm_loss",
        kl=AFTER,
        promised=("promised|speed", times),
        speedup=("measured|speed", times),
        parameters=("params", times),
    ),
    "eval": view(
        "task mode metric value stderr tokens obedience items samples truncated unjudged failed",
        tokens=AN_ANSWER,
    ),
    "eval_groups": view("task mode group of value stderr tokens obedience items", tokens=AN_ANSWER),
    "taken": view(
        f"layer attention {SAVED.format('attention')} ffn {SAVED.format('ffn')} pair_kl", **TAKEN
    ),
    "cost": view(
        "run seconds cpu share tokens",
        seconds=("time", clock),
        cpu=("CPU", clock),
        share=("share", percent),
    ),
    "costs": view("kind word parameters kv_bytes_per_token bytes prefill_seconds decode_seconds"),
}
