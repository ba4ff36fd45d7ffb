"""The checkers: how often the mathematical one errs on labelled answers, and how fast all are.

    python benchmarks/rewards.py [--data ../shared/data] [--samples 2000]

Labelled: 95 problems with eight sampled answers each and whether they are right (math_samples_8x),
and 70 long traces with theirs (skythought_traces). A label is another checker's word, so every
disagreement is printed to be judged by eye. Speed: through the pool, two workers, one thread each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
from harness import DATA, Command, table

from tessera.rl.pool import Pool
from tessera.rl.rewards import (
    CheckedReward,
    CodeReward,
    ExactReward,
    FormatReward,
    InstructionsReward,
    MathReward,
    NumberReward,
    Sample,
)

Labelled = tuple[str, str, str, bool]  # set, answer, expected, whether it is right


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def labelled(data: Path) -> Iterator[Labelled]:
    for row in lines(data / "math_samples_8x" / "math_cot_8samples.jsonl"):
        for text, right in zip(row["responses"], row["correct"], strict=True):
            yield "math_samples_8x", text, str(row["answer"]), bool(right)
    for row in lines(data / "skythought_traces" / "traces.jsonl"):
        text = row["response"].rpartition("<|begin_of_solution|>")[2]
        yield "skythought_traces", text, str(row["answer"]), bool(row["correct"])


def judged(data: Path) -> None:
    """The table of errors, and what was disagreed on."""
    found = list(labelled(data))
    samples = [Sample([], text, {"answer": expected}) for _, text, expected, _ in found]
    with Pool([MathReward(kind="math")], 2) as pool:
        outcomes = pool.check([(0, sample) for sample in samples])
    keys = ("right", "wrong", "false negative", "false positive", "could not judge")
    counts: dict[str, dict[str, Any]] = {}
    odd = []
    for (name, text, expected, right), outcome in zip(found, outcomes, strict=True):
        count = counts.setdefault(name, {"set": name, **dict.fromkeys(keys, 0)})
        count["right" if right else "wrong"] += 1
        if outcome.score is None:
            count["could not judge"] += 1
        elif (outcome.verdict == "right") != right:
            count["false negative" if right else "false positive"] += 1
            label, tail = "right" if right else "wrong", text[-90:].replace("\n", " ")
            odd.append(f"- {name}, labelled {label}: {expected!r}; {outcome.reason}; …{tail}")
    table(list(counts.values()))
    print("", *odd, sep="\n")


def speed(count: int) -> None:
    """Samples a second of each kind, processes started before."""
    asked = [{"role": "system", "content": "detailed thinking on"}]
    row = {
        "answer": "42",
        "instruction_id_list": ["length_constraints:number_words"],
        "kwargs": [{"relation": "at least", "num_words": 3}],
        "tests": "assert f(1) == 2",
        "setup": "",
    }
    code = "```python\ndef f(x):\n    return x + 1\n```"
    work: list[tuple[CheckedReward, str, int]] = [
        (ExactReward(kind="exact"), "Answer: 42", count),
        (NumberReward(kind="number"), "so it is 42", count),
        (FormatReward(kind="format"), "<think>a</think>b", count),
        (MathReward(kind="math"), "thus \\boxed{\\frac{84}{2}}", count),
        (InstructionsReward(kind="instructions"), "one two three four", count),
        (CodeReward(kind="code"), code, max(1, count // 40)),
    ]
    rows = []
    for reward, text, number in work:
        sample = Sample(asked, text, row)
        with Pool([reward], 2) as pool:
            pool.check([(0, sample)] * 2)
            begun = time.perf_counter()
            outcomes = pool.check([(0, sample)] * number)
            seconds = time.perf_counter() - begun
        assert all(outcome.verdict == "right" for outcome in outcomes), outcomes[0]
        rows.append({"reward": reward.kind, "samples a second": round(number / seconds)})
    table(rows)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--samples", type=int, default=2000)


def run(options: argparse.Namespace) -> None:
    if options.data.is_dir() and not options.smoke:
        judged(options.data)
    speed(options.samples)


if __name__ == "__main__":
    harness.main(__doc__, Command(run, arguments, {"samples": 20}))
