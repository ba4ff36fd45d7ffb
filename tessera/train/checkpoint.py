"""Resume states: torch's distributed checkpoints, written beside training, whole or not at all.

    state/step-00000120/   __0_0.distcp …   a file a process: its part of parameters and moments
                           .metadata        which part is where, so that any number may read them
                           trainer.json     the step and the source's position

A state is copied when the step ends and written by a thread while training goes on: into the run's
directory, or to any storage that fsspec knows. A CPU copies nothing and waits for the run's
directory. `trainer.json` is written when every process has written its part; a state without it is
none. Only then older ones go.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from fsspec.core import url_to_fs
from torch import Tensor
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from tessera import dist
from tessera.runs.files import FailureError, RunError, WriteError, atomic_write, sync, writing
from tessera.train.optim import empty_state

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from tessera.train.engine import Trainer

META = "trainer.json"


class States:
    """The resume states of one training: in a directory (a Path), or at an fsspec address."""

    def __init__(self, place: Path | str) -> None:
        self.place, self.local = str(place), isinstance(place, Path)

    @functools.cached_property
    def _fs(self) -> AbstractFileSystem:
        return url_to_fs(self.place)[0]

    def part(self, number: int) -> States:
        place = f"{self.place}/part-{number}"
        return States(Path(place) if self.local else place)

    def whole(self) -> list[str]:
        """The names of those that were written to their end, the oldest first."""
        with self._told("read"):
            return [name for name in self._names() if self._fs.exists(self._at(name, META))]

    def _names(self) -> list[str]:
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self.place, detail=False)
        except FileNotFoundError:
            return []
        names = (one.rstrip("/").rpartition("/")[2] for one in found)
        return sorted(name for name in names if name.startswith("step-"))

    def read(self, name: str, tensors: Callable[[Mapping[str, Any]], dict[str, Tensor]]) -> Any:
        """What `save` was given as meta, as values; tensors: those to fill, of the names saved."""
        with self._told("read"), _plain_errors():
            reader = (FileSystemReader if self.local else FsspecReader)(self._at(name))
            wanted = tensors(reader.read_metadata().state_dict_metadata)
            load(wanted, storage_reader=reader, no_dist=True)  # each process its own
            return json.loads(self._fs.cat_file(self._at(name, META)))

    def save(self, name: str, tensors: dict[str, Tensor], meta: str, keep: int) -> None:
        """Write a state and remove all but the last `keep` whole ones. Every process calls this.

        Raises WriteError; no half of it is left then, and the others are intact.
        """
        group, alone = dist.saving_group(), dist.world() == 1
        try:
            with self._told("write"), _plain_errors():
                if dist.is_main():
                    self.remove(name)
                dist.barrier(group)
                writer = (
                    FileSystemWriter(self._at(name))
                    if self.local
                    else FsspecWriter(self._at(name), sync_files=False)
                )
                save(tensors, storage_writer=writer, process_group=group, no_dist=alone)
                if dist.is_main():
                    self._finish(name, meta)
                    kept = self.whole()[-keep:]
                    for old in self._names():
                        if old not in kept:
                            self.remove(old)
        except BaseException:
            if dist.is_main():
                with contextlib.suppress(Exception):
                    self.remove(name)
            raise

    def _finish(self, name: str, meta: str) -> None:
        if self.local:
            sync(Path(self._at(name)), Path(self.place))
            atomic_write(Path(self._at(name, META)), meta)
        else:
            self._fs.pipe_file(self._at(name, META), meta.encode())

    def remove(self, name: str = "") -> None:
        """Delete one state, or all of them."""
        self._fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name, META))  # first, so that a part is never a whole
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._at(name) if name else self.place, recursive=True)

    def _at(self, *names: str) -> str:
        return "/".join((self.place, *names))

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Storage that refuses, or cannot be reached, is one sentence."""
        try:
            with writing(Path(self.place)) if self.local and what == "write" else nullcontext():
                yield
        except Exception as error:  # each kind of storage raises its own
            if self.local or isinstance(error, RunError):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise WriteError(
                f"could not {what} the resume states at {self.place}: {reason}. Those that are "
                "there are intact; run the same command again when the storage can be reached"
            ) from error


LEAST = 60.0  # seconds between two states
COPYING, WRITING = 0.05, 0.25  # of the time, at most


class Saver:
    """Writes resume states, one at a time, keeping the last `keep` of them.

    seconds: from one to the next. Unless given, a minute, or so much longer that what training
    waits for, copying or writing, is 5 % of the time, and writing, which loads the storage, 25 %.
    """

    def __init__(self, states: States, keep: int = 1, seconds: float | None = None) -> None:
        self.states, self.keep, self.seconds = states, keep, seconds
        self.copying = self.writing = 0.0  # seconds that the last one took
        self._saved = time.monotonic()
        self._pool = ThreadPoolExecutor(1, "resume-state")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._pool.shutdown()
        if error is None:  # else the first error is the one to raise
            self.wait()

    def due(self) -> bool:
        """Whether it is time for the next one."""
        waited = time.monotonic() - self._saved
        if self.seconds is not None:
            return waited > self.seconds
        idle = self._pending is None or self._pending.done()
        return idle and waited > max(LEAST, self.copying / COPYING, self.writing / WRITING)

    def save(self, step: int, trainer: Trainer) -> None:
        """Begin to write the state after `step` steps, copied or written before this returns.

        Raises WriteError where the one before could not be written.
        """
        self.wait()
        begun = time.monotonic()
        tensors = _tensors(trainer)
        # A copy would add three quarters to the memory of what is trained, so that training goes on
        # meanwhile; here the writer would take its cores.
        in_place = self.states.local and dist.device().type == dist.HOST
        if not in_place:
            with torch.no_grad():
                tensors = {
                    key: value.clone() if value.device.type == dist.HOST else value.to(dist.HOST)
                    for key, value in tensors.items()
                }
        meta = json.dumps({"step": step, "source": trainer.source.state_dict()})
        self._pending = self._pool.submit(self._write, f"step-{step:08}", tensors, meta)
        if in_place:
            wait([self._pending])
        self._saved = time.monotonic()
        self.copying = self._saved - begun

    def wait(self) -> None:
        """Returns when nothing is being written. Raises WriteError where that went wrong."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, name: str, tensors: dict[str, Tensor], meta: str) -> None:
        begun = time.monotonic()
        self.states.save(name, tensors, meta, self.keep)
        self.writing = time.monotonic() - begun


def load_state(states: States, trainer: Trainer) -> int:
    """Put the last saved state, of any layout, back into `trainer`; its step, 0 without one."""
    found = dist.broadcast(states.whole())
    if not found:
        return 0
    for parameter in trainer.trainable.values():
        trainer.optimizer.state[parameter] = empty_state(trainer.optimizer, parameter)
    tensors = _tensors(trainer)

    def wanted(saved: Mapping[str, Any]) -> dict[str, Tensor]:
        _check_layout(tensors, saved)
        return {key: value for key, value in tensors.items() if key in saved}

    meta = states.read(found[-1], wanted)  # in place
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
