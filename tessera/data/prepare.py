"""Stage `data`: sources in, token files and a tokenizer out.

tokens/train.npy, tokens/heldout.npy            one source (store.py)
tokens/NAME/train.npy, tokens/NAME/heldout.npy  several, with their weights in tables/data.json
quarantine.jsonl                                broken records: source, file, line, reason
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera import dist
from tessera.data.batch import chunks, fill
from tessera.data.chat import ChatEncoder
from tessera.data.config import BPE, DataConfig, Reading, unsaid
from tessera.data.dataset import local_dataset
from tessera.data.documents import WINDOW
from tessera.data.encode import Encoder, Portion
from tessera.data.problems import SPLITS, Split
from tessera.data.readers import Bad, DataError
from tessera.data.sources import Source
from tessera.data.store import TokenCache, TokenWriter
from tessera.data.switch import NONE, record_switch, switches_of
from tessera.data.template import RUN_DATE, template_of
from tessera.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from tessera.progress import Progress
from tessera.runs.files import writing
from tessera.runs.run import Run

CACHE = ".tokens"
FILL_LENGTH = 512  # the summary states the fill of rows this long
SHOWN_BAD = 5


def quarantine(run: Run, sources: Sequence[Source], max_bad: float) -> None:
    """Writes the broken records to quarantine.jsonl.

    Raises DataError when they are more than `max_bad` of a source's, and when nothing is left.
    """
    path = run.path / "quarantine.jsonl"
    if any(source.num_bad for source in sources):
        part = path.with_name(f".{path.name}.tmp")
        with writing(path), part.open("w", encoding="utf-8") as file:
            for source in sources:
                named = {"source": source.name} if source.name else {}
                for record in source.broken():
                    row = {"file": record.file, "line": record.line, "reason": record.reason}
                    row = {**named, **row, "excerpt": record.excerpt}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            os.replace(part, path)
    for source in sources:
        total = sum(one.records for one in source.entries)
        if source.num_bad > max_bad * total:
            shown = "\n".join(f"  {bad}" for bad in itertools.islice(source.broken(), SHOWN_BAD))
            raise DataError(
                f"{source.where}{source.num_bad} of {total} records are broken, more than max_bad "
                f"= {max_bad:g} allows (all are listed in {path}):\n{shown}\nRepair them, or raise "
                "`max_bad`"
            )
        for entries in (source.corpus, source.own_heldout):
            if entries and not any(len(one.keys) for one in entries):
                names = ", ".join(one.unit.label for one in entries[:3])
                raise DataError(f"{source.where}no document in {names}: every record is empty")


def choose_tokenizer(
    config: DataConfig, model: Path | None, sources: Sequence[Source]
) -> Tokenizer:
    """The model's tokenizer, or what the table asks for."""
    wanted = config.tokenizer
    if (model is None) == (wanted is None):
        raise DataError(
            'set `tokenizer` ("byte", { bpe = 1024 } or a path) or `model` (the run or directory '
            f"whose tokenizer to take); {'neither is' if model is None else 'both are'} set"
        )
    if isinstance(wanted, BPE):
        texts = itertools.chain.from_iterable(source.training_texts() for source in sources)
        return train_bpe(texts, wanted.bpe, wanted.tokens, chat=wanted.chat)
    if wanted == "byte":
        return byte_tokenizer()
    return load_tokenizer(model or str(wanted))


def encoder_of(config: DataConfig, reading: Reading, tokenizer: Tokenizer) -> Encoder:
    """How a source's records become ids."""
    if reading.chats:
        chats = ChatEncoder.of(tokenizer, reading.turns, reading.switch)
        return Encoder(tokenizer, chats=chats, masked=True)
    bos, ends = tokenizer.bos_id, tokenizer.eos_ids
    end = {"eos": ends[:1], "bos": () if bos is None else (bos,), "none": ()}[config.end]
    missing = config.end != "none" and not end
    if missing or (config.bos and bos is None):
        key = f'end = "{config.end}"' if missing else "bos = true"
        raise DataError(
            f"{key}: the tokenizer names no such token (beginning: {bos}, ends: {ends}); leave bos "
            'out or set end = "none", or name the tokens in its tokenizer_config.json'
        )
    return Encoder(tokenizer, tokenizer.beginning(config.bos), end, masked=reading.masked)


