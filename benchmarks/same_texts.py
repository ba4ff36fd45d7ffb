"""Whether a model writes in `tessera eval` what it writes in transformers, to the character.

Both are asked the first questions of IFEval and HumanEval, greedily, without a switch. The texts
of transformers (one question at a time, float32) are kept in --reference and made where missing.
Where two texts part, the gap between transformers' two best logits there is told: a gap near the
rounding of float32 is a tie.

    python benchmarks/same_texts.py --model DIR --reference texts.jsonl
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import harness
import torch
from harness import DATA, Command, need, table, tiny_model

TASKS = {"ifeval": 40, "humaneval": 164}


def questions(data: Path, counts: dict[str, int]) -> Iterator[tuple[str, str, list[Any]]]:
    """(task, item, messages) of each question."""
    from tessera.eval.task import Data
    from tessera.eval.tasks import find

    for task, count in counts.items():
        for number, item in enumerate(find(task).read(Data(task, str(data)))):
            if number == count:
                break
            yield task, item.id, list(item.messages)


def transformers_texts(
    model: Path, asked: list[tuple[str, str, list[Any]]], tokens: int, kept: Path
) -> dict[tuple[str, str], dict[str, Any]]:
    """What transformers writes to each question, added to the file as it comes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    found = {(row["task"], row["item"]): row for row in rows}
    missing = [one for one in asked if one[:2] not in found]
    if not missing:
        return found
    tokenizer = AutoTokenizer.from_pretrained(model)
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    start = time.monotonic()
    with kept.open("a") as file:
        for number, (task, item, messages) in enumerate(missing, 1):
            given = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            length = given["input_ids"].shape[1]
            with torch.inference_mode():
                out = module.generate(
                    **given, max_new_tokens=tokens, do_sample=False, output_logits=True,
                    return_dict_in_generate=True,
                )  # fmt: skip
            best = torch.cat(out.logits).topk(2).values
            ids = out.sequences[0, length:].tolist()
            row = {
                "task": task,
                "item": item,
                "text": tokenizer.decode(ids, skip_special_tokens=True),
                "ids": ids,
                "gaps": [round(float(gap), 6) for gap in best[:, 0] - best[:, 1]],
            }
            found[task, item] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            pace = (time.monotonic() - start) / number
            print(f"# transformers: {number} of {len(missing)}, {pace:.1f} s each", file=sys.stderr)
    return found


def tessera_texts(
    model: Path, data: Path, counts: dict[str, int], tokens: int
) -> dict[tuple[str, str], str]:
    """What `tessera eval` keeps as the model's answers."""
    found = {}
    for task, count in counts.items():
        with TemporaryDirectory() as folder:
            words = [sys.executable, "-m", "tessera", "eval", str(model), "--task", task]
            words += ["--data", str(data), "--limit", str(count), "--max-tokens", str(tokens)]
            done = subprocess.run([*words, "--out", folder], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            (records,) = Path(folder).glob("*/records.jsonl")
            for line in records.read_text().splitlines():
                row = json.loads(line)
                found[row["task"], str(row["item"])] = row["text"]
    return found


def compare(options: argparse.Namespace) -> None:
    counts = {task: getattr(options, task) for task in TASKS if getattr(options, task)}
    need(options.data / "ifeval" / "input_data.jsonl", hint="IFEval and HumanEval")
    with TemporaryDirectory() as folder:
        model = options.model or _toy(Path(folder) / "model")
        kept = options.reference or Path(folder) / "texts.jsonl"
        asked = list(questions(options.data, counts))
        right = transformers_texts(model, asked, options.tokens, kept)
        ours = tessera_texts(model, options.data, counts, options.tokens)
        rows, parted = [], []
        for task in counts:
            mine = [key for key in (one[:2] for one in asked) if key[0] == task]
            same = [key for key in mine if ours.get(key, "").strip() == right[key]["text"].strip()]
            rows.append({"task": task, "questions": len(mine), "equal texts": len(same)})
            parted += [_parting(key, ours.get(key), right[key]) for key in mine if key not in same]
        table(rows, "Greedy texts, tessera eval against transformers")
        if parted:
            table(parted, "Where they part")


def _toy(directory: Path) -> Path:
    """A random model with a template that transformers finds."""
    from tessera.data.template import FILE, LLAMA3

    tiny_model(directory)
    (directory / FILE).write_text(LLAMA3)
    return directory


def _parting(key: tuple[str, str], ours: str | None, right: dict[str, Any]) -> dict[str, Any]:
    """The first character that differs, and transformers' smallest gap between two best logits."""
    text = right["text"].strip()
    if ours is None:
        return {"question": "/".join(key), "character": "no answer", "smallest gap": 0.0}
    at = next((i for i, (a, b) in enumerate(zip(ours.strip(), text)) if a != b), len(text))  # noqa: B905
    return {"question": "/".join(key), "character": at, "smallest gap": min(right["gaps"])}


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="a Hugging Face directory")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--reference", type=Path, metavar="FILE", help="transformers' texts")
    parser.add_argument("--tokens", type=int, default=128, help="at most, of each answer")
    for task, count in TASKS.items():
        parser.add_argument(f"--{task}", type=int, default=count, metavar="N", help="questions")


if __name__ == "__main__":
    harness.main(__doc__, Command(compare, _options, {"ifeval": 2, "humaneval": 2, "tokens": 8}, 1))
