"""Decontamination of real paraphrases: n-grams, and the nearest problem by a stand-in embedding.

    python benchmarks/paraphrases.py

Twelve problems of GSM8K's test set, rewritten by hand, beside GSM8K's training set. The embedding
counts words, pairs of words and four letters in a row, weighted by rarity: it has learned nothing,
so this shows the path, what n-grams miss, and what a judge is asked; no judge is measured.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tessera.curate.contamination import Decontaminate
from tessera.curate.similar import Nearest
from tessera.data.conversation import Chat
from tessera.generate.asking import Reply

DATA = Path(__file__).parents[2] / "shared/data/gsm8k"
AGAINST = [{"paths": str(DATA / "test.jsonl"), "field": "question", "name": "gsm8k"}]
# Written by hand: the first twelve problems of GSM8K's test set as somebody else would tell them.
REWRITTEN = (
    "A farm has ducks that give 16 eggs daily. Three go into the owner's breakfast and four into "
    "muffins. What is left is sold for 2 dollars apiece. What does a day's sale bring in?",
    "For a gown one needs two rolls of blue cloth, and of white cloth half of that. What is the "
    "number of rolls altogether?",
    "An investor pays $80,000 for a property and spends another $50,000 on renovating it, after "
    "which it is worth 150% more than before. What does he gain?",
    "Thrice weekly an athlete does three dashes of 60 meters. What distance is that in seven days?",
    "20 hens get three cups of food each a day. In the morning 15 cups were given out and 25 after "
    "noon. What amount is left for the evening?",
    "Tumblers are sold at 5 dollars, but each other one at 60% of that. What do sixteen come to?",
    "Seattle owns 20 sheep, Charleston four times that number, and Toulouse double what Charleston "
    "owns. What is the sum for the three?",
    "At 2 GB a minute, 200 GB are being fetched. When 40% are there, the computer reboots for 20 "
    "minutes and everything begins anew. After what time is the whole file there?",
    "A driver leaves home at 60 mph for three hours, then goes back for something. In the next "
    "four hours he stands in a jam for two, moves at 30 mph for half an hour and at 80 mph for the "
    "rest. What distance is left to his home?",
    "An app was fetched 60 times in its first month, thrice as often in its second, and in its "
    "third 30% less than in the second. What is the sum of all three months?",
    "At a baker's somebody takes three dozen doughnuts at $68 a dozen, two dozen small cupcakes at "
    "$80 and six dozen small cheesecakes at $55. What is the bill?",
    "Planting a tree of lemons costs 90 dollars and keeping it 3 dollars yearly. Its seven lemons "
    "a year sell at 1.5 dollars each. In which year does it begin to pay?",
)


def paraphrases() -> str:
    """What n-grams and embeddings make of real paraphrases; the embedding is a stand-in.

    It counts words, pairs of words and four letters in a row, weighted by rarity: no learned model.
    """
    train, tests = _questions("train"), _questions("test")
    weigh = _embedder(train + tests)
    step = Nearest.model_validate({"step": "nearest", "against": AGAINST})
    step.learn([Reply(vector=one) for one in weigh(tests)])
    asked: dict[str, list[str]] = {"written anew": list(REWRITTEN), "nobody planted": train}
    found: dict[str, list[tuple[float, str]]] = {}
    for kind, texts in asked.items():
        chats = [Chat([{"role": "user", "content": text}], None, [], {}) for text in texts]
        replies = [Reply(vector=one) for one in weigh(texts)]
        extras = [step.receive(c, [r]).extra for c, r in zip(chats, replies, strict=True)]  # type: ignore[union-attr]
        found[kind] = [(one["nearest_score"], one["nearest"]) for one in extras]
    grams_of = Decontaminate.model_validate({"step": "decontaminate", "against": AGAINST})
    own = sum(near == test for (_, near), test in zip(found["written anew"], tests, strict=False))
    grams = {kind: grams_of.overlaps(texts)[0] for kind, texts in asked.items()}
    lines = ["| goes to the judge | written anew (12) | GSM8K train (7,473) |", "|---|--:|--:|"]
    shares = [int((grams[kind] >= 0.4).sum()) for kind in asked]
    lines.append(f"| left out by 5-grams, share 0.4 | {shares[0]} | {shares[1]} |")
    for over in (0.2, 0.25, 0.3, 0.4, 0.5, 0.6):
        counts = [sum(score >= over for score, _ in found[kind]) for kind in asked]
        lines.append(f"| nearest, cosine over {over:g} | {counts[0]} | {counts[1]} |")
    lines += ["", f"The nearest problem is the rewritten one itself for {own} of {len(REWRITTEN)}."]
    pairs = sorted(zip(found["nobody planted"], train, strict=True), reverse=True)[:8]
    lines += ["", "Nearest of GSM8K train as it is (cosine, train / test):", ""]
    lines += [f"- {score:.2f}: {text[:150]} / {near[:150]}" for (score, near), text in pairs]
    return "\n".join(lines)


def _embedder(corpus: list[str], size: int = 4096) -> Callable[[list[str]], list[list[float]]]:
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

    def weigh(texts: list[str]) -> list[list[float]]:
        found = np.zeros((len(texts), size), np.float32)
        for row, text in zip(found, texts, strict=True):
            for index, count in features(text).items():
                row[index] = np.sqrt(count) * rarity[index]
        return list(found)  # type: ignore[arg-type]

    return weigh


def _questions(split: str) -> list[str]:
    return [json.loads(line)["question"] for line in (DATA / f"{split}.jsonl").open()]


if __name__ == "__main__":
    print(paraphrases())
