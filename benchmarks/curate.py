"""Curation: the speed of each step and its growth, what decontamination and near_dedupe catch.

    python benchmarks/curate.py [--rows 10000 100000 1000000] [--only speed|catch]

Speed: rows of words drawn anew from GSM8K's, as long as its rows, with copies and near-copies
planted; the stage goes over them whole, one thread, in CPU seconds. Catch: GSM8K train against
GSM8K and MATH test, with planted copies of ten kinds, and near-copies of known Jaccard index.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tessera.curate import runner
from tessera.curate.config import CurateConfig
from tessera.curate.steps.contamination import Decontaminate
from tessera.curate.steps.duplicates import clusters, signatures, word_grams
from tessera.runs.recipe import validate
from tessera.runs.run import Run, read_table

DATA = Path(__file__).parents[2] / "shared/data"
AGAINST = [
    {"paths": str(DATA / "gsm8k/test.jsonl"), "field": "question", "name": "gsm8k"},
    {"paths": str(DATA / "math500/test.jsonl"), "field": "problem", "name": "math"},
]
STEPS: list[dict[str, Any]] = [
    {"step": "tags"},
    {"step": "licence", "allow": ["mit"]},
    {"step": "length", "unit": "words", "max": 400},
    {"step": "language", "confidence": 0.99},
    {"step": "extract_answer"},
    {"step": "verify"},
    {"step": "decontaminate", "against": AGAINST},
    {"step": "dedupe"},
    {"step": "near_dedupe"},
    {"step": "pass_rate"},
    {"step": "order"},
]
REAL = [
    ("gsm8k", "gsm8k/train.jsonl", {"question": "question", "answer": "answer"}),
    ("nemotron", "nemotron_schema/gsm8k_train_500_on_off.jsonl", {}),
    ("mbpp", "mbpp/mbpp.jsonl", {"question": "text", "answer": "code"}),
    ("alpaca", "sft_small/llamafactory/alpaca_en_demo.json", {}),
    ("glaive", "sft_small/llamafactory/glaive_toolcall_en_demo.json", {}),
    ("tools", "sft_small/llamafactory/reason_tool_use_demo_50.jsonl", {}),
    ("modelopt", "sft_small/modelopt/synthetic_conversations_1k.jsonl", {}),
    ("aligner", "sft_small/nemo_aligner/dummy-sft.jsonl", {}),
    ("skythought", "skythought_traces/traces.jsonl", {"question": "question"}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--only", choices=["speed", "catch"])
    options = parser.parse_args()
    if not DATA.exists():
        print(f"skipped: {DATA} is not here")
        return
    if options.only in (None, "catch"):
        print(real_sets(), end="\n\n", flush=True)
        print(contamination(), end="\n\n", flush=True)
        print(near_copies(), end="\n\n", flush=True)
    if options.only in (None, "speed"):
        print(speeds(options.rows), flush=True)


def gsm8k(split: str) -> list[dict[str, str]]:
    lines = (DATA / f"gsm8k/{split}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# Speed


def write_rows(path: Path, count: int) -> None:
    """Rows of random words: 3 % repeat the row before, 5 % its question with one word changed, 5 %
    are wrong. What every step sees is most of what came in."""
    rows, rng = gsm8k("train"), np.random.default_rng(0)
    said, answer, right = "", 0, True
    words = np.array([word for row in rows for word in row["question"].split()])
    lengths = np.array([[len(row[k].split()) for k in ("question", "answer")] for row in rows])
    asked = ["nothing"]
    with path.open("w") as file:
        for number in range(count):
            long, short = lengths[rng.integers(len(lengths))]
            kind = rng.random()
            if kind >= 0.03:
                asked = list(asked) if kind < 0.08 else words[rng.integers(len(words), size=long)]
            if 0.03 <= kind < 0.08:
                asked[rng.integers(len(asked))] = words[rng.integers(len(words))]
            if kind >= 0.03 or not number:
                said = " ".join(words[rng.integers(len(words), size=short)])
                answer, right = number % 97, rng.random() >= 0.05
            row = {
                "input": [{"role": "user", "content": " ".join(asked)}],
                "output": f"<think>\n{said}\n</think>\n\nSo \\boxed{{{answer}}}.",
                "reasoning": "on",
                "license": "mit",
                "expected_answer": str(answer if right else -1),
            }
            file.write(json.dumps(row) + "\n")


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """CPU seconds of each step: its batches, its digests, its decision."""
    seconds: dict[str, float] = defaultdict(float)
    originals = runner.ShardWriter._apply, runner.ShardWriter._keep, runner.decide

    def within(name: str, function: Callable[..., Any], *words: Any) -> Any:
        begun = time.process_time()
        found = function(*words)
        seconds[name] += time.process_time() - begun
        return found

    def apply(self: Any, name: str, step: Any, batch: Any) -> Any:
        return within(step.step, originals[0], self, name, step, batch)

    def keep(self: Any, batch: Any, out: Any) -> Any:
        closing, self.closing = self.closing, None
        within("writing", originals[1], self, batch, out)
        self.closing = closing
        if closing is not None and batch:
            self._digests.append(within(closing.step, closing.digest, batch))

    def decide(home: Any, shards: Any, closing: Any, seed: Any) -> Any:
        return within(closing.step, originals[2], home, shards, closing, seed)

    runner.ShardWriter._apply, runner.ShardWriter._keep, runner.decide = apply, keep, decide  # type: ignore[assignment]
    try:
        yield seconds
    finally:
        runner.ShardWriter._apply, runner.ShardWriter._keep, runner.decide = originals  # type: ignore[assignment]


def run_stage(where: Path, table: dict[str, Any]) -> None:
    config = validate(CurateConfig, table, "curate")
    dumped, inputs = config.model_dump(mode="json"), {"model": None}
    with Run.open(where, stage="curate", config=dumped, inputs=inputs, seed=0, quiet=True) as run:
        runner.stage(config, run, inputs)
        run.finish()


def speeds(sizes: list[int]) -> str:
    """CPU microseconds a row that reaches a step; the peak memory is the process's so far."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for size in sorted(sizes):
        with tempfile.TemporaryDirectory() as name, timed() as seconds:
            file = Path(name) / "rows.jsonl"
            write_rows(file, size)
            seconds.clear()
            begun = time.process_time()
            run_stage(Path(name) / "run", {"sources": [{"paths": str(file)}], "steps": STEPS})
            total = time.process_time() - begun
            counts = {row["step"]: row for row in read_table(Path(name) / "run", "steps")}
        rows_in = {key.split(" ")[-1]: row["in"] for key, row in counts.items()}
        for step in [one["step"] for one in STEPS]:
            found[step][size] = 1e6 * seconds[step] / max(1, rows_in[step])
        others = total - sum(seconds.values())
        found["to JSON and to the disk"][size] = 1e6 * seconds["writing"] / size
        found["from JSON, counting, the rest"][size] = 1e6 * others / size
        found["all"][size] = 1e6 * total / size
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        flow = ", ".join(f"{row['step']} {row['out']:,}" for row in counts.values())
        print(f"- {size:,} rows: {total:.1f} CPU s, peak memory {peak:.2f} GiB; out of {flow}")
    heads = " | ".join(f"{size:,} rows" for size in sizes)
    lines = [
        f"| step, CPU µs a row | {heads} | rows / CPU s |",
        "|---|" + "--:|" * (len(sizes) + 1),
    ]
    for step, values in found.items():
        cells = " | ".join(f"{values[size]:.1f}" for size in sizes)
        lines.append(f"| {step} | {cells} | {1e6 / max(values[sizes[-1]], 1e-9):,.0f} |")
    return "\n".join(lines)


