"""Data: tokenising, the memory of a large corpus, the cache, the fill, mixtures; chats against TRL.

    python benchmarks/data.py text [--megabytes 200]
    python benchmarks/data.py chats [--peer PYTHON] [--file ROWS.jsonl] [--copies 8]

text: TinyStories; a large corpus is its words drawn anew into as many documents, in files of 25 MB
of JSONL. The stage runs in a process of its own each time, whose peak of resident memory is the
kernel's figure. Speeds are per second of CPU, so that other jobs on the machine count little.

chats: rows and tokens a CPU second against datasets + TRL. Both read the same rows (Llama-
Nemotron's fields; by default 500 on and 500 off, drawn here), render the same template, tokenise
with the same tokenizer, mask all but the answers and pack best-fit into rows of 512. The peer is
`datasets`' map over `apply_chat_template` with its assistant mask, and `trl.pack_dataset`, on a
template whose answers stand in {% generation %}; ids and trained ids have to be equally many. Ours
includes what the peer has not: checks of every row, quarantine and the cache's files. `--file`
names real rows.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import tokenizers
from harness import (
    SHARED,
    STORIES,
    TRL,
    Command,
    Figures,
    alternate,
    fresh,
    median,
    memory_mb,
    need,
    ratio,
    table,
)

from tessera.data.config import DataConfig
from tessera.data.dialects import write_row
from tessera.data.documents import WINDOW, Documents, plan_rows
from tessera.data.encode import Encoder, key_of
from tessera.data.prepare import stage as prepare
from tessera.data.problems import problem_rows
from tessera.data.readers import Record, content_hash, read
from tessera.data.tokenizer import byte_tokenizer, load_tokenizer, train_bpe
from tessera.runs.run import Run, read_table

TOKENIZERS = {
    "byte": None,
    "stories260k, 512 (tokenizer.json)": "models/stories260k",
    "stories260k, 512 (SentencePiece)": "models/stories260k/tokenizer.model",
    "GPT-2, 50k": "data/tokenizers/gpt2",
    "Llama 3, 128k": "data/tokenizers/llama3/tokenizer.model",
}


FILE_MB = 25
ROW = 512


PEER = """
import json, sys, time
import datasets, transformers, trl
home, file = sys.argv[1:]
datasets.disable_caching(); datasets.disable_progress_bars()
peer = transformers.PreTrainedTokenizerFast.from_pretrained(home)
wall, cpu = time.monotonic(), time.process_time()
rows = datasets.load_dataset("json", data_files=file, split="train", cache_dir=home + "/cache")
def talk(row):
    system = {"role": "system", "content": row["system_prompt"]}
    answer = {"role": "assistant", "content": row["output"]}
    found = peer.apply_chat_template([system, *row["input"], answer], tokenize=True,
        return_dict=True, return_assistant_tokens_mask=True)
    return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}
done = rows.map(talk, remove_columns=rows.column_names)
packed = trl.pack_dataset(done, seq_length=512, strategy="bfd")
packed[0]
wall, cpu = time.monotonic() - wall, time.process_time() - cpu
tokens = sum(map(len, done["input_ids"])); trained = sum(map(sum, done["assistant_masks"]))
print(json.dumps(dict(wall=wall, cpu=cpu, rows=len(done), tokens=tokens, trained=trained,
    packed=len(packed))))
