"""The checkers: how often the mathematical one errs on labelled answers, and how fast all are.

    python benchmarks/rewards.py judged [--data ../shared/data] [--samples 2000]
    python benchmarks/rewards.py ifeval [--texts 300]    # against lm-evaluation-harness's checker
    python benchmarks/rewards.py peers --tests DIR       # Math-Verify's tests, of a clone of it

Labelled: 95 problems with eight sampled answers each and whether they are right (math_samples_8x),
and 70 long traces with theirs (skythought_traces). A label is another checker's word, so every
disagreement is printed to be judged by eye. Speed: through the pool, two workers, one thread each.
The official IFEval checker finds its model of sentences in the package that ships it.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import tempfile
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
from tessera.rl.verifiers.instructions import CONSTRAINTS, Instruction, follow_list
from tessera.rl.verifiers.mathematics import verify_math

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


def official(folder: Path) -> Any:
    """The registry of lm-evaluation-harness's IFEval, its sentence model written to a folder."""
    try:
        import nltk
        from nltk.tokenize.punkt import save_punkt_params

        from tessera.rl.verifiers.english import require_library

        home = folder / "tokenizers" / "punkt_tab" / "english"
        home.mkdir(parents=True)
        nltk.data.path.insert(0, str(folder))  # nltk writes only where it reads
        save_punkt_params(require_library()._params, dir=str(home))
        from lm_eval.tasks.ifeval import instructions_registry
    except ImportError as error:
        harness.skip(f"needs lm-eval and {error.name}")
    return instructions_registry.INSTRUCTION_DICT


def follows(registry: Any, name: str, given: dict[str, Any], prompt: str, text: str) -> bool:
    checker = registry[name](name)
    checker.build_description(**{key: value for key, value in given.items() if value})
    if "prompt" in (checker.get_instruction_args() or ()):
        checker.build_description(prompt=prompt)
    return bool(text.strip()) and bool(checker.check_following(text))


def ifeval(options: argparse.Namespace) -> None:
    """How many of the verdicts on texts and instructions are the official ones, by instruction."""
    harness.need(options.data / "ifeval" / "input_data.jsonl")
    asked: dict[str, tuple[str, dict[str, Any], str]] = {}
    for row in lines(options.data / "ifeval" / "input_data.jsonl"):
        for name, given in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            used = {key: value for key, value in given.items() if value is not None}
            asked.setdefault(json.dumps([name, used]), (name, used, row["prompt"]))
    texts = [one["response"] for one in lines(options.data / "ifeval" / "gpt4_responses.jsonl")]
    with tempfile.TemporaryDirectory() as folder:
        registry = official(Path(folder))
        counts = {name: {"instruction": name, "pairs": 0, "equal": 0} for name in CONSTRAINTS}
        for text in texts[: options.texts]:
            for name, given, prompt in asked.values():
                ours = follow_list(text, [Instruction(name, given)])[0]
                counts[name]["pairs"] += 1
                counts[name]["equal"] += ours == follows(registry, name, given, prompt, text)
    table([*counts.values()])


def peers(options: argparse.Namespace) -> None:
    """Which pairs of Math-Verify's tests have its verdict; the others are printed."""
    if options.tests is None:
        harness.skip("give --tests, the folder `tests` of a clone of Math-Verify")
    rows = []
    for file in sorted(options.tests.glob("test_*.py")):
        pairs = list(parametrized(file))
        equal = 0
        for gold, given, right in pairs:
            outcome = verify_math(given, gold)
            same = (outcome.verdict == "right") == right and outcome.score is not None
            equal += same
            if not same:
                print(f"- {file.stem}: {outcome.verdict}: {given[-80:]!r} for {gold[-80:]!r}")
        rows.append({"file": file.stem, "pairs": len(pairs), "equal": equal})
    table(rows)


def parametrized(file: Path) -> Iterator[tuple[str, str, bool]]:
    """Gold, answer and whether it is right, of the `parametrize` marks of a file of tests."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith("parametrize"):
            continue
        keys = ast.literal_eval(node.args[0])
        keys = [key.strip() for key in keys.split(",")] if isinstance(keys, str) else keys
        if not {"gold", "pred"} <= set(keys):
            continue
        for values in eval(ast.unparse(node.args[1]), {"math": math}):
            row = dict(zip(keys, values, strict=False))
            right = row.get("expected", row.get("result"))
            if isinstance(right, int) and isinstance(row["gold"], str):
                yield row["gold"], row["pred"], bool(right)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--samples", type=int, default=2000)


def texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--texts", type=int, default=300)


def folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tests", type=Path)


def run(options: argparse.Namespace) -> None:
    if options.data.is_dir() and not options.smoke:
        judged(options.data)
    speed(options.samples)


if __name__ == "__main__":
    harness.main(
        __doc__,
        {
            "judged": Command(run, arguments, {"samples": 20}),
            "ifeval": Command(ifeval, texts, {"texts": 1}),
            "peers": Command(peers, folder),
        },
    )