# What is caught


def real_sets() -> str:
    """The real sets go through whole: rows in and out of each step, and the reasons."""
    sources = [
        {"paths": str(DATA / path), "name": name, **keys}
        for name, path, keys in REAL
        if (DATA / path).exists()
    ]
    steps = [
        {"step": "dedupe"},
        {"step": "language"},
        {"step": "decontaminate", "against": AGAINST},
        {"step": "near_dedupe"},
    ]
    with tempfile.TemporaryDirectory() as name:
        run_stage(Path(name) / "run", {"sources": sources, "steps": steps})
        counts = read_table(Path(name) / "run", "steps")
        reasons = read_table(Path(name) / "run", "reasons")
        removed = sorted((Path(name) / "run/removed").iterdir())
        rows = [json.loads(line) for file in removed for line in file.read_text().split("\n")[:-1]]
    lines = ["| step | rows in | rows out |", "|---|--:|--:|"]
    lines += [f"| {row['step']} | {row['in']:,} | {row['out']:,} |" for row in counts]
    lines += ["", *(f"- {row['step']}: {row['reason']}: {row['rows']}" for row in reasons)]
    places = Counter((row["step"], Path(row["row"]).parts[-1].split(":")[0]) for row in rows)
    lines += [f"- {step} left out {n} of {name}" for (step, name), n in sorted(places.items())]
    return "\n".join(lines)


SAME = {
    "buys": "purchases",
    "bought": "purchased",
    "has": "owns",
    "total": "sum",
    "each": "every",
    "gave": "handed",
    "makes": "produces",
    "how many": "what number of",
    "how much": "what amount of",
    "find": "determine",
    "what is": "determine",
    "cost": "price",
    "money": "cash",
    "week": "seven days",
    "spends": "uses up",
    "needs": "requires",
    "wants": "would like",
    "and": "as well as",
    "then": "afterwards",
    "also": "in addition",
    "if": "supposing",
}


