"""Resume states: torch's distributed checkpoints, written beside training, whole or not at all.

    state/step-00000120/   __0_0.distcp …   a file a process: its part of parameters and moments
                           .metadata        which part is where, so that any number may read them
                           trainer.json     the step and the source's position

It holds what the next step depends on and nothing else. A state is copied when the step ends and
written by a thread while training goes on; the directory takes its name when every process has
written, and only then older ones go. A kill at any instant leaves a state that is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from tessera import dist
from tessera.runs.files import FailureError, atomic_write, sync, writing

if TYPE_CHECKING:
    from tessera.train.engine import Trainer

META = "trainer.json"


class Saver:
    """Writes resume states under `directory`, one at a time, keeping the last `keep` of them.

    A context manager: on leaving it nothing is being written any more, however it is left.
    """

    def __init__(self, directory: Path, keep: int = 1) -> None:
        self.directory, self.keep = directory, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()  # the first error is the one to tell

    def save(self, step: int, trainer: Trainer) -> None:
        """Begin to write the state after `step` steps; what it is is settled on return.

        Raises WriteError where the one before could not be written.
        """
        self.wait()
        tensors = _copied(_tensors(trainer))
        meta = json.dumps({"step": step, "source": trainer.source.state_dict()})
        self._thread = threading.Thread(
            target=self._write, args=(step, tensors, meta), name="resume-state", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written. Raises WriteError where that went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, step: int, tensors: dict[str, Tensor], meta: str) -> None:
        try:
            _write_state(self.directory, step, tensors, meta, self.keep)
        except BaseException as error:
            self._error = error


def _write_state(
    directory: Path, step: int, tensors: dict[str, Tensor], meta: str, keep: int
) -> None:
    final = directory / f"step-{step:08}"
    temporary = directory / f".{final.name}.tmp"
    try:
        with writing(final), _plain_errors():
            if dist.is_main():
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                atomic_write(temporary / META, meta)
            dist.barrier(dist.saving_group())
            writer = FileSystemWriter(temporary)
            group, alone = dist.saving_group(), dist.world() == 1
            save(tensors, storage_writer=writer, process_group=group, no_dist=alone)
        if dist.is_main():
            with writing(final):
                sync(temporary)
                shutil.rmtree(final, ignore_errors=True)
                os.replace(temporary, final)
                sync(directory)
            for old in states(directory)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
    finally:
        if dist.is_main():
            shutil.rmtree(temporary, ignore_errors=True)


def states(directory: Path) -> list[Path]:
    """The whole resume states of a directory, the oldest first."""
    return sorted(path for path in directory.glob("step-*") if (path / META).is_file())


def load_state(directory: Path, trainer: Trainer) -> int:
    """Put the last saved state back into `trainer`; returns its step, 0 where there is none.

    It may have been saved by another number of processes, and under another layout.
    """
    found = dist.broadcast([str(path) for path in states(directory)])
    if not found:
        return 0
    path = Path(found[-1])
    meta = json.loads((path / META).read_text())
    reader = FileSystemReader(path)
    saved = reader.read_metadata().state_dict_metadata
    tensors = {key: value for key, value in _tensors(trainer, empty=True).items() if key in saved}
    with _plain_errors():
        load(tensors, storage_reader=reader, no_dist=dist.world() == 1)
    _put_back(tensors, trainer)
    trainer.source.load_state_dict(meta["source"])
    return meta["step"]


def _tensors(trainer: Trainer, empty: bool = False) -> dict[str, Tensor]:
    """Parameters, moments and this process's random state, by name; `empty`: with room for them."""
    tensors: dict[str, Tensor] = {f"rng.{dist.rank()}": torch.get_rng_state()}
    for key, parameter in trainer.trainable.items():
        tensors[f"model.{key}"] = parameter.detach()
        state = trainer.optimizer.state.get(parameter, {})
        for field, value in (_moments(parameter) if empty else state).items():
            tensors[f"optimizer.{field}.{key}"] = value
    return tensors


def _moments(parameter: Tensor) -> dict[str, Tensor]:
    """Room for what AdamW remembers of a parameter."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    moment = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return {"step": step, "exp_avg": moment, "exp_avg_sq": moment.clone()}


def _put_back(tensors: Mapping[str, Tensor], trainer: Trainer) -> None:
    """Moments into the optimizer and the random state into torch; parameters were read in place."""
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            field, _, name = rest.partition(".")
            trainer.optimizer.state[trainer.trainable[name]][field] = value
        elif kind == "rng":
            torch.set_rng_state(value)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in memory that no later step changes, on the CPU."""
    return {key: _copy(value) for key, value in tensors.items()}


@torch.no_grad()
def _copy(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.to("cpu", copy=True)
    return tensor.to("cpu") if tensor.device.type != "cpu" else tensor.clone()


@contextmanager
def _plain_errors() -> Iterator[None]:
    """A checkpoint's error as its cause: an OSError, which `writing` explains, or a failure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as failed:
            causes = [cause for cause, _ in failed.failures.values()]
            for cause in filter(None, map(_refused, causes)):
                raise OSError(cause.errno, cause.strerror or str(cause)) from failed
            raise FailureError(f"the resume state failed: {causes[0]}") from failed


def _refused(error: BaseException | None) -> OSError | None:
    """The system's refusal behind an error; on a full disk torch's zip writer names its own end."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