class SplitWriter:
    """The token files of one split, and what the summary says of them."""

    def __init__(self, stack: ExitStack, directory: Path, split: Split, encoder: Encoder) -> None:
        self.split, self.encoder = split, encoder
        self.bytes = self.own_ids = self.num_trained = 0
        size = encoder.tokenizer.vocab_size
        self.writer = stack.enter_context(TokenWriter(directory, split, size, encoder.masked))

    def add(self, portion: Portion, chosen: NDArray[np.bool_] | None = None) -> None:
        """Adds the chosen documents, all unless given, but those that hold no prediction."""
        lengths, ids, trained = portion.lengths, portion.ids, portion.trained
        chosen = np.ones(len(lengths), bool) if chosen is None else chosen
        self.bytes += int(portion.sizes[chosen].sum())
        specials = len(self.encoder.begin) + len(self.encoder.end)  # ids that are not of a text
        self.own_ids += int((lengths[chosen] - specials).sum())
        kept = chosen & (lengths > 1)
        if not kept.all():
            inside = np.repeat(kept, lengths)
            lengths, ids = lengths[kept], ids[inside]
            trained = None if trained is None else trained[inside]
        self.writer.add(ids, lengths, trained)
        if trained is not None:
            self.num_trained += int(np.count_nonzero(trained))

    def finish(self) -> dict[str, Any]:
        lengths = np.diff(self.writer.finish())
        pieces = [b - a - 1 for n in lengths[:WINDOW].tolist() for a, b in chunks(n, FILL_LENGTH)]
        row = {"split": self.split, "documents": len(lengths), "tokens": int(lengths.sum())}
        if not self.encoder.masked:
            per_token = round(self.bytes / max(1, self.own_ids), 4)
            row |= {"bytes": self.bytes, "bytes_per_token": per_token}
        row |= {"longest": int(lengths.max(initial=0))}
        row |= {f"fill_{FILL_LENGTH}": round(fill(pieces, FILL_LENGTH), 4)}
        return row if not self.encoder.masked else {**row, "trained": self.num_trained}


def write_sources(
    run: Run,
    sources: Sequence[Source],
    encoders: Sequence[Encoder],
    config: DataConfig,
    bar: Progress,
) -> list[dict[str, Any]]:
    """Writes tokens/; returns a row of figures for each source and split.

    weight: the share of the trained tokens. repeats_after: tokens of the whole mix after which
    the source begins anew.
    """
    rows = []
    for source, encoder in zip(sources, encoders, strict=True):
        with ExitStack() as stack:
            home = run.path / "tokens" / source.name
            train, heldout = (SplitWriter(stack, home, split, encoder) for split in SPLITS)
            for entry in source.corpus:
                held = source.is_heldout(entry.keys)
                for portion in entry.portions():
                    train.add(portion, ~held[portion.origin])
                    heldout.add(portion, held[portion.origin])
            for portion in itertools.chain(*(one.portions() for one in source.own_heldout)):
                heldout.add(portion)
            for task, split, count in source.tasks:
                for portion in encoder.portions(source.problems(task, split, count)):
                    (train if split == "train" else heldout).add(portion)
                    bar.advance(0, len(portion.ids))
                    source.refused += [Bad(task, i + 1, why, "") for i, why in portion.refused]
                bar.advance(1, 0)
            trained, held_out = train.finish(), heldout.finish()
        if not trained["documents"]:
            raise DataError(f"{source.where}no document has two tokens: nothing to predict")
        if not source.name:
            return [trained, held_out]
        share = config.shares[source.name]
        more = {"weight": round(share, 6), "repeats_after": round(trained["tokens"] / share)}
        rows += [{"source": source.name, **trained, **more}, {"source": source.name, **held_out}]
    return rows


def seen_in_train(sources: Sequence[Source]) -> int:
    """Held-out documents that some source also trains on, counted by their hashes."""
    seen = 0
    held = [source.heldout_keys() for source in sources]
    for source in sources:
        train = source.keys[~source.is_heldout(source.keys)]
        seen += sum(int(np.isin(keys, train).sum()) for keys in held)
    return seen


