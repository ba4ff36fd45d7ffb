"""Prompts with what follows them: documents of which only the completion is trained.

Rows hold `prompt` and `completion`, as TRL's prompt-completion sets do. In a small model trained
from scratch, what nobody can predict (the question) drowns what is to be learned (the answer): the
toy of recipes/sft-toy.toml learns in 500 steps what took it 1,500 on whole documents.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tessera.data.dataset import DatasetPart, read_dataset_rows
from tessera.data.readers import EXCERPT, Bad, Text, read_rows

COMPLETION_FORMAT = "completion-1"  # of what stands in the cache


def file_records(path: Path) -> Iterator[Text | Bad]:
    """The pairs of a file of JSON lines, a JSON list or Parquet."""
    return _pairs(str(path), read_rows(path))


def dataset_records(part: DatasetPart) -> Iterator[Text | Bad]:
    """The pairs of a Hugging Face dataset."""
    return _pairs(part.label, read_dataset_rows(part))


def _pairs(label: str, rows: Iterable[tuple[int, Any]]) -> Iterator[Text | Bad]:
    for number, row in rows:
        if isinstance(row, Bad):
            yield row
            continue
        match row:
            case {"prompt": str(prompt), "completion": str(completion)} if completion:
                yield Text(as_text(prompt, completion), key=prompt, line=number)
            case _:
                told = json.dumps(row, default=str)[:EXCERPT]
                yield Bad(label, number, "no texts `prompt` and `completion`", told)


def as_text(prompt: str, completion: str) -> str:
    """A pair as a document of a source."""
    return json.dumps([prompt, completion], ensure_ascii=False)


def spoken(text: str) -> str:
    """The whole text of a pair, for a tokenizer to be trained on."""
    return "".join(json.loads(text))
