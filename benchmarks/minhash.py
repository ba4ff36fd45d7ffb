"""MinHash signatures: `near_dedupe`'s against those of the libraries that are here.

    python benchmarks/minhash.py [--site-packages DIR]

DIR holds datatrove or datasketch where the tests' environment does not. GSM8K's questions, 128
hashes of 3-grams of words, one thread, medians of five paired repeats. datatrove gets its words
from a regular expression: its own tokenizer is spaCy, which would cost more.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tessera.curate.runner import BATCH
from tessera.curate.steps.duplicates import signatures, word_grams

FILE = Path(__file__).parents[2] / "shared/data/gsm8k/train.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--site-packages", default=None)
    options = parser.parse_args()
    if options.site_packages:
        sys.path.append(options.site_packages)
    texts = [json.loads(line)["question"] for line in FILE.open()]
    ways = {name: way(texts) for name, way in WAYS.items()}
    print(table({name: way for name, way in ways.items() if way}, len(texts)))


def ours(texts: list[str]) -> Callable[[], Any]:
    def run() -> None:
        for at in range(0, len(texts), BATCH):
            signatures(word_grams(text, 3) for text in texts[at : at + BATCH])

    return run


def datasketch(texts: list[str]) -> Callable[[], Any] | None:
    try:
        from datasketch import MinHash  # type: ignore[import-not-found]
    except ImportError:
        return None

    def run() -> None:
        for text in texts:
            words = _words(text)
            grams = [" ".join(words[i : i + 3]).encode() for i in range(max(1, len(words) - 2))]
            MinHash(128).update_batch(grams)

    return run


def datatrove(texts: list[str]) -> Callable[[], Any] | None:
    try:
        from datatrove.pipeline.dedup import minhash  # type: ignore[import-not-found]
    except ImportError:
        return None

    class Words:
        word_tokenize = staticmethod(_words)

    minhash.load_word_tokenizer = lambda language: Words()
    # Its default hash, xxhash, is given text, which xxhash 4 refuses.
    config = minhash.MinhashConfig(
        n_grams=3,
        num_buckets=16,
        hashes_per_bucket=8,
        hash_config=minhash.HashConfig(hash_fc="sha1"),
    )
    step = minhash.MinhashDedupSignature("unused", config=config)

    def run() -> None:
        for text in texts:
            step.get_signature(step.get_shingles(text))

    return run


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


WAYS: dict[str, Callable[[list[str]], Callable[[], Any] | None]] = {
    "tessera": ours,
    "datatrove": datatrove,
    "datasketch": datasketch,
}


def table(ways: dict[str, Callable[[], Any]], count: int) -> str:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(5):
        for name, way in ways.items():
            begun = time.process_time()
            way()
            times[name].append(time.process_time() - begun)
    lines = ["| signatures | rows / CPU s | CPU time of ours |", "|---|--:|--:|"]
    for name, spent in times.items():
        ratio = np.median(np.array(spent) / np.array(times["tessera"]))
        lines.append(f"| {name} | {count / np.median(spent):,.0f} | {ratio:.1f}x |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
