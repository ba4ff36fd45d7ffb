"""What is said while work goes on, and its progress: a bar with rate and time left on a terminal,
elsewhere a line every ten seconds, and nothing for work that takes less.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Self

from tessera import dist
from tessera.table import clock

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

LINE_SECONDS = 10.0
_live: list[object] = []  # on the terminal, which has room for one: work inside of it prints lines
_quiet: list[bool] = []


def tell(text: str) -> None:
    """Prints a line on stderr. Where that cannot be, work goes on: its result is elsewhere."""
    with suppress(OSError, ValueError):  # a pipe that nobody reads, a full disk; a closed stream
        if sys.stderr is not None:
            print(text, file=sys.stderr, flush=True)


@contextmanager
def quietly(quiet: bool) -> Iterator[None]:
    """Nothing is shown while the body runs, where `quiet`."""
    _quiet.append(quiet)
    try:
        yield
    finally:
        _quiet.pop()


def _on_terminal() -> bool:
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


class Progress:
    """`total` steps of work, each of some amount of `unit` (tokens, batches, words).

    with Progress("kd", 400, "tokens") as progress:
        progress.advance(1, 8192, loss=1.25)

    steps: what they are called, in lines that say the amount as well (`3/40 answers  812 tokens`).
    """

    def __init__(
        self, label: str, total: int, unit: str = "steps", *, steps: str = "", quiet: bool = False
    ) -> None:
        self.label, self.total, self.unit, self.steps = label, total, unit, steps
        self.done = 0
        self._last = -1  # steps of the last line printed
        self._fresh = 0  # steps made here, not before a resume: only they count for the speed
        self._amount = 0.0
        self._begun_amount, self._under_way = 0.0, 0  # of steps that are not done
        self._seconds, self._told = 0.0, 0.0  # that steps have taken together, until when
        self._shown = not (quiet or any(_quiet)) and dist.is_main()
        self._bar: Bar | None = None
        self._numbers: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._begun = self._printed = time.monotonic()
        if self._shown and _on_terminal() and not _live:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                console=Console(stderr=True),
            )
            self._bar.add_task(self.label, total=self.total, text="")
            self._bar.start()
            _live.append(self._bar)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar:
            self._bar.stop()
            _live.remove(self._bar)
        elif self._printed > self._begun and self._last < self.done:
            self._print()

    def advance(self, steps: int = 1, amount: float | None = None, **numbers: float) -> None:
        """Counts steps; `amount` defaults to them, and 0 marks steps made before a resume."""
        amount = steps if amount is None else amount
        self.done += steps
        self._amount += amount
        self._fresh += steps if amount else 0
        self._numbers = numbers
        self._show(steps)

    def working(self, amount: float, under_way: int) -> None:
        """Tells the amount of steps that are under way together, and how many these are."""
        now = time.monotonic()
        self._seconds += (now - max(self._told, self._begun)) * max(self._under_way, under_way)
        self._begun_amount, self._under_way, self._told = amount, under_way, now
        self._show(0)

    def _show(self, steps: int) -> None:
        if self._bar:
            self._bar.update(self._bar.task_ids[0], advance=steps, text=self.text())
        elif time.monotonic() - self._printed >= LINE_SECONDS:
            self._print()

    def text(self) -> str:
        """Rate, time left and the latest numbers: `12,345 tokens/s  0:42 left  loss 1.25`."""
        elapsed = max(time.monotonic() - self._begun, 1e-9)
        amount = self._amount + self._begun_amount
        rate = amount / elapsed
        parts = [f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2g} {self.unit}/s"]
        if self.steps:
            parts.insert(0, f"{amount:,.0f} {self.unit}")
        if self._fresh:
            parts.append(f"{clock(self._left(elapsed))} left")
        parts += [f"{key} {value:.4g}" for key, value in self._numbers.items()]
        return "  ".join(parts)

    def _left(self, elapsed: float) -> float:
        """Seconds left at the speed so far.

        The first of many steps under way to end is the shortest: the others count as an eighth of
        one. The last ones are the longest: what is under way needs half of a mean step's time.
        """
        left = (self.total - self.done) * elapsed / (self._fresh + self._under_way / 8)
        return max(left, self._seconds / self._fresh / 2 if self._under_way else 0.0)

    def _print(self) -> None:
        self._printed, self._last = time.monotonic(), self.done
        if self._shown:
            done = f"{self.done}/{self.total} {self.steps}".rstrip()
            tell(f"{self.label}  {done}  {self.text()}")
