"""Hugging Face datasets as documents; the only file that imports the `datasets` library.

A dataset is a hub id or a directory: what `save_to_disk` wrote is memory-mapped, data files
(Parquet, JSONL, ...) are streamed. One from the hub is downloaded once into the library's own
cache and memory-mapped; with a `limit` it is streamed and only that much is fetched. A row without
text is `Bad`, like a broken line of a file.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterator
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
    """Which rows: a dataset's configuration and split at a revision, and the column of the text.

    field: None where whole rows are read.
    """

    name: str
    subset: str | None
    split: str
    revision: str | None
    field: str | None
    stream: bool

    @property
    def label(self) -> str:
        """How messages call it."""
        return ":".join(part for part in (self.name, self.subset, self.split) if part)


def local_dataset(name: str) -> Path | None:
    """The directory a dataset's name means, None for a hub id.

    Raises DataError for what is neither, and where the library is not installed.
    """
    if importlib.util.find_spec("datasets") is None:
        raise DataError(
            f'dataset = "{name}" needs the `datasets` library, which is not installed: '
            "pip install 'tessera[datasets]'. Parquet and JSONL files are read without it: name "
            "them in `paths`"
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

    try:
        builder = datasets.load_dataset_builder(part.name, part.subset, revision=part.revision)
    except Exception as error:  # the library raises its own, requests' and fsspec's errors
        raise _refusal(part, error) from error
    return [*which, part.name, builder.config.name, builder.hash]


def dataset_stamp(part: DatasetPart) -> list[Any]:
    """Sizes and times of a directory's files; what a commit of the hub holds does not change."""
    home = local_dataset(part.name)
    files = sorted(path for path in home.rglob("*") if path.is_file()) if home else []
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def read_dataset(part: DatasetPart) -> Iterator[Record[str] | Bad]:
    """The texts of a split in order, and its rows without one, numbered from 1."""
    assert part.field is not None
    rows = _opened(part)
    _check_column(part, rows)
    number = 0
    for batch in _batches(part, rows):
        if part.field not in batch:  # a stream of unknown columns tells them with its rows
            raise _no_column(part, list(batch))
        for value in batch[part.field]:
            number += 1
            if isinstance(value, str):
                yield Record(value)
            else:
                reason = "null" if value is None else f"a {type(value).__name__}, not text"
                yield Bad(part.label, number, reason, repr(value)[:200] if value else "")


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
    try:
        if home and any((home / name).is_file() for name in SAVED):
            return _saved(part, datasets.load_from_disk(str(home)))
        return datasets.load_dataset(
            str(home or part.name),
            part.subset,
            split=part.split,
            revision=part.revision,
            streaming=part.stream or home is not None,
        )
    except DataError:
        raise
    except Exception as error:  # the library raises its own, requests' and fsspec's errors
        raise _refusal(part, error) from error


def _saved(part: DatasetPart, saved: Any) -> Dataset:
    """The split of what `save_to_disk` wrote: several by name, or one, `train` if without."""
    here = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    if part.split not in here:
        raise DataError(
            f'{part.name} has no split "{part.split}"; it has: {", ".join(here)}. Set `split`'
        )
    return here[part.split]


def _check_column(part: DatasetPart, rows: Dataset | IterableDataset) -> None:
    features = rows.features
    if features is None:
        return
    if part.field not in features:
        raise _no_column(part, list(features))
    kind = getattr(features[part.field], "dtype", None) or type(features[part.field]).__name__
    if kind not in ("string", "large_string", "null"):
        raise DataError(
            f'{part.label}: column "{part.field}" holds {kind}, not text; choose another `field`'
        )


def _no_column(part: DatasetPart, columns: list[str]) -> DataError:
    return DataError(
        f'{part.label} has no column "{part.field}"; it has: {", ".join(columns)}. '
        "Set `field` to the one that holds the text"
    )


def _refusal(part: DatasetPart, error: Exception) -> DataError:
    said = str(error).strip().split("\n")[0]
    return DataError(
        f"the dataset {part.label} cannot be opened: {type(error).__name__}: {said}. "
        "Check `dataset`, `subset`, `split` and `revision`, and the network for a hub id"
    )
