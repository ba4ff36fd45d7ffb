"""Mathematics with a final answer in a box: GSM8K, MATH-500, AIME, AMC; and GPQA's four choices."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

from tessera.eval.task import Data, EvalError, Item, Measure, Task, ask
from tessera.rl.rewards import ChoiceReward, MathReward

BOX = "\n\nThink it through step by step. Put your final answer in \\boxed{}."
CHOICE = (
    "\n\nThink it through step by step. The last line of your response must be "
    "'Answer: LETTER', where LETTER is one of A, B, C and D."
)
ACCURACY = Measure("accuracy", MathReward(kind="math"))
ANSWERS = ("expected_answer", "answer", "Answer")
HUB_GPQA = "Idavidrein/gpqa:gpqa_diamond:train"
QUESTIONS = ("problem", "question", "Problem", "Question", "prompt")


def _first(row: dict[str, Any], names: tuple[str, ...], task: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise EvalError(f"{task}: a row has none of the fields {', '.join(names)}: {list(row)}")


def gsm8k(data: Data) -> Iterator[Item]:
    """The number behind `####` is the answer."""
    for index, row in enumerate(data.rows("gsm8k/test.jsonl", "openai/gsm8k:main:test")):
        answer = str(_first(row, ("answer",), data.task)).rpartition("####")[2]
        answer = answer.strip().replace(",", "")
        question = _first(row, ("question",), data.task)
        yield Item(str(index), ask(question + BOX), {"answer": answer})


def math500(data: Data) -> Iterator[Item]:
    for row in data.rows("math500/test.jsonl", "HuggingFaceH4/MATH-500::test"):
        groups = {"level": row.get("level"), "subject": row.get("subject")}
        question = _first(row, ("problem",), data.task) + BOX
        yield Item(str(row["unique_id"]), ask(question), {"answer": row["answer"]}, groups)


def contest(file: str, hub: str, data: Data) -> Iterator[Item]:
    """Sets of contest problems, whose rows differ in names and in who asks for the box."""
    for index, row in enumerate(data.rows(file, hub)):
        question = str(_first(row, QUESTIONS, data.task))
        if "\\boxed" not in question:
            question += BOX
        answer = _first(row, ANSWERS, data.task)
        if isinstance(answer, float) and answer.is_integer():
            answer = int(answer)
        yield Item(str(row.get("id", index)), ask(question), {"answer": str(answer)})


def gpqa(data: Data) -> Iterator[Item]:
    """The user's own file: its authors ask that it is not passed on in plain text.

    The right answer's place is drawn from the question, so that it is the same in every run.
    """
    for index, row in enumerate(data.rows("gpqa/diamond.jsonl", HUB_GPQA)):
        wrong = [row[f"Incorrect Answer {n}"] for n in (1, 2, 3)]
        options = [str(one).strip() for one in (row["Correct Answer"], *wrong)]
        order = list(range(4))
        random.Random(str(row["Question"])).shuffle(order)
        listed = "\n".join(f"{'ABCD'[n]}) {options[at]}" for n, at in enumerate(order))
        question = f"{str(row['Question']).strip()}\n\n{listed}{CHOICE}"
        groups = {"domain": row.get("High-level domain")}
        yield Item(str(index), ask(question), {"answer": "ABCD"[order.index(0)]}, groups)


TASKS = (
    Task("gsm8k", gsm8k, (ACCURACY,)),
    Task("math500", math500, (ACCURACY,), groups=("level", "subject")),
    *(
        Task(name, partial(contest, f"aime/{name}.jsonl", hub), (ACCURACY,))
        for name, hub in (
            ("aime24", "HuggingFaceH4/aime_2024::train"),
            ("aime25", "math-ai/aime25::test"),
            ("aime26", ""),
            ("amc23", "math-ai/amc23::test"),
        )
    ),
    Task(
        "gpqa",
        gpqa,
        (Measure("accuracy", ChoiceReward(kind="choice", choices=4)),),
        groups=("domain",),
    ),
)
