"""RLOO on instruction checkers: does it raise what it is rewarded for, on questions it never saw?

    python benchmarks/instructions.py RUNS [--seeds 0 1 2]

RUNS holds what benchmarks/quickstart.py made (RUNS/quickstart-SEED/sft). Every question of the toy
comes with two of IFEval's instructions. A short fine-tuning on answers of which half leave one of
the two out makes a model that follows them some of the time; RLOO (Llama-Nemotron §5.2) is rewarded
by the checkers alone, both followed or nothing, and as much for the switch. Measured is IFEval's
prompt-level strict share on 200 held-out questions, reasoning on and off, beside whether the
question is still answered rightly, which nothing rewards.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tessera.data.problems import Problem, problem
from tessera.data.thought import CLOSE, OPEN
from tessera.pipeline import run_recipe
from tessera.runs.recipe import loads
from tessera.runs.run import read_manifest, read_table
from tessera.table import render_table

WORDS = list("bdfghjmpqvxz")  # a token each, and none of "Answer" and the filler "k"
RECIPE = """
name = "instructions-{seed}"
seed = {seed}
[data]
model = "{sft}"
paths = ["{home}/chats.jsonl"]
format = "chat"
heldout = 100
[sft]
model = "{sft}"
[sft.train]
steps = 600
tokens_per_step = 1536
microbatch_tokens = 768
sequence_length = 192
lr = 2e-3
[profile]
model = "sft"
paths = ["{home}/prompts.jsonl"]
off = 0.5
samples = 0
[rloo]
model = "sft"
prompts_per_rollout = 24
samples = 12
max_tokens = 96
rewards = [{{ kind = "instructions" }}, {{ kind = "format", weight = 1.0 }}]
kl = 0.02
train = {{ steps = 150, microbatch_tokens = 3072, lr = 3e-4, schedule = "constant" }}
[eval-sft]
stage = "eval"
model = "sft"
tasks = ["ifeval"]
data = "{home}/heldout.jsonl"
max_tokens = 96
on = {{ temperature = 0.0 }}
[eval-rloo]
stage = "eval"
model = "rloo"
tasks = ["ifeval"]
data = "{home}/heldout.jsonl"
max_tokens = 96
on = {{ temperature = 0.0 }}
"""

Follow = Callable[[list[str]], list[str]]  # the words of an answer, changed so that it follows
Drawn = tuple[str, str, dict[str, Any], Follow]  # what is said, its name, its arguments


def instructions(chance: random.Random) -> list[Drawn]:
    """Two of the kinds, in an order that lets an answer follow both."""
    word, last = chance.sample(WORDS, 2)
    count, times = chance.randint(4, 9), chance.randint(2, 4)
    least = {"relation": "at least"}
    kinds: list[Drawn] = [
        (
            f"say {word} {times} times",
            "keywords:frequency",
            {"keyword": word, "frequency": times, **least},
            lambda said: [*said, *[word] * times],
        ),
        (
            f"use {count} words",
            "length_constraints:number_words",
            {"num_words": count, **least},
            lambda said: [*said, *["k"] * max(0, count - len(said))],
        ),
        (
            f"end with {last}",
            "startend:end_checker",
            {"end_phrase": last},
            lambda said: [*said, last],
        ),
        (
            "in quotes",
            "startend:quotation",
            {},
            lambda said: [f'"{said[0]}', *said[1:-1], f'{said[-1]}"'],
        ),
    ]
    first, second = sorted(chance.sample(range(len(kinds)), 2))
    return [kinds[first], kinds[second]]


def asked(one: Problem, drawn: list[Drawn]) -> str:
    return f"{one.question}\n{drawn[0][0]}, {drawn[1][0]}"


def chat(one: Problem, drawn: list[Drawn], chance: random.Random) -> dict[str, Any]:
    """A conversation in either mode; half of the answers leave one instruction out."""
    mode, missing = chance.choice(["on", "off"]), chance.choice([0, 1, None, None])
    said = ["Answer:", one.answer]
    for number, (_, _, _, follow) in enumerate(drawn):
        said = said if number == missing else follow(said)
    thought = f"{OPEN}\nWork: {one.work}\n{CLOSE}\n\n" if mode == "on" else ""
    turns = [
        {"role": "system", "content": f"detailed thinking {mode}"},
        {"role": "user", "content": asked(one, drawn)},
        {"role": "assistant", "content": thought + " ".join(said)},
    ]
    return {"messages": turns}


def write(home: Path, seed: int) -> None:
    """chats.jsonl to imitate, prompts.jsonl to be rewarded for, heldout.jsonl to be measured by."""
    home.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)

    def drawn(count: int, split: Any) -> list[tuple[Problem, list[Drawn]]]:
        return [
            (problem("calc", seed, index, split, 2), instructions(chance)) for index in range(count)
        ]

    def save(name: str, rows: list[dict[str, Any]]) -> None:
        (home / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    save("chats.jsonl", [chat(*pair, chance) for pair in drawn(4000, "train")])
    prompts, heldout = [], []
    for one, pair in drawn(600, "train"):
        messages = [{"role": "user", "content": asked(one, pair)}]
        prompts.append({"messages": messages, **told(pair), "answer": one.answer})
    for number, (one, pair) in enumerate(drawn(200, "heldout")):
        row = {"key": number, "prompt": asked(one, pair), "answer": one.answer}
        heldout.append(row | told(pair))
    save("prompts.jsonl", prompts)
    save("heldout.jsonl", heldout)


def told(pair: list[Drawn]) -> dict[str, Any]:
    return {"instruction_id_list": [one[1] for one in pair], "kwargs": [one[2] for one in pair]}


def right(run: Path, home: Path, mode: str) -> float:
    """The share of held-out questions that are answered rightly, whatever is said around it."""
    lines = (home / "heldout.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    answers = {str(row["key"]): row["answer"] for row in map(json.loads, lines)}
    found = []
    for line in (run / "records.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        record = json.loads(line)
        if record["mode"] == mode:
            text = record["text"].partition("Answer: ")[2]
            found.append(text[:1] == answers[record["item"]])
    return statistics.mean(found)


def ran(seed: int, runs: Path) -> list[dict[str, Any]]:
    """Rows before and after, in each mode."""
    sft = (runs / f"quickstart-{seed}" / "sft").resolve()
    home = (runs / f"instructions-data-{seed}").resolve()
    write(home, seed)
    run_recipe(loads(RECIPE.format(seed=seed, sft=sft, home=home)), runs, quiet=True)
    made = runs / f"instructions-{seed}"
    rows = []
    for name in ("sft", "rloo"):
        for found in read_table(made / f"eval-{name}", "eval"):
            row = {"model": name, "seed": seed, "mode": found["mode"]}
            row |= {"strict": found["value"], "obedience": found["obedience"]}
            row |= {"right": right(made / f"eval-{name}", home, found["mode"])}
            row |= {"tokens": round(found["tokens"], 1)}
            rows.append(row | {"seconds": round(read_manifest(made / name).seconds, 1)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    if options.runs is None:
        print("skipped: give the runs of benchmarks/quickstart.py")
        return
    rows = [row for seed in options.seeds for row in ran(seed, options.runs)]
    print(render_table(rows))
    told = []
    for mode in ("on", "off"):
        for name in ("sft", "rloo"):
            found = [row["strict"] for row in rows if (row["model"], row["mode"]) == (name, mode)]
            told.append({"model": name, "mode": mode, "strict, mean": statistics.mean(found)})
            told[-1]["spread"] = statistics.stdev(found) if len(found) > 1 else 0.0
    print(f"\n{render_table(told)}")


if __name__ == "__main__":
    main()
