"""Hugging Face datasets as documents; the only file that imports the `datasets` library.

What `save_to_disk` wrote and what the hub has is memory-mapped; data files of a directory, and with
a `limit` what the hub has, are streamed.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessera.data.readers import Bad, DataError, Record, content_hash

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
ROWS_AT_ONCE = 512
SAVED = ("dataset_dict.json", "state.json")  # what tells a directory of `save_to_disk`


@dataclass(frozen=True, slots=True)
class DatasetPart:
    """Which rows; field: the column of the text, None where whole rows are read."""

    name: str
    subset: str | None
    split: str
    revision: str | None
    field: str | None
    stream: bool

    @property
    def label(self) -> str:
        return ":".join(part for part in (self.name, self.subset, self.split) if part)


def local_dataset(name: str) -> Path | None:
    """The directory a dataset's name means, None for a hub id.

    Raises DataError for what is neither, and where the library is not installed.
    """
    if importlib.util.find_spec("datasets") is None:
        raise DataError(
            f"dataset = \"{name}\" needs the `datasets` library: pip install 'tessera[datasets]'. "
            "Parquet and JSONL files are read without it: name them in `paths`"
        )
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise DataError(f'dataset = "{name}" is a file; name it in `paths` instead')
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, there, n=1)
        hint = f'; nearest there: "{near[0]}"' if near else ""
        raise DataError(f'dataset = "{name}" is neither a directory nor a hub id{hint}')
    return None


def dataset_identity(part: DatasetPart) -> list[Any]:
    """What tells the content apart: a directory's files by hash, a hub dataset by its commit."""
    which = [part.subset, part.split, part.field]
    home = local_dataset(part.name)
    if home:
        files = sorted(path for path in home.rglob("*") if path.is_file())
        return [*which, [[str(path.relative_to(home)), content_hash(path)] for path in files]]
    import datasets

    with _opening(part):
        builder = datasets.load_dataset_builder(part.name, part.subset, revision=part.revision)
    return [*which, part.name, builder.config.name, builder.hash]


def dataset_stamp(part: DatasetPart) -> list[Any]:
    """Sizes and times of a directory's files; what a commit of the hub holds does not change."""
    home = local_dataset(part.name)
    files = sorted(path for path in home.rglob("*") if path.is_file()) if home else []
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def read_dataset(part: DatasetPart) -> Iterator[Record[str] | Bad]:
    """The texts of a split in order, and its rows without one, numbered from 1."""
    assert part.field is not None
    rows, number = _opened(part), 0
    if rows.features is not None:
        _check_column(part, rows.features)
    for batch in _batches(part, rows):
        if part.field not in batch:  # a stream of unknown columns tells them with its rows
            _check_column(part, batch)
        for value in batch[part.field]:
            number += 1
            if isinstance(value, str):
                yield Record(value)
            else:
                reason = "null" if value is None else f"a {type(value).__name__}, not text"
                yield Bad(part.label, number, reason, repr(value)[:200] if value else "")


def _check_column(part: DatasetPart, columns: Mapping[str, Any]) -> None:
    if part.field is None or part.field not in columns:
        raise DataError(
            f'{part.label} has no column "{part.field}"; it has: {", ".join(columns)}. '
            "Set `field` to the one that holds the text"
        )
    column = columns[part.field]
    kind = getattr(column, "dtype", None) or type(column).__name__
    if kind not in ("string", "large_string", "null"):
        raise DataError(
            f'{part.label}: column "{part.field}" holds {kind}, not text; choose another `field`'
        )


def read_dataset_rows(part: DatasetPart) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a split in order, numbered from 1, as objects; absent values are None."""
    number = 0
    for batch in _batches(part, _opened(part)):
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield number, dict(zip(batch, values, strict=True))


def _batches(part: DatasetPart, rows: Dataset | IterableDataset) -> Iterator[dict[str, list[Any]]]:
    """Some rows at a time, by column. Raises DataError for what decoding or fetching has met."""
    number = 0
    batches = rows.iter(batch_size=ROWS_AT_ONCE)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # the library raises its own, Arrow's and fsspec's errors
            raise DataError(f"{part.label} cannot be read after row {number}: {error}") from error
        if batch is None:
            return
        found = dict(batch)
        number += len(next(iter(found.values()), []))
        yield found


def _opened(part: DatasetPart) -> Dataset | IterableDataset:
    import datasets

    home = local_dataset(part.name)
    with _opening(part):
        if not home or not any((home / name).is_file() for name in SAVED):
            return datasets.load_dataset(
                str(home or part.name),
                part.subset,
                split=part.split,
                revision=part.revision,
                streaming=part.stream or home is not None,
            )
        saved: Any = datasets.load_from_disk(str(home))
    found = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    if part.split not in found:
        has = ", ".join(found)
        raise DataError(f'{part.name} has no split "{part.split}"; it has: {has}. Set `split`')
    return found[part.split]


@contextmanager
def _opening(part: DatasetPart) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library raises its own, requests' and fsspec's errors
        said = str(error).strip().split("\n")[0]
        raise DataError(
            f"the dataset {part.label} cannot be opened: {type(error).__name__}: {said}. "
            "Check `dataset`, `subset`, `split` and `revision`, and the network for a hub id"
        ) from error
