"""Preparing chats for training against datasets + TRL: rows and tokens a CPU second, in one run.

    python benchmarks/chats.py [--peer PYTHON] [--file ROWS.jsonl] [--rounds 3] [--copies 8]

Both read the same rows (Llama-Nemotron's fields; by default 500 on and 500 off, drawn here),
render the same template, tokenise with the same tokenizer, mask all but the answers and pack
best-fit into rows of 512. The peer is `datasets`' map over `apply_chat_template` with its assistant
mask, and `trl.pack_dataset`, on a template whose answers stand in {% generation %}; ids and trained
ids have to be equally many. Fresh processes take turns, one thread each. Ours includes what the
peer has not: checks of every row, quarantine and the cache's files. `--file` names real rows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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


def ours(home: Path, file: Path) -> dict[str, Any]:
    """Our stage and the first plan of rows, in this process."""
    from tessera.data.config import DataConfig
    from tessera.data.documents import WINDOW, Documents
    from tessera.data.prepare import stage
    from tessera.runs.run import Run, read_table

    table = {"paths": str(file), "format": "chat", "tokenizer": str(home), "heldout": 0}
    config = DataConfig(**table)  # type: ignore[arg-type]
    wall, cpu = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as runs:
        path = Path(runs) / "data"
        with Run.open(path, stage="data", config=table, inputs={}, seed=0, quiet=True) as run:
            stage(config, run, {"model": None})
            run.finish()
        sizes = {"sequence_length": ROW, "tokens_per_step": ROW, "microbatch_tokens": ROW}
        source = Documents(path, **sizes, seed=0)
        rows = 0
        while source.parts[0].row(rows) is not None and rows < 1 << 20:
            part = source.parts[0]
            if part.anchor[0] >= max(1, round(source.parts[0].num_documents / WINDOW)):
                break  # the next epoch has begun
            rows += 1
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        (train, _) = read_table(path, "summary")
    counts = {"rows": train["documents"], "tokens": train["tokens"], "trained": train["trained"]}
    return {"wall": wall, "cpu": cpu, **counts, "packed": rows}


def tokenizer(home: Path, rows: list[dict[str, Any]]) -> None:
    """A BPE of 4,096 tokens with the built-in template; its thoughts kept, its answers marked."""
    from tessera.data.tokenizer import train_bpe

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
    from tessera.data.dialects import write_row
    from tessera.data.problems import problem_rows

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


def measure(words: list[str]) -> dict[str, Any]:
    """What a fresh process of one thread printed."""
    threads = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **threads, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer", default=".venv-trl/bin/python", help="a Python that has TRL")
    parser.add_argument("--file", type=Path, help="rows of the Llama-Nemotron dataset")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--ours", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        print(json.dumps(ours(*args.ours)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        home, file = Path(scratch) / "tokenizer", Path(scratch) / "rows.jsonl"
        rows = rows_of(args.file, args.copies)
        file.write_text("\n".join(map(json.dumps, rows)))
        tokenizer(home, rows)
        ratios: list[float] = []
        a: dict[str, Any] = {}
        b: dict[str, Any] = {}
        for number in range(args.rounds):
            a = measure([sys.executable, __file__, "--ours", str(home), str(file)])
            b = measure([args.peer, "-c", PEER, str(home), str(file)])
            ratios.append(b["cpu"] / a["cpu"])
            assert all(a[key] == b[key] for key in ("rows", "tokens", "trained")), (a, b)
            for name, one in (("tessera", a), ("TRL", b)):
                rates = (
                    f"{one['rows'] / one['cpu']:7,.0f} rows/s {one['tokens'] / one['cpu']:9,.0f}"
                )
                print(f"{number}  {name:8} {one['cpu']:6.2f} CPU s {rates} tokens/s", flush=True)
        print(f"{a['rows']:,} rows, {a['tokens']:,} tokens, {a['trained']:,} trained, both alike")
        print(f"rows of {ROW}: {a['packed']:,} and {b['packed']:,}")
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"TRL's CPU time over ours: {statistics.median(ratios):.2f} (of {shown})")


if __name__ == "__main__":
    main()
