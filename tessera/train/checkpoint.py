"""Resume states: torch's distributed checkpoints, written beside training, whole or not at all.

    state/step-00000120/   __0_0.distcp …   a file a process: its part of parameters and moments
                           .metadata        which part is where, so that any number may read them
                           trainer.json     the step and the source's position

A state is copied when the step ends and written by a thread while training goes on; the directory
takes its name when every process has written, and only then older ones go.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
from tessera.runs.files import FailureError, RunError, atomic_write, sync, writing
from tessera.train.optim import empty_state

if TYPE_CHECKING:
    from tessera.train.engine import Trainer

META = "trainer.json"


class Saver:
    """Writes resume states under `directory`, one at a time, keeping the last `keep` of them."""

    def __init__(self, directory: Path, keep: int = 1) -> None:
        self.directory, self.keep = directory, keep
        self._pool = ThreadPoolExecutor(1, "resume-state")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._pool.shutdown()
        if error is None:  # else the first error is the one to raise
            self.wait()

    def save(self, step: int, trainer: Trainer) -> None:
        """Begin to write the state after `step` steps, copied before this returns.

        Raises WriteError where the one before could not be written.
        """
        self.wait()
        with torch.no_grad():
            tensors = {
                key: value.clone() if value.device.type == "cpu" else value.to("cpu")
                for key, value in _tensors(trainer).items()
            }
        meta = json.dumps({"step": step, "source": trainer.source.state_dict()})
        self._pending = self._pool.submit(self._write, f"step-{step:08}", tensors, meta)

    def wait(self) -> None:
        """Returns when nothing is being written. Raises WriteError where that went wrong."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, name: str, tensors: dict[str, Tensor], meta: str) -> None:
        final, temporary = self.directory / name, self.directory / f".{name}.tmp"
        group, alone = dist.saving_group(), dist.world() == 1
        try:
            with writing(final), _plain_errors():
                if dist.is_main():
                    shutil.rmtree(temporary, ignore_errors=True)
                    temporary.mkdir(parents=True)
                    atomic_write(temporary / META, meta)
                dist.barrier(group)
                writer = FileSystemWriter(temporary)
                save(tensors, storage_writer=writer, process_group=group, no_dist=alone)
            if dist.is_main():
                with writing(final):
                    sync(temporary)
                    shutil.rmtree(final, ignore_errors=True)
                    os.replace(temporary, final)
                    sync(self.directory)
                for old in states(self.directory)[: -self.keep]:
                    shutil.rmtree(old, ignore_errors=True)
        finally:
            if dist.is_main():
                shutil.rmtree(temporary, ignore_errors=True)


def states(directory: Path) -> list[Path]:
    """The whole resume states of a directory, the oldest first."""
    return sorted(path for path in directory.glob("step-*") if (path / META).is_file())


def load_state(directory: Path, trainer: Trainer) -> int:
    """Put the last saved state, of any layout, back into `trainer`; its step, 0 without one."""
    found = dist.broadcast([str(path) for path in states(directory)])
    if not found:
        return 0
    path = Path(found[-1])
    meta = json.loads((path / META).read_text())
    reader = FileSystemReader(path)
    saved = reader.read_metadata().state_dict_metadata
    for parameter in trainer.trainable.values():
        trainer.optimizer.state[parameter] = empty_state(trainer.optimizer, parameter)
    tensors = _tensors(trainer)
    _check_layout(tensors, saved)
    tensors = {key: value for key, value in tensors.items() if key in saved}
    with _plain_errors():  # in place
        load(tensors, storage_reader=reader, no_dist=dist.world() == 1)
    if (random := tensors.get(f"rng.{dist.rank()}")) is not None:
        torch.set_rng_state(random)
    trainer.source.load_state_dict(meta["source"])
    return meta["step"]


def _check_layout(wanted: Iterable[str], saved: Iterable[str]) -> None:
    """Raises RunError where 8-bit moments are of other parts of the parameters."""
    ours, theirs = ({key for key in keys if ".scale." in key} for keys in (wanted, saved))
    if theirs and not ours <= theirs:
        raise RunError(
            "the resume state holds 8-bit moments of another number of processes, or of another "
            "train.parallel; go on as it was begun, or delete state/ to begin anew"
        )


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Parameters, moments and this process's random state, by name."""
    tensors: dict[str, Tensor] = {f"rng.{dist.rank()}": torch.get_rng_state()}
    place = f"{dist.rank()}-of-{dist.world()}"
    for key, parameter in trainer.trainable.items():
        tensors[f"model.{key}"] = parameter.detach()
        for field, value in trainer.optimizer.state.get(parameter, {}).items():
            local: Any = value.to_local() if isinstance(value, DTensor) else value
            if hasattr(local, "codes"):  # torchao's; its blocks are of this process's part
                tensors[f"optimizer.{field}.codes.{place}.{key}"] = local.codes
                tensors[f"optimizer.{field}.scale.{place}.{key}"] = local.scale
            else:
                tensors[f"optimizer.{field}.{key}"] = value
    return tensors


@contextmanager
def _plain_errors() -> Iterator[None]:
    """A checkpoint's error as its cause: an OSError, which `writing` explains, or a failure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as failed:
            causes = [cause for cause, _ in failed.failures.values()]
            for error in causes:  # on a full disk torch's zip writer raises an error of its own
                while error is not None and not isinstance(error, OSError):
                    error = error.__cause__ or error.__context__
                if error is not None:
                    raise OSError(error.errno, error.strerror or str(error)) from failed
            raise FailureError(f"the resume state failed: {causes[0]}") from failed
