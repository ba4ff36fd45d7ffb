"""Where metrics go besides `metrics.jsonl`: TensorBoard, Weights & Biases, Trackio.

    [kd]
    train.report_to = ["tensorboard", "wandb"]

Each is a package of its own (the extras of the same names), imported when it is asked for. A
resumed run goes on in the same chart, and every step is in it once: TensorBoard purges what is
made again, the others say which step they want next, and are sent what a kill kept from them out
of the run's own logs. A run that was deleted and redone is a new one. Whatever goes wrong in one
of them is told once and ends that one; training goes on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

from tessera import dist
from tessera.runs.files import fingerprint
from tessera.runs.run import Run, read_metrics, read_timings

SinkName = Literal["tensorboard", "wandb", "trackio"]


class Sink(Protocol):
    """One place that takes numbers. first: the step it wants next; those before it has."""

    first: int

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def check_installed(names: tuple[SinkName, ...]) -> None:
    """Raises ValueError where a package is missing, naming the extra that brings it."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name is a package to Python, too
            raise ValueError(
                f"{name} is not installed: pip install 'tessera[{name}]', or leave it out of "
                "report_to"
            )


class _TensorBoard:
    def __init__(self, run: Run, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.path / "tensorboard"
        self.first = start + 1 if folder.is_dir() else 1
        self.writer = SummaryWriter(str(folder), purge_step=self.first)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # what a kill finds in the queue would be a gap in the chart

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, run: Run, start: int) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        project, name = names(run)
        self.run = wandb.init(
            project=project,
            name=name,
            id=identity(run),
            resume="allow",
            dir=str(run.path),
            config=run.config,
        )
        self.first = self.run.starting_step  # 0 offline, where each process writes a file

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    def __init__(self, run: Run, start: int) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        project, name = names(run)
        with contextlib.redirect_stdout(sys.stderr):
            self.run = trackio.init(
                project=project,
                name=f"{name}-{identity(run)[:8]}",
                resume="allow",
                config=run.config,
                embed=False,
            )
        self.finish = trackio.finish
        self.first = getattr(self.run, "_next_step", 0)  # no public name says it

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self.finish()


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
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "trackio": _Trackio,
}


class Sinks:
    """The sinks of one training, in its main process; a context manager that closes them.

    start: steps of the run that are done; what was logged after them will be logged again.
    """

    def __init__(self, names: tuple[SinkName, ...], run: Run, start: int) -> None:
        self.run = run
        self.open: dict[str, Sink] = {}
        for name in names if dist.is_main() else ():
            made = self._try(name, lambda make=SINKS[name]: make(run, start))
            if made is not None:
                self.open[name] = made
        if any(sink.first <= start for sink in self.open.values()):
            for step, numbers in _logged(run):
                self.log(step, numbers)

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *_: Any) -> None:
        for name, sink in list(self.open.items()):
            self._try(name, sink.close)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Sends one step's numbers to every sink that still works and has not got them."""
        for name, sink in list(self.open.items()):
            if step >= sink.first:
                self._try(name, lambda sink=sink: sink.log(step, numbers))

    def _try(self, name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # their errors are of any type, and none may stop a training
            self.open.pop(name, None)
            reason = f"{type(error).__name__}: {error}"
            self.run.say(f"{name} failed and gets no more numbers; metrics.jsonl has all. {reason}")
            return None


def _logged(run: Run) -> Iterator[tuple[int, dict[str, float]]]:
    """Each step that the run's own logs hold; what was not finite is left out."""
    timings = {row["step"]: row for row in read_timings(run.path)}
    for row in read_metrics(run.path):
        numbers = row | timings.get(row["step"], {})
        yield row["step"], {k: v for k, v in numbers.items() if k != "step" and v is not None}
