"""Task-aimed scoring: what a replacement costs in answers, not in likelihood of text (Puzzle §2.4).

    task.NAME           mean -log π of the reference answer's tokens given the prompt, nats a token
    task.NAME.accuracy  share of the problems whose answer greedy decoding would give

No text is generated for either. Greedy decoding yields the reference iff each of its tokens is the
likeliest one after the prompt and the reference tokens before it, so one forward pass decides, and
replace-one scoring reuses the parent's hidden states as it does for text. Only the answer is
judged, not what would follow it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.data.batch import Batch, best_fit, collate, shift
from tessera.data.tasks import problem
from tessera.data.tokenizer import Tokenizer, load_tokenizer
from tessera.model.cpu import multiply
from tessera.model.transformer import Transformer
from tessera.runs.manifest import read_json
from tessera.train.losses import chunks

Text = tuple[str, str]  # prompt, answer: together they are the document


class TaskError(ValueError):
    """A task that cannot be scored; the text says which problem and what to change."""


@dataclass(frozen=True)
class Answers:
    """One batch of a task's problems; only the tokens of answers are looked at.

    at: flat positions `(N,)` of the predictions of answer tokens; labels `(N,)` those tokens;
    problem `(N,)` which of the batch's `count` problems each belongs to.
    """

    task: str
    batch: Batch
    at: Tensor
    labels: Tensor
    problem: Tensor
    count: int

    @classmethod
    def of(cls, task: str, batch: Batch) -> Answers:
        """batch: rows of problems, one a segment, weight 1 on the predictions of answers."""
        at = batch.weight.flatten().nonzero().squeeze(1)
        row = torch.arange(len(batch.tokens)).repeat_interleave(batch.tokens.shape[1])
        segment = row * batch.tokens.shape[1] + batch.segments.flatten()
        numbers, problem = segment[at].unique(return_inverse=True)
        return cls(task, batch, at, batch.labels.flatten()[at], problem, len(numbers))

    def measure(self, module: Transformer, x: Tensor) -> dict[str, float]:
        """Sums of both metrics and of their weights for a variant whose last layer x leaves."""
        hidden = module.norm(x).flatten(0, 1)[self.at]
        loss, wrong = 0.0, torch.zeros(self.count, dtype=torch.long)
        for part in chunks(hidden, len(module.head)):
            logits = multiply(hidden[part], module.head).float()
            loss += float(F.cross_entropy(logits, self.labels[part], reduction="sum"))
            missed = logits.argmax(-1) != self.labels[part]
            wrong.index_add_(0, self.problem[part], missed.long())
        own = f"task.{self.task}"
        return {
            own: loss,
            f"{own}.accuracy": float((wrong == 0).sum()),
            f"{own}.tokens": float(len(self.at)),
            f"{own}.problems": float(self.count),
        }


def load_tasks(
    tasks: Mapping[str, int | str], data: Path, *, work: bool, limit: int, row_length: int
) -> list[Answers]:
    """The problems of every task, tokenised as the documents of the data run are.

    tasks: name -> how many held-out problems of our own, or a file of {prompt, answer} lines of
    which the first `limit` are taken. row_length: positions of a batch, and the longest problem.
    """
    tokenizer, bos = load_tokenizer(data), bool(read_json(data, "data")["bos"])
    found = []
    for name, source in tasks.items():
        if isinstance(source, str):
            texts = read_problems(Path(source), limit)
        else:
            texts = list(drawn(name, source, work))
        problems = [encode(tokenizer, text, bos) for text in texts]
        found += pack_problems(name, problems, row_length, tokenizer.pad_id)
    return found


def drawn(name: str, count: int, work: bool) -> Iterator[Text]:
    """Held-out problems of a procedural task, as their documents are written.

    With `work` the reference is the whole solution, without it the answer alone.
    """
    for index in range(count):
        one = problem(name, 0, index, "heldout")
        text = one.text(work)
        prompt = f"{one.question}\n" + ("Work:" if work else "Answer:")
        yield prompt, text.removeprefix(prompt)


def read_problems(file: Path, limit: int) -> list[Text]:
    """The first `limit` problems of a file, one {"prompt": …, "answer": …} a line.

    Raises TaskError naming the line that is none.
    """
    found: list[Text] = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if len(found) == limit:
                break
            if line.strip():
                found.append(_parsed(line, f"{file}, line {number}"))
    if not found:
        raise TaskError(f"{file} holds no problem")
    return found


def _parsed(line: str, where: str) -> Text:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TaskError(f"{where}: no JSON: {error}") from None
    match row:
        case {"prompt": str(prompt), "answer": str(answer)} if prompt and answer:
            return prompt, answer
    raise TaskError(f'{where}: give an object {{"prompt": "…", "answer": "…"}} of texts')


def encode(tokenizer: Tokenizer, text: Text, bos: bool) -> tuple[list[int], int]:
    """(ids of the document, where its answer begins).

    The document is tokenised whole, as in training; the answer begins at the first id that the
    prompt alone does not begin with.
    """
    prompt = tokenizer.encode(text[0], bos)
    whole = tokenizer.encode(text[0] + text[1], bos)
    pairs = zip(prompt, whole, strict=False)
    return whole, next((i for i, (a, b) in enumerate(pairs) if a != b), len(prompt))


def pack_problems(
    task: str, problems: Sequence[tuple[Sequence[int], int]], row_length: int, pad_id: int
) -> list[Answers]:
    """Problems (ids, where the answer begins) in batches of one row.

    Raises TaskError for a problem that no row holds, and for one without a prompt or an answer.
    """
    samples = []
    for number, (ids, start) in enumerate(problems, 1):
        if not 0 < start < len(ids) <= row_length + 1:
            raise TaskError(
                f"task {task}: problem {number} has {start} tokens of prompt and {len(ids) - start}"
                f" of answer; give at least one of each, and no more than score.microbatch_tokens "
                f"= {row_length} together"
            )
        samples.append(shift(ids, (np.arange(len(ids)) >= start).astype(float).tolist()))
    lengths = [len(sample) for sample in samples]
    length = min(row_length, sum(lengths))  # a few problems need no row of full length
    return [
        Answers.of(task, collate([[samples[i] for i in row]], length, pad_id))
        for row in best_fit(lengths, length)
    ]
