"""Progress of long work: a bar with rate and time left on a terminal, elsewhere a line every ten
seconds, and nothing for work that takes less.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Self

from tessera import dist
from tessera.table import clock

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

LINE_SECONDS = 10.0


class Progress:
    """`total` steps of work, each of some amount of `unit` (tokens, batches, words).

    with Progress("kd", 400, "tokens") as progress:
        progress.advance(1, 8192, loss=1.25)
    """

    def __init__(self, label: str, total: int, unit: str = "steps", *, quiet: bool = False) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self._last = 0  # steps of the last line printed
        self._fresh = 0  # steps made here, not before a resume: only they count for the speed
        self._amount = 0.0
        self._shown = not quiet and dist.is_main()
        self._bar: Bar | None = None
        self._numbers: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._begun = self._printed = time.monotonic()
        if self._shown and sys.stderr.isatty():
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
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar:
            self._bar.stop()
        elif self._printed > self._begun and self._last < self.done:
            self._print()

    def advance(self, steps: int = 1, amount: float | None = None, **numbers: float) -> None:
        """Counts steps; `amount` defaults to them, and 0 marks steps made before a resume."""
        amount = steps if amount is None else amount
        self.done += steps
        self._amount += amount
        self._fresh += steps if amount else 0
        self._numbers = numbers
        if self._bar:
            self._bar.update(self._bar.task_ids[0], advance=steps, text=self.text())
        elif time.monotonic() - self._printed >= LINE_SECONDS:
            self._print()

    def text(self) -> str:
        """Rate, time left and the latest numbers: `12,345 tokens/s  0:42 left  loss 1.25`."""
        elapsed = max(time.monotonic() - self._begun, 1e-9)
        rate = self._amount / elapsed
        parts = [f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2g} {self.unit}/s"]
        if self._fresh:
            left = (self.total - self.done) * elapsed / self._fresh
            parts.append(f"{clock(left)} left")
        parts += [f"{key} {value:.4g}" for key, value in self._numbers.items()]
        return "  ".join(parts)

    def _print(self) -> None:
        self._printed, self._last = time.monotonic(), self.done
        if self._shown:
            line = f"{self.label}  {self.done}/{self.total}  {self.text()}"
            print(line, file=sys.stderr, flush=True)