def say_beginning(run: Run, readings: Mapping[str, Reading]) -> None:
    """What is going to be read."""
    inputs = sum(len(one.inputs()) for one in readings.values())
    named = [one.dataset for one in readings.values() if one.dataset]
    hub = [name for name in named if local_dataset(name) is None]
    drawn = sum(sum(one.tasks.values()) for one in readings.values())
    what = [f"reading {inputs} file{'s' * (inputs > 1)}"] if inputs else []
    what += [f"fetching {', '.join(hub)}"] if hub else []
    what += [f"drawing {drawn:,} problems"] if drawn else []
    run.say(" and ".join(what))


def say_unsaid(run: Run, where: str, reading: Reading, chats: ChatEncoder | None) -> None:
    """A warning where rows say how to think and nothing tells the model."""
    if chats is not None and chats.switch == NONE and (lacking := unsaid(reading)):
        run.say(f"{where}warning: {lacking}")


def say_rows(run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for each source and split."""
    for row in rows:
        told = f"{row['source']}, " if "source" in row else ""
        told += f"{row['split']}: {row['documents']:,} documents, {row['tokens']:,} tokens "
        if "trained" in row:
            told += f"of which {row['trained']:,} are trained"
        else:
            told += f"of {row['bytes_per_token']:.2f} bytes"
        told += f", longest {row['longest']:,}"
        if "weight" in row:
            told += f"; {row['weight']:.1%} of the mix, anew after {row['repeats_after']:,} tokens"
            told += " of it"
        run.say(told)


def stage(config: DataConfig, run: Run, inputs: Mapping[str, Path | None]) -> None:
    """Stage `data`: writes tokens/, tokenizer/, tables/summary.jsonl and tables/data.json."""
    if not dist.is_main():
        return  # the others wait at the end of the stage
    config = config.reading(inputs.get("chats"))
    readings = config.readings
    say_beginning(run, readings)
    of_recipe = (run.path / "recipe.toml").is_file()  # RUNS/RECIPE/RUN
    home = run.path.parents[1 if of_recipe else 0] / CACHE
    if config.cache.directory:
        home = Path(config.cache.directory).expanduser()
    with TokenCache(home, config.cache.gib) as cache:
        sources = [Source(name, one, run.seed) for name, one in readings.items()]
        if isinstance(config.tokenizer, BPE):  # it is trained on what is not held out
            for source in sources:
                source.read(None, cache)
            quarantine(run, sources, config.max_bad)
        tokenizer = choose_tokenizer(config, inputs.get("model"), sources)
        encoders = [encoder_of(config, source.reading, tokenizer) for source in sources]
        chats = {source.name: one.chats for source, one in zip(sources, encoders, strict=True)}
        switch = switches_of({name: one.switch for name, one in chats.items() if one})
        for source in sources:
            say_unsaid(run, source.where, source.reading, chats[source.name])
        before = cache.hits
        steps = sum(len(one.units) + len(one.heldout_units) + len(one.tasks) for one in sources)
        with Progress("tokenising", steps, "tokens", quiet=run.quiet) as bar:
            for source, encoder in zip(sources, encoders, strict=True):
                source.read(encoder, cache, bar)
            quarantine(run, sources, config.max_bad)
            rows = write_sources(run, sources, encoders, config, bar)
        if any(source.refused for source in sources):
            quarantine(run, sources, config.max_bad)
        if known := cache.hits - before:
            units = sum(len(source.entries) for source in sources)
            run.say(f"{known} of {units} inputs were tokenised before ({cache.directory})")
        tokenizer.save(run.path / "tokenizer")
        if any(source.reading.chats for source in sources):  # what a model of it is asked with
            template_of(tokenizer).save(run.path / "tokenizer")
            record_switch(run.path / "tokenizer", switch)
        run.write_table("summary", rows)
        named = {
            source.name: {"weight": config.shares[source.name], "quarantined": source.num_bad}
            for source in sources
            if source.name
        }
        described = {
            "splits": list(SPLITS),
            "vocab_size": tokenizer.vocab_size,
            "pad_id": tokenizer.pad_id,
            "bos": bool(tokenizer.beginning(config.bos)),
            "end": config.end,
            "quarantined": sum(source.num_bad for source in sources),
            "heldout_seen_in_train": seen_in_train(sources),
        }
        if any(one and one.template.reads_date for one in chats.values()):
            described["template_date"] = str(RUN_DATE.date())
        run.write_json("data", {**described, **({"sources": named} if named else {})})
    say_rows(run, rows)
