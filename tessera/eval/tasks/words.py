"""IFEval: whether a response follows instructions that a program can check (arXiv 2311.07911)."""

from __future__ import annotations

from collections.abc import Iterator

from tessera.eval.task import Data, Item, Measure, Task, ask
from tessera.rl.rewards import InstructionsReward


def ifeval(data: Data) -> Iterator[Item]:
    """Arguments that a row does not use are null in the hub's copy, and are left out."""
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


TASKS = (
    Task(
        "ifeval",
        ifeval,
        (
            _measure("prompt_strict", False, False),
            _measure("instruction_strict", False, True),
            _measure("prompt_loose", True, False),
            _measure("instruction_loose", True, True),
        ),
    ),
)
