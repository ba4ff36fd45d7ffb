"""JSON lines made Parquet: one schema for all files, absent keys as nulls.

`readers.py` takes the nulls away again, so both formats give the same rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessera.data.readers import DataError
from tessera.runs.files import sync, writing

if TYPE_CHECKING:
    import pyarrow

ROWS = 4096  # of a row group, all that is in memory at once


def convert(sources: Sequence[Path]) -> list[Path]:
    """Puts FILE.parquet in the place of every FILE.jsonl; killed at any moment, it can be repeated.

    Raises DataError, the lines untouched, where no columns hold the rows: a key with values of
    several types, objects that are always empty.
    """
    import pyarrow

    made = [path.with_suffix(".parquet") for path in sources]
    if not all(path.is_file() for path in made):
        try:
            schema = _schema(sources)
            for source, target in zip(sources, made, strict=True):
                _write(source, target, schema)
        except pyarrow.ArrowException as error:
            for path in made:
                path.unlink(missing_ok=True)
                _temporary(path).unlink(missing_ok=True)
            raise DataError(
                f"Parquet has no columns for these rows, one type and some keys each ({error}); "
                'leave that key out of the sources, or write format = "jsonl"'
            ) from None
    for source in sources:
        source.unlink()
    return made


def _schema(sources: Sequence[Path]) -> pyarrow.Schema:
    """A schema that every row fits. pyarrow takes a table's columns from its first row."""
    import pyarrow

    found = pyarrow.schema([])
    for rows in (batch for source in sources for batch in _batches(source)):
        keys = dict.fromkeys(key for row in rows for key in row)
        schema = pyarrow.Table.from_pylist([dict.fromkeys(keys), *rows]).schema
        found = pyarrow.unify_schemas([found, schema], promote_options="permissive")
    return found


def _write(source: Path, target: Path, schema: pyarrow.Schema) -> None:
    import pyarrow
    from pyarrow import parquet

    temporary = _temporary(target)
    with writing(target):
        with parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for rows in _batches(source):
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
        sync(temporary)
        temporary.replace(target)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp")


def _batches(source: Path) -> Iterator[list[dict[str, Any]]]:
    with source.open(encoding="utf-8") as lines:
        rows = (json.loads(line) for line in lines)
        while batch := list(islice(rows, ROWS)):
            yield batch
