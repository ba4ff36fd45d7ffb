"""How the groups of a rollout are shared by processes, and kept on disk until no step needs them.

    prompt g of a rollout   update g mod U,  process ⌊g / U⌋ mod P

So the processes of an update have equally many, and which prompts feed it does not depend on how
many processes there are. A process's groups are a file that says by how many it was one of, so that
any number of processes can go on from the files of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from tessera.rl.experience import Group
from tessera.runs.files import atomic_write
from tessera.train.parallel import Layout

T = TypeVar("T")


def share(items: Sequence[T], updates: int, rank: int, world: int) -> list[T]:
    """What one of `world` processes has of a rollout's items, which feed `updates` updates."""
    return [one for place, one in enumerate(items) if place // updates % world == rank]


def joined(shares: Sequence[Sequence[T]], updates: int) -> list[T]:
    """The inverse of `share`: a rollout's items from the shares of all processes, in order."""
    longest = max(map(len, shares), default=0)
    return [
        one
        for start in range(0, longest, updates)
        for own in shares
        for one in own[start : start + updates]
    ]


class Shares:
    """The files of a run's rollouts, in `directory`."""

    def __init__(self, directory: Path, updates: int, layout: Layout) -> None:
        self.directory, self.updates, self.layout = directory, updates, layout

    def own(self, items: Sequence[T]) -> list[T]:
        """This process's part of what a rollout holds."""
        return share(items, self.updates, self.layout.data_rank, self.layout.data_world)

    def keep(self, rollout: int, groups: Sequence[Group]) -> None:
        """Writes this process's groups, whole or not at all."""
        self.directory.mkdir(exist_ok=True)
        atomic_write(self._own(rollout), "".join(group.to_json() + "\n" for group in groups))

    def read(self, rollout: int) -> list[Group]:
        """This process's groups."""
        assert self._own(rollout).is_file(), f"rollout {rollout} is gone, and so are its weights"
        return _read(self._own(rollout))

    def take_over(self, rollout: int, world: int) -> None:
        """Keeps this process's part of what `world` processes kept, if that is another number."""
        files = [self._path(rollout, rank, world) for rank in range(world)]
        if world != self.layout.data_world and all(file.is_file() for file in files):
            self.keep(rollout, self.own(joined([_read(file) for file in files], self.updates)))

    def forget(self, before: int) -> None:
        """Removes what was kept of the rollouts before one, by however many processes."""
        for file in self.directory.glob("*-*-of-*.jsonl"):
            rollout, rank = map(int, file.name.split("-")[:2])
            if rollout < before and rank % self.layout.data_world == self.layout.data_rank:
                file.unlink(missing_ok=True)

    def _own(self, rollout: int) -> Path:
        return self._path(rollout, self.layout.data_rank, self.layout.data_world)

    def _path(self, rollout: int, rank: int, world: int) -> Path:
        return self.directory / f"{rollout:08}-{rank}-of-{world}.jsonl"


def _read(file: Path) -> list[Group]:
    lines = file.read_text(encoding="utf-8").split("\n")
    return [Group.from_json(line) for line in lines if line]
