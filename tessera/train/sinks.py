"""Where metrics go besides `metrics.jsonl`: TensorBoard, Weights & Biases, Trackio.

    [kd]
    train.report_to = ["tensorboard", "wandb"]

Each is a package of its own (the extras of the same names) that is imported when it is asked for. A
resumed run goes on in the same chart. Steps that are made again after a kill are purged by
TensorBoard, left out by W&B and drawn twice by Trackio. Whatever goes wrong in one of them is told
once and ends that one; training goes on, and every number is in `metrics.jsonl`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from tessera import dist
from tessera.run import Run

SinkName = Literal["tensorboard", "wandb", "trackio"]


class Sink(Protocol):
    """One place that takes numbers."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def check_installed(names: tuple[SinkName, ...]) -> None:
    """Raises ValueError where a package is missing, naming the extra that brings it."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"{name} is not installed: pip install 'tessera[{name}]', or leave it out of "
                "report_to"
            )


class _TensorBoard:
    def __init__(self, run: Run, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=start + 1)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, run: Run, start: int) -> None:
        import wandb

        self.run = wandb.init(
            project=_project(run),
            name=run.name,
            id=run.manifest.fingerprint,
            resume="allow",
            dir=str(run.path),
            config=run.config,
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    def __init__(self, run: Run, start: int) -> None:
        import trackio

        name = f"{run.name}-{run.manifest.fingerprint[:8]}"
        self.run = trackio.init(
            project=_project(run), name=name, resume="allow", config=run.config, embed=False
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        self.run.finish()


def _project(run: Run) -> str:
    """All stages of one recipe are one project: the directory that holds their runs."""
    return run.path.resolve().parent.name


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

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *_: Any) -> None:
        for name, sink in list(self.open.items()):
            self._try(name, sink.close)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Sends one step's numbers to every sink that still works."""
        for name, sink in list(self.open.items()):
            self._try(name, lambda sink=sink: sink.log(step, numbers))

    def _try(self, name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # their errors are of any type, and none may stop a training
            self.open.pop(name, None)
            reason = f"{type(error).__name__}: {error}"
            self.run.say(f"{name} failed and gets no more numbers; metrics.jsonl has all. {reason}")
            return None
