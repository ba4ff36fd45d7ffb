"""Where metrics go besides `metrics.jsonl`: TensorBoard, Weights & Biases, Trackio.

    [kd]
    train.report_to = ["tensorboard", "wandb"]

Each is a package of its own (the extras of the same names), imported when it is asked for. A
resumed run continues the same chart, every step in it once; what a kill kept from a sink is sent
from the run's own logs. A sink that fails is reported once and closed; training goes on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tessera import dist
from tessera.runs.files import fingerprint
from tessera.runs.run import Run, read_metrics, read_timings

SinkName = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True)
class Sink:
    """One place that takes numbers. first: the step it wants next; those before it has."""

    first: int
    log: Callable[[int, Mapping[str, float]], Any]
    close: Callable[[], Any]


def check_installed(names: Sequence[str]) -> None:
    """Raises ValueError where a package is missing, naming the extra that brings it."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name is a package to Python, too
            raise ValueError(f"{name} is not installed: pip install 'tessera[{name}]'")


def _tensorboard(run: Run, start: int) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    folder = run.path / "tensorboard"
    first = start + 1 if folder.is_dir() else 1
    writer = SummaryWriter(str(folder), purge_step=first)

    def log(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # what a kill finds in the queue would be a gap in the chart

    return Sink(first, log, writer.close)


def _wandb(run: Run, start: int) -> Sink:
    import wandb  # pyright: ignore[reportMissingImports]

    project, name = names(run)
    known: Any = {"id": identity(run), "resume": "allow", "dir": str(run.path)}
    opened = wandb.init(project=project, name=name, config=run.config, **known)
    first = opened.starting_step  # 0 offline, where each process writes a file
    return Sink(first, lambda step, numbers: opened.log(dict(numbers), step=step), opened.finish)


def _trackio(run: Run, start: int) -> Sink:
    import trackio  # pyright: ignore[reportMissingImports]

    project, name = names(run)
    name = f"{name}-{identity(run)[:8]}"
    known: Any = {"resume": "allow", "embed": False}
    with contextlib.redirect_stdout(sys.stderr):
        opened = trackio.init(project=project, name=name, config=run.config, **known)

    def close() -> None:
        with contextlib.redirect_stdout(sys.stderr):
            trackio.finish()

    first = getattr(opened, "_next_step", 0)  # no public name says it
    return Sink(first, lambda step, numbers: opened.log(dict(numbers), step=step), close)


def identity(run: Run) -> str:
    """What a run is known by elsewhere: the same after a resume, another one after `--redo`."""
    return fingerprint([run.manifest.fingerprint, run.manifest.started])[:16]


def names(run: Run) -> tuple[str, str]:
    """Project and name: a recipe is a project, of its stages and of the runs inside them."""
    path = run.path.resolve()
    around = [parent for parent in path.parents if (parent / "run.json").is_file()]
    home = (around[-1] if around else path).parent
    return home.name, "-".join(path.relative_to(home).parts)


SINKS: Mapping[SinkName, Callable[[Run, int], Sink]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}


class Sinks:
    """The sinks of one training, in its main process; a context manager that closes them.

    start: steps of the run that are done; what was logged after them will be logged again.
    """

    def __init__(self, names: tuple[SinkName, ...], run: Run, start: int) -> None:
        self.run = run
        self.open: dict[str, Sink] = {}
        for name in names if dist.is_main() else ():
            with self._guard(name):
                self.open[name] = SINKS[name](run, start)
        if any(sink.first <= start for sink in self.open.values()):
            timings = {row["step"]: row for row in read_timings(run.path)}
            for row in read_metrics(run.path):
                numbers = row | timings.get(row["step"], {})
                finite = {k: v for k, v in numbers.items() if k != "step" and v is not None}
                self.log(row["step"], finite)

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *_: Any) -> None:
        for name, sink in list(self.open.items()):
            with self._guard(name):
                sink.close()

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Sends one step's numbers to every sink that still works and has not got them."""
        for name, sink in list(self.open.items()):
            if step >= sink.first:
                with self._guard(name):
                    sink.log(step, numbers)

    @contextlib.contextmanager
    def _guard(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # their errors are of any type, and none may stop a training
            self.open.pop(name, None)
            reason = f"{type(error).__name__}: {error}"
            self.run.say(f"{name} failed and gets no more numbers; metrics.jsonl has all. {reason}")