def planted(text: str, rng: random.Random, filler: str) -> dict[str, str]:
    """Copies of a problem, from the plain to the much reworded."""
    words = text.split()

    def with_words_changed(share: float) -> str:
        chosen = set(rng.sample(range(len(words)), max(1, round(share * len(words)))))
        return " ".join(rng.choice(words) if i in chosen else w for i, w in enumerate(words))

    sentences = re.split(r"(?<=[.?!]) ", text)
    shuffled = sentences[:-1]
    rng.shuffle(shuffled)
    names = re.sub(r"(?<=[a-z,] )[A-Z][a-z]+|^[A-Z][a-z]+", lambda m: m[0][::-1].title(), text)
    reworded = text
    for old, new in SAME.items():
        reworded = re.sub(rf"\b{old}\b", new, reworded, flags=re.I)
    return {
        "a copy": text,
        "other case and punctuation": re.sub(r"[,.?]", "", text.upper()),
        "within a longer text": f"{filler} {text} {filler[::-1]}",
        "the first two thirds": " ".join(words[: max(4, 2 * len(words) // 3)]),
        "sentences in another order": " ".join([*shuffled, sentences[-1]]),
        "other names": names,
        "5 % of words changed": with_words_changed(0.05),
        "15 % of words changed": with_words_changed(0.15),
        "30 % of words changed": with_words_changed(0.30),
        "reworded by synonyms": reworded,
        "other numbers": re.sub(r"\d+", lambda m: str(int(m[0]) + rng.randrange(1, 9)), text),
    }


def contamination() -> str:
    """Recall on plants of each kind, and what is said of the rows that nobody planted."""
    train = [row["question"] for row in gsm8k("train")]
    rng = random.Random(0)
    problems = [text for one in AGAINST for text in _problems(one)]
    chosen = rng.sample(problems, 400)
    kinds: dict[str, list[str]] = defaultdict(list)
    for text in chosen:
        for kind, copy in planted(text, rng, rng.choice(train)).items():
            kinds[kind].append(copy)
    settings = [(13, 0.01), (8, 0.2), (5, 0.4), (5, 0.25), (3, 0.5), (3, 0.4)]
    heads = [f"n={n}, share {share:g}" for n, share in settings]
    found: dict[str, list[float]] = defaultdict(list)
    caught: list[tuple[float, str]] = []
    for n, share in settings:
        step = _decontaminate(n, share)
        for kind, copies in kinds.items():
            found[kind].append(float((_shares(step, copies) >= share).mean()))
        shares = _shares(step, train)
        found["GSM8K train, as it is: rows"].append(float((shares >= share).sum()))
        if (n, share) == (5, 0.4):
            caught = [(s, t) for s, t in zip(shares, train, strict=True) if s >= share]
    lines = [f"| recall of 400 planted | {' | '.join(heads)} |", "|---|" + "--:|" * len(heads)]
    for kind, values in found.items():
        whole = kind.endswith("rows")
        cells = [f"{int(v)} of {len(train)}" if whole else f"{v:.1%}" for v in values]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    lines += ["", "Caught in GSM8K train as it is, n = 5, share 0.4:", ""]
    lines += [f"- {share:.2f}: {text[:200]}" for share, text in sorted(caught, reverse=True)]
    return "\n".join(lines)


def _problems(one: dict[str, str]) -> list[str]:
    step = _decontaminate(5, 0.4)
    (found,) = [e for e in step.against if e.name == one["name"]]
    return found.problems()


def _shares(step: Decontaminate, texts: list[str]) -> np.ndarray:
    return np.array([step.overlap(text)[0] for text in texts])


def _decontaminate(n: int, share: float) -> Decontaminate:
    table = {"step": "decontaminate", "against": AGAINST, "n": n, "share": share}
    return Decontaminate.model_validate({**table, "least": 1 if n > 8 else 3})


def near_copies() -> str:
    """Recall of near_dedupe by the true Jaccard index of the pair, threshold 0.8, 3-grams."""
    rng = random.Random(1)
    texts = [row["question"].lower().split() for row in gsm8k("train")[:3000]]
    vocabulary = sorted({word for text in texts for word in text})
    pairs = []
    for text in texts:
        copy = list(text)
        for _ in range(rng.randrange(0, 6)):
            copy[rng.randrange(len(copy))] = rng.choice(vocabulary)
        pairs.append(" ".join(copy))
    firsts = [" ".join(text) for text in texts]
    labels = clusters(signatures(word_grams(text, 3) for text in firsts + pairs), 0.8)
    bins: dict[str, list[bool]] = defaultdict(list)
    for index, (a, b) in enumerate(zip(firsts, pairs, strict=True)):
        one, other = (word_grams(text, 3) for text in (a, b))
        jaccard = len(one & other) / len(one | other)
        low = min(int(jaccard * 10) / 10, 0.9) if jaccard < 1 else 1.0
        bins[f"{low:.1f}"].append(bool(labels[index] == labels[len(firsts) + index]))
    lines = ["| true Jaccard index | pairs | told duplicates |", "|---|--:|--:|"]
    for low, hits in sorted(bins.items()):
        name = "1" if low == "1.0" else f"{low} to {float(low) + 0.1:.1f}"
        lines.append(f"| {name} | {len(hits)} | {np.mean(hits):.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