"""


# Text


def text(options: argparse.Namespace) -> None:
    if options.side:
        print(json.dumps(run_stage(json.loads(options.side))))
        return
    os.environ["RAYON_NUM_THREADS"] = str(options.threads)
    print(f"tokenizers {tokenizers.__version__}, numpy {np.__version__}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.smoke:
            stories, model = folder / "stories.txt", harness.tiny_model(folder / "model")
            stories.write_text("\n<|endoftext|>\n".join(harness.tiny_texts(600)))
            known: dict[str, Path | None] = {"byte": None, "BPE": model}
            steps = 2
        else:
            stories, model, steps = STORIES, SHARED / "models/stories260k", 400
            known = {label: path and SHARED / path for label, path in TOKENIZERS.items()}
            need(stories)
        table(tokenising(stories, known))
        table(corpora(folder, stories, model, options))
        table(fill(folder, stories, model))
        table(mixture(folder, stories, model, steps, options.smoke))


def text_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megabytes", type=float, default=200, help="size of the large corpus")
    parser.add_argument("--side", help=argparse.SUPPRESS)


def cpu(work: Callable[[], Any]) -> float:
    """CPU seconds of this process."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def tokenising(stories: Path, known: dict[str, Path | None]) -> list[Figures]:
    """MB of text a CPU second: what the stage does to it, step by step."""
    texts = [record.content for record in read(stories) if isinstance(record, Record)]
    data = [one.encode() for one in texts]
    megabytes = sum(map(len, data)) / 1e6
    steps: dict[str, Callable[[], Any]] = {
        "hash of a file's content": lambda: [content_hash(stories) for _ in range(20)],
        "reading .txt": lambda: list(read(stories)),
        "hash of each document": lambda: [key_of(one) for one in data],
    }
    for label, path in known.items():
        tokenizer = load_tokenizer(path) if path else byte_tokenizer()
        encoder = Encoder(tokenizer)
        steps[f"tokenising, {label}"] = lambda encoder=encoder: list(encoder.portions(texts))
    rows = []
    for label, work in steps.items():
        best = min(cpu(work) for _ in range(3))
        times = 20 if "content" in label else 1
        rows.append({"step": label, "MB / CPU s": f"{times * megabytes / max(best, 1e-9):,.1f}"})
    return rows


