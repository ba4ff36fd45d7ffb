"""What a program checks: HumanEval and MBPP by tests in the jail, IFEval by its instructions."""

from __future__ import annotations

from collections.abc import Iterator

from tessera.eval.task import Data, Item, Measure, Task, ask
from tessera.rl.rewards import CodeReward, InstructionsReward

BLOCK = "Put the whole program into one ```python block."
MBPP_TEST = range(11, 511)  # the test split; 1-10 are for prompts, the rest for training


def humaneval(data: Data) -> Iterator[Item]:
    for row in data.rows("humaneval/HumanEval.jsonl", "openai/openai_humaneval::test"):
        question = (
            f"Complete this function.\n\n```python\n{row['prompt'].rstrip()}\n```\n\n{BLOCK} It "
            "must hold the imports and helpers that the function needs."
        )
        tests = f"{row['test']}\ncheck({row['entry_point']})\n"
        yield Item(str(row["task_id"]), ask(question), {"tests": tests, "setup": ""})


def mbpp(data: Data) -> Iterator[Item]:
    """What the function is called is told by its first assert, as in the paper's prompt."""
    for row in data.rows("mbpp/mbpp.jsonl", "google-research-datasets/mbpp:full:test"):
        if int(row["task_id"]) not in MBPP_TEST:
            continue
        asserts = "\n".join(row["test_list"])
        tests = f"Your code has to pass:\n\n```python\n{asserts}\n```"
        question = f"{row['text'].strip()}\n\n{tests}\n\n{BLOCK}"
        fields = {"tests": asserts, "setup": row["test_setup_code"] or ""}
        yield Item(str(row["task_id"]), ask(question), fields)


def ifeval(data: Data) -> Iterator[Item]:
    """arXiv 2311.07911. Arguments that a row does not use are null in the hub's copy."""
    for row in data.rows("ifeval/input_data.jsonl", "google/IFEval::train"):
        names = row["instruction_id_list"]
        arguments = [
            {key: value for key, value in one.items() if value is not None} for one in row["kwargs"]
        ]
        fields = {"instruction_id_list": names, "kwargs": arguments, "instructions": len(names)}
        yield Item(str(row["key"]), ask(row["prompt"]), fields)


def _measure(name: str, loose: bool, partial: bool) -> Measure:
    reward = InstructionsReward(kind="instructions", loose=loose, partial=partial)
    return Measure(name, reward, "instructions" if partial else "")


PASSES = (Measure("accuracy", CodeReward(kind="code")),)
FOLLOWED = (
    _measure("prompt_strict", False, False),
    _measure("instruction_strict", False, True),
    _measure("prompt_loose", True, False),
    _measure("instruction_loose", True, True),
)
TASKS = (
    Task("humaneval", humaneval, PASSES),
    Task("mbpp", mbpp, PASSES),
    Task("ifeval", ifeval, FOLLOWED),
)
