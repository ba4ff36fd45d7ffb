"""Stage `data`: files and procedural tasks in, token files and a tokenizer out.

Files are read twice. The first pass finds what is broken and hashes every document; the documents
with the lowest hashes are held out, so that the split depends on no seed and no order, and equal
documents never stand on both sides. The second pass tokenises. Tasks bring their own split
(tasks.py). Nothing is shuffled here: the order of training is `Documents`' business.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tessera import dist
from tessera.data.batch import chunks, fill
from tessera.data.documents import WINDOW
from tessera.data.readers import Bad, DataError, Format, expand, read
from tessera.data.store import TokenWriter
from tessera.data.tasks import document, family
from tessera.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from tessera.progress import Progress
from tessera.run import Run

SPLITS = ("train", "heldout")
TOKENIZE_AT_ONCE = 512
FILL_LENGTH = 512  # the summary states the fill of rows this long


class BPE(BaseModel):
    """Train a byte-level BPE of `bpe` tokens on the training documents."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bpe: int = Field(ge=259)


class DataConfig(BaseModel):
    """What to read and how to cut it.

    tokenizer: "byte", { bpe = N } or a path; not given where the table names a `model`.
    end: what the last token of a document predicts; "none" lets it predict nothing.
    heldout: a share (0.02) or a number (100) of the documents, taken from the files (where there
    are no heldout_paths) and drawn anew for each task.
    max_bad: share of broken records that is quarantined; more of them stop the stage.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    paths: str | list[str] = []
    heldout_paths: str | list[str] = []
    tasks: dict[str, int] = {}
    format: Format = "auto"
    field: str = "text"
    separator: str = "<|endoftext|>"
    tokenizer: str | BPE | None = None
    bos: bool = True
    end: Literal["eos", "bos", "none"] = "eos"
    heldout: int | float = 0.02
    limit: int | None = Field(None, ge=1)
    max_bad: float = Field(0.01, ge=0, le=1)

    @field_validator("heldout")
    @classmethod
    def _share_or_number(cls, value: int | float) -> int | float:
        if value < 0 or (isinstance(value, float) and value >= 1):
            raise ValueError("give a share from 0.0 to below 1.0, or a whole number of documents")
        return value

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, value: dict[str, int]) -> dict[str, int]:
        for name, count in value.items():
            family(name)
            if count < 1:
                raise ValueError(f"{name} = {count}: give the number of documents, 1 or more")
        return value

    @model_validator(mode="after")
    def _something(self) -> DataConfig:
        if not self.paths and not self.tasks:
            raise ValueError(
                "nothing to read: set `paths` (files or globs) or `tasks` (as { calc = 1000 })"
            )
        return self

    @property
    def files(self) -> list[Path]:
        """All files these settings read. Raises DataError naming the paths that match nothing."""
        read_files = [*expand(_as_list(self.paths)), *expand(_as_list(self.heldout_paths))]
        named = isinstance(self.tokenizer, str) and self.tokenizer != "byte"
        return [*read_files, Path(self.tokenizer)] if named else read_files  # type: ignore[arg-type]

    def num_heldout(self, documents: int) -> int:
        """How many of so many documents are held out: at least one where any are asked for."""
        if isinstance(self.heldout, int):
            return self.heldout
        return max(1, round(self.heldout * documents)) if self.heldout else 0


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def key_of(text: str) -> int:
    """The 64-bit hash that decides a document's split."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class Corpus:
    """The good documents of some files, in order, at most `limit`; broken ones are kept aside."""

    def __init__(self, config: DataConfig, paths: str | list[str], limit: int | None) -> None:
        self.files = expand(_as_list(paths))
        self.bad: list[Bad] = []
        self._config, self._limit = config, limit
        self.keys = np.fromiter(map(key_of, self._texts(self.bad)), np.uint64)

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[str]:
        return self._texts([])

    def _texts(self, bad: list[Bad]) -> Iterator[str]:
        return itertools.islice(self._all_texts(bad), self._limit)

    def _all_texts(self, bad: list[Bad]) -> Iterator[str]:
        config = self._config
        for path in self.files:
            records = read(
                path, format=config.format, field=config.field, separator=config.separator
            )
            for record in records:
                if isinstance(record, Bad):
                    bad.append(record)
                elif record.text:
                    yield record.text