def write_corpus(folder: Path, stories: Path, megabytes: float) -> list[str]:
    """Files of documents as long as the stories, of their words drawn at random."""
    found = [record.content.split() for record in read(stories) if isinstance(record, Record)]
    words = np.array([word for story in found for word in story])
    lengths = np.array([len(story) for story in found])
    folder.mkdir(exist_ok=True)
    paths = []
    for number in range(max(1, int(megabytes // FILE_MB))):
        rng, path, size = np.random.default_rng(number), folder / f"{number:03}.jsonl", 0
        with path.open("w") as file:
            while size < min(FILE_MB, megabytes) * 1e6:
                drawn = words[rng.integers(len(words), size=rng.choice(lengths))]
                size += file.write(json.dumps({"text": " ".join(drawn)}) + "\n")
        paths.append(str(path))
    return paths


def run_stage(options: dict[str, Any]) -> Figures:
    """One run of the stage in this process: seconds, CPU seconds and the peak of its memory."""
    before = memory_mb("VmRSS")
    begun = time.monotonic(), time.process_time()
    data_run(Path(options["run"]), Path(options["model"]), **options["table"])
    return {
        "wall": time.monotonic() - begun[0],
        "cpu": time.process_time() - begun[1],
        "before": before,
        "peak": memory_mb(),
    }


def data_run(where: Path, model: Path | None, **settings: Any) -> Path:
    """A finished data run."""
    config = DataConfig(**settings)
    dumped, inputs = config.model_dump(mode="json"), {"model": model}
    with Run.open(where, stage="data", config=dumped, inputs=inputs, seed=0, quiet=True) as run:
        prepare(config, run, inputs)
        run.finish()
    return where


def corpora(folder: Path, stories: Path, model: Path, options: argparse.Namespace) -> list[Figures]:
    """The stage on a small and a large corpus: nothing known, all known, one file more."""
    rows = []
    for size in (options.megabytes // 8 or options.megabytes / 8, options.megabytes):
        home = folder / f"corpus-{size}"
        paths = write_corpus(home, stories, size)
        cases = {"empty": paths, "all in it": paths}
        if len(paths) > 2:
            cases = {"empty": paths[:-1], "all but one file": paths, "all in it": paths}
        for number, (label, chosen) in enumerate(cases.items()):
            held = 0.02 if number < 2 else 0.05  # another split of the same tokens
            settings = {"paths": chosen, "end": "bos", "heldout": held}
            side = {"run": str(home / f"run-{number}"), "model": str(model), "table": settings}
            words = ["text", "--side", json.dumps(side), "--threads", str(options.threads)]
            found = fresh(__file__, words, options.threads)
            read_mb = sum(Path(path).stat().st_size for path in chosen) / 1e6
            rows.append(
                {
                    "corpus": f"{read_mb:.0f} MB, {len(chosen)} files",
                    "cache": label,
                    "wall s": f"{found['wall']:.1f}",
                    "CPU s": f"{found['cpu']:.1f}",
                    "peak MiB": f"{found['peak']:.0f}",
                    "of it before": f"{found['before']:.0f}",
                }
            )
    return rows


def fill(folder: Path, stories: Path, model: Path) -> list[Figures]:
    """The fill of the stories' rows, and what planning and serving them costs."""
    run = data_run(folder / "stories", model, paths=str(stories), end="bos")
    rows = []
    for sequence, row in ((512, 512), (512, 2048), (256, 256), (256, 2048)):
        sizes: dict[str, Any] = {"sequence_length": sequence, "row_length": row}
        source = Documents(run, **sizes, tokens_per_step=32_768, microbatch_tokens=4096, seed=0)
        part = source.parts[0]
        planned = plan_rows(part.offsets, np.arange(part.num_documents), sequence, row)
        share = part.num_predictions / (len(planned) * row)
        drawn = np.random.default_rng(0).integers(part.num_documents, size=WINDOW)
        planning = min(cpu(lambda: plan_rows(part.offsets, drawn, sequence, row)) for _ in range(5))  # noqa: B023
        serving = cpu(lambda: [source.batches(step) for step in range(20)]) / 20  # noqa: B023
        rows.append(
            {
                "pieces of at most": str(sequence),
                "rows of": row,
                "fill of an epoch": f"{share:.1%}",
                f"ms to plan {WINDOW} documents": f"{planning * 1e3:.1f}",
                "ms to serve 32,768 positions": f"{serving * 1e3:.1f}",
            }
        )
    return rows


def mixture(folder: Path, stories: Path, model: Path, steps: int, smoke: bool) -> list[Figures]:
    """Three sources by weight: what so many steps trained on, counted in their batches' rows."""
    math = {"paths": str(SHARED / "data/gsm8k/train.jsonl"), "field": "question"}
    sources = {
        "stories": {"paths": str(stories), "weight": 0.6},
        "math": {**({"tasks": {"sort": 500}} if smoke else math), "weight": 0.3},
        "sums": {"tasks": {"calc": 2000}, "weight": 0.1},
    }
    run = data_run(folder / "mix", model, sources=sources, end="bos")
    rows = []
    for row_length in (512, 2048):
        sizes: dict[str, Any] = {"sequence_length": 512, "row_length": row_length}
        source = Documents(run, **sizes, tokens_per_step=32_768, microbatch_tokens=4096, seed=0)
        early, late = counted(source, min(10, steps)), counted(source, steps)
        for row in source.summary(steps):
            name = row["source"]
            rows.append(
                {
                    "source": name,
                    "rows of": row_length,
                    "weight": f"{row['weight']:.1%}",
                    f"trained, {min(10, steps)} steps": f"{early[name]:.2%}",
                    f"all {steps} steps": f"{late[name]:.2%}",
                    "epochs": f"{row['epochs']:.2f}",
                    "fill": f"{row['fill']:.1%}",
                }
            )
    return rows


def counted(source: Documents, steps: int) -> dict[str, float]:
    """The share of each source among the predictions that so many steps hold."""
    trained = dict.fromkeys((part.name for part in source.parts), 0)
    for index in range(steps * source.rows_per_step):
        which, own = source.mix.row(index)
        part = source.parts[which]
        row = part.row(own)
        trained[part.name] += sum(stop - start - 1 for start, stop in row or [])
    total = sum(trained.values())
    return {name: tokens / total for name, tokens in trained.items()}


# Chats


def chats(options: argparse.Namespace) -> None:
    if options.side:
        print(json.dumps(ours(*map(Path, options.side))))
        return
    if not options.smoke:
        need(options.peer, hint="--peer; make venv-trl")
    with tempfile.TemporaryDirectory() as scratch:
        home, file, peer = (Path(scratch) / name for name in ("tokenizer", "rows.jsonl", "peer.py"))
        rows = rows_of(options.file, options.copies)
        file.write_text("\n".join(map(json.dumps, rows)))
        tokenizer(home, rows)
        peer.write_text(PEER)
        words = ["chats", "--side", str(home), str(file)]
        ways: dict[str, Any] = {"tessera": partial(fresh, __file__, words)}
        if not options.smoke:
            ways["TRL"] = partial(fresh, peer, [str(home), str(file)], python=options.peer)
        found = alternate(ways, options.rounds)
    first = found["tessera"][0]
    for one in (one for figures in found.values() for one in figures):
        assert all(one[key] == first[key] for key in ("rows", "tokens", "trained")), (first, one)
    table(
        [
            {
                "": name,
                "CPU s": f"{median(figures, 'cpu'):.2f}",
                "rows/s": f"{first['rows'] / median(figures, 'cpu'):,.0f}",
                "tokens/s": f"{first['tokens'] / median(figures, 'cpu'):,.0f}",
                "CPU time over ours": f"{ratio(figures, found['tessera'], 'cpu'):.2f}",
                f"rows of {ROW}": figures[0]["packed"],
            }
            for name, figures in found.items()
        ],
        f"{first['rows']:,} rows, {first['tokens']:,} tokens, {first['trained']:,} trained, "
        "all alike",
    )


def chats_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peer", default=TRL, help="a Python that has TRL")
    parser.add_argument("--file", type=Path, help="rows of the Llama-Nemotron dataset")
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)


def ours(home: Path, file: Path) -> Figures:
    """Our stage and the first plan of rows, in this process."""
    settings = {"paths": str(file), "format": "chat", "tokenizer": str(home), "heldout": 0}
    wall, cpu = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as runs:
        path = data_run(Path(runs) / "data", None, **settings)
        sizes = {"sequence_length": ROW, "tokens_per_step": ROW, "microbatch_tokens": ROW}
        source = Documents(path, **sizes, seed=0)
        rows = 0
        while source.parts[0].order.row(rows) is not None and rows < 1 << 20:
            part = source.parts[0].order
            if part.anchor[0] >= max(1, round(source.parts[0].num_documents / WINDOW)):
                break  # the next epoch has begun
            rows += 1
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        (train, _) = read_table(path, "summary")
    counts = {"rows": train["documents"], "tokens": train["tokens"], "trained": train["trained"]}
    return {"wall": wall, "cpu": cpu, **counts, "packed": rows}


def tokenizer(home: Path, rows: list[dict[str, Any]]) -> None:
    """A BPE of 4,096 tokens with the built-in template; its thoughts kept, its answers marked."""
    texts = (row["input"][0]["content"] + "\n" + row["output"] for row in rows)
    train_bpe(texts, 4096, chat=True).save(home)
    source = """\
{{- bos_token }}{%- for message in messages %}
{{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" }}
{%- if message.role == "assistant" %}{% generation %}{{- message.content + "<|eot_id|>" }}
{%- endgeneration %}{%- else %}{{- message.content + "<|eot_id|>" }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}
{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{%- endif %}"""
    (home / "chat_template.jinja").write_text(source)


def rows_of(file: Path | None, copies: int) -> list[dict[str, Any]]:
    """Rows, each copy with a number in its question so that none is another's."""
    if file is None:
        rows = [write_row(chat, "nemotron") for chat in problem_rows("sort", 500)]
    else:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    found = []
    for copy in range(copies):
        for row in rows:
            first = {**row["input"][0], "content": f"{copy}. {row['input'][0]['content']}"}
            found.append({**row, "input": [first]})
    return found


if __name__ == "__main__":
    harness.main(
        __doc__,
        {
            "text": Command(text, text_options, {"megabytes": 1}),
            "chats": Command(chats, chats_options, {"copies": 1}),
        },
    )
