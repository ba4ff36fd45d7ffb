"""Answers that another model judges: MT-Bench, Arena-Hard; and JudgeBench, where the model judges.

JudgeBench's accuracy is that of single judgements, each order an item of its own (arXiv 2410.12784
counts a pair, and may come out lower).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial

from tessera.data.conversation import Message
from tessera.data.thought import split
from tessera.eval.task import Data, Item, Judging, Measure, Task, ask
from tessera.rl.rewards import ExactReward

MARK = (
    "You grade answers to users' questions. Judge the last answer of the conversation below by how "
    "helpful, relevant, correct, deep and detailed it is; longer is not better. Say in a few "
    "sentences what is good and what is wrong about it. Then end with one line: Rating: [[N]], N "
    "a number from 1 to 10."
)
DUEL = (
    "You compare two answers to one question. First answer the question yourself. Then compare the "
    "two with yours: what is wrong, missing, or not needed. Their order and length say "
    "nothing of their quality. End with one line that holds one of these verdicts: [[A>>B]] A is "
    "much better, [[A>B]] better, [[A=B]] they are about as good, [[B>A]], [[B>>A]]."
)
RIGHT = (
    "Two responses to one question follow, of which exactly one is right. Work the question out "
    "before you decide. End with one line: Answer: A, or Answer: B."
)
_MARK = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
_VERDICT = re.compile(r"\[\[(A>>B|A>B|A=B|B>A|B>>A)\]\]")
_SHARE = {"A>>B": 1.0, "A>B": 1.0, "A=B": 0.5, "B>A": 0.0, "B>>A": 0.0}


def mt_bench(data: Data) -> Iterator[Item]:
    references = {}
    if data.path("mt_bench/reference_answer_gpt-4.jsonl"):
        for row in data.rows("mt_bench/reference_answer_gpt-4.jsonl"):
            references[row["question_id"]] = row["choices"][0]["turns"]
    for row in data.rows("mt_bench/question.jsonl", "HuggingFaceH4/mt_bench_prompts::train"):
        first, *rest = row.get("turns") or row["prompt"]
        key = row.get("question_id", row.get("prompt_id"))
        fields = {"references": references.get(key, ())}
        yield Item(str(key), ask(first), fields, {"category": row["category"]}, tuple(rest))


def marks(item: Item, chat: Sequence[Message]) -> list[list[Message]]:
    """One question a turn, each showing the conversation up to its answer."""
    asked, references = [], list(item.fields["references"])
    for turn, end in enumerate(range(len(item.messages) + 1, len(chat) + 1, 2)):
        text = "\n\n".join(
            f"[{m['role']}]\n{_said(m)}" for m in chat[:end] if m["role"] != "system"
        )
        if turn < len(references):
            text += f"\n\n[a reference answer to the last question]\n{references[turn]}"
        asked.append(ask(text, MARK))
    return asked


def mean_mark(replies: Sequence[str]) -> float | None:
    """The mean of the marks; None where a reply has none between 1 and 10."""
    found = [_MARK.findall(reply) for reply in replies]
    values = [float(one[-1]) if one else 0.0 for one in found]
    return sum(values) / len(values) if values and all(1 <= v <= 10 for v in values) else None


def arena_hard(data: Data) -> Iterator[Item]:
    baseline = {}
    for row in data.rows("arena_hard/v0.1_baseline_answer_gpt-4-0314.jsonl"):
        content = row["messages"][-1]["content"]
        baseline[row["uid"]] = content["answer"] if isinstance(content, dict) else content
    for row in data.rows("arena_hard/v0.1_question.jsonl", "lmarena-ai/arena-hard-auto::train"):
        fields = {"baseline": baseline[row["uid"]]}
        yield Item(str(row["uid"]), ask(row["prompt"]), fields, {"cluster": row.get("cluster")})


def duels(item: Item, chat: Sequence[Message]) -> list[list[Message]]:
    """The same two answers, ours first and ours second."""
    question, ours = item.messages[-1]["content"], _said(chat[-1])
    orders = ((ours, item.fields["baseline"]), (item.fields["baseline"], ours))
    return [ask(_pair(question, *answers), DUEL) for answers in orders]


def win_share(replies: Sequence[str]) -> float | None:
    """Wins and half of the ties over both orders; None where a verdict is missing."""
    found = [_VERDICT.findall(reply) for reply in replies]
    if not found or not all(found):
        return None
    shares = [_SHARE[one[-1]] for one in found]
    return sum(share if n % 2 == 0 else 1 - share for n, share in enumerate(shares)) / len(shares)


def judgebench(file: str, data: Data) -> Iterator[Item]:
    """Both orders of a pair are two items."""
    for row in data.rows(f"judgebench/{file}.jsonl", "ScalerLab/JudgeBench::gpt"):
        better = row["label"][0]
        for order in ("AB", "BA"):
            responses = [row[f"response_{name}"] for name in order]
            fields = {"answer": "AB"[order.index(better)]}
            groups = {"source": str(row["source"]).split("-")[0]}
            question = _pair(row["question"], *responses)
            yield Item(f"{row['pair_id']}-{order}", ask(question, RIGHT), fields, groups)


def _pair(question: str, a: str, b: str) -> str:
    return f"[question]\n{question}\n\n[response A]\n{a}\n\n[response B]\n{b}"


def _said(message: Message) -> str:
    text = message["content"]
    return split(text).answer if message["role"] == "assistant" else text


TASKS = (
    Task("mt_bench", mt_bench, (), Judging("mark", marks, mean_mark), groups=("category",)),
    Task("arena_hard", arena_hard, (), Judging("win_rate", duels, win_share)),
    *(
        Task(
            name,
            partial(judgebench, file),
            (Measure("accuracy", ExactReward(kind="exact")),),
            groups=("source",),
        )
        for name, file in (
            ("judgebench", "judgebench_gpt-4o-2024-05-13"),
            ("judgebench_claude", "judgebench_claude-3-5-sonnet-20240620"),
        )
    ),
)