class Selection:
    """Every document with its split, in the order it is written."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.corpus = Corpus(config, config.paths, config.limit)
        self.own_heldout = Corpus(config, config.heldout_paths, None)
        self.tasks = [
            (name, split, count)
            for name, train in config.tasks.items()
            for split, count in zip(SPLITS, (train, config.num_heldout(train)), strict=True)
        ]

    @functools.cached_property
    def cut(self) -> int:
        """The highest hash held out; found when asked for, after what is broken is told."""
        if len(self.own_heldout):
            return -1
        return _cut(self.corpus.keys, self.config.num_heldout(len(self.corpus)))

    def __len__(self) -> int:
        drawn = sum(count for _, _, count in self.tasks)
        return len(self.corpus) + len(self.own_heldout) + drawn

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for text, key in zip(self.corpus, self.corpus.keys.tolist(), strict=True):
            yield ("heldout" if key <= self.cut else "train"), text
        for text in self.own_heldout:
            yield "heldout", text
        for name, split, count in self.tasks:
            # Held-out problems do not change with the seed: runs of several seeds compare.
            seed = self.seed if split == "train" else 0
            for index in range(count):
                yield split, document(name, seed, index, split)  # type: ignore[arg-type]

    def training_texts(self) -> Iterator[str]:
        """The training documents."""
        return (text for split, text in self if split == "train")


def _cut(keys: NDArray[np.uint64], count: int) -> int:
    """The highest hash that is held out; -1 for none. Equal documents stay together."""
    if count == 0 or len(keys) == 0:
        return -1
    if count >= len(keys):
        raise DataError(
            f"heldout asks for {count} of {len(keys)} documents and leaves none to train on"
        )
    cut = int(np.partition(keys, count - 1)[count - 1])
    if cut == int(keys.max()):
        raise DataError("the documents are all alike, so none can be held out; set heldout = 0")
    return cut


def quarantine(run: Run, corpora: Iterable[Corpus], max_bad: float) -> int:
    """Writes the broken records to quarantine.jsonl and returns their number.

    Raises DataError when they are more than `max_bad` of all records, and when nothing is left.
    """
    corpora = list(corpora)
    bad = [record for corpus in corpora for record in corpus.bad]
    total = len(bad) + sum(map(len, corpora))
    if bad:
        rows = [
            {"file": b.file, "line": b.line, "reason": b.reason, "excerpt": b.excerpt} for b in bad
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        run.write_file("quarantine.jsonl", lines)
    if len(bad) > max_bad * total:
        shown = "\n".join(f"  {record}" for record in bad[:5])
        raise DataError(
            f"{len(bad)} of {total} records are broken, more than max_bad = {max_bad:g} allows "
            f"(all are listed in {run.path / 'quarantine.jsonl'}):\n{shown}\n"
            "Repair them, or raise `max_bad`"
        )
    for corpus in corpora:
        if corpus.files and not len(corpus):
            names = ", ".join(map(str, corpus.files[:3]))
            raise DataError(f"no document in {names}: every record is empty")
    return len(bad)


def choose_tokenizer(config: DataConfig, model: Path | None, selection: Selection) -> Tokenizer:
    """The model's tokenizer, or what the table asks for."""
    wanted = config.tokenizer
    if (model is None) == (wanted is None):
        raise DataError(
            'set `tokenizer` ("byte", { bpe = 1024 } or a path) or `model` (the run or directory '
            f"whose tokenizer to take); {'neither is' if model is None else 'both are'} set"
        )
    if isinstance(wanted, BPE):
        return train_bpe(selection.training_texts(), wanted.bpe)
    if wanted == "byte":
        return byte_tokenizer()
    return load_tokenizer(model or str(wanted))


def end_of(config: DataConfig, tokenizer: Tokenizer) -> list[int]:
    """The ids that follow the last token of every document: one or none."""
    ids = {"eos": tokenizer.eos_ids[:1], "bos": (tokenizer.bos_id,), "none": ()}[config.end]
    missing = config.end != "none" and (not ids or ids[0] is None)
    if missing or (config.bos and tokenizer.bos_id is None):
        key = f'end = "{config.end}"' if missing else "bos = true"
        raise DataError(
            f"{key}: the tokenizer names no such token (beginning: {tokenizer.bos_id}, ends: "
            f'{tokenizer.eos_ids}); set bos = false or end = "none", or name the tokens in its '
            "tokenizer_config.json"
        )
    return [i for i in ids if i is not None]


def write_splits(run: Run, selection: Selection, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Tokenises everything into tokens/ and returns a row of figures for each split."""
    config, end = selection.config, end_of(selection.config, tokenizer)
    directory, size = run.path / "tokens", tokenizer.vocab_size
    counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    source = iter(selection)
    with (
        TokenWriter(directory, "train", size) as train,
        TokenWriter(directory, "heldout", size) as heldout,
        Progress("tokenising", len(selection), "tokens", quiet=run.quiet) as bar,
    ):
        writers = {"train": train, "heldout": heldout}
        while portion := list(itertools.islice(source, TOKENIZE_AT_ONCE)):
            encoded = tokenizer.encode_batch([text for _, text in portion], bos=config.bos)
            for (split, text), ids in zip(portion, encoded, strict=True):
                count_document(counts[split], text, ids, config.bos)
                if len(ids) + len(end) > 1:
                    writers[split].add(ids + end)
            bar.advance(len(portion), sum(map(len, encoded)))
        return [
            {"split": split, **figures(counts[split], writers[split].finish())} for split in SPLITS
        ]


def count_document(counts: Counter[str], text: str, ids: list[int], bos: bool) -> None:
    """Adds one document's bytes and ids (specials not counted)."""
    counts["bytes"] += len(text.encode())
    counts["ids"] += len(ids) - bos


def figures(counts: Mapping[str, int], offsets: NDArray[np.int64]) -> dict[str, Any]:
    """What the summary says of one split."""
    lengths = np.diff(offsets)
    window = lengths[:WINDOW].tolist()
    pieces = [b - a - 1 for n in window for a, b in chunks(n, FILL_LENGTH)]
    return {
        "documents": len(lengths),
        "tokens": int(offsets[-1]),
        "bytes": counts["bytes"],
        "bytes_per_token": round(counts["bytes"] / max(1, counts["ids"]), 4),
        "longest": int(lengths.max(initial=0)),
        f"fill_{FILL_LENGTH}": round(fill(pieces, FILL_LENGTH), 4),
    }


def stage(config: DataConfig, run: Run, inputs: Mapping[str, Path | None]) -> None:
    """Stage `data`: writes tokens/, tokenizer/, tables/summary.jsonl and tables/data.json."""
    if not dist.is_main():
        return  # the others wait at the end of the stage
    files, drawn = len(config.files), sum(config.tasks.values())
    what = [f"reading {files} file{'s' * (files > 1)}"] if files else []
    run.say(" and ".join(what + ([f"drawing {drawn:,} problems"] if drawn else [])))
    selection = Selection(config, run.seed)
    broken = quarantine(run, (selection.corpus, selection.own_heldout), config.max_bad)
    tokenizer = choose_tokenizer(config, inputs.get("model"), selection)
    rows = write_splits(run, selection, tokenizer)
    if not rows[0]["documents"]:
        raise DataError("no document has two tokens, so there is nothing to predict")
    tokenizer.save(run.path / "tokenizer")
    seen = np.isin(selection.own_heldout.keys, selection.corpus.keys)
    described = {
        "splits": list(SPLITS),
        "vocab_size": tokenizer.vocab_size,
        "pad_id": tokenizer.pad_id,
        "bos": config.bos,
        "end": config.end,
        "quarantined": broken,
        "heldout_seen_in_train": int(seen.sum()),
    }
    run.write_table("summary", rows)
    run.write_json("data", described)
    for row in rows:
        run.say(
            f"{row['split']}: {row['documents']:,} documents, {row['tokens']:,} tokens of "
            f"{row['bytes_per_token']:.2f} bytes, longest {row['longest']:,}"
        )
