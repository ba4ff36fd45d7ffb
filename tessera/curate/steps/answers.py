"""Final answers: found in a text, brought to one form, compared.

    extract      `\\boxed{…}`, `#### …`, `the answer is …`          -> predicted_answer
    verify       predicted_answer against expected_answer           -> correct

A verifier has three outcomes: right, wrong, and None where it cannot judge. `equal` is the simple
one: the same text once normalised, or the same number.

What the samples of one problem tell together: the majority's answer, and the pass rate.

Where no answer is known, the answer that most samples give is the reference (arXiv 2505.00949 §3.1
and §3.3). The share of samples that are right is the difficulty that reinforcement learning goes
by. Both need every sample of a problem, wherever its rows stand: two hashes a row decide.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from tessera.curate.steps import Result, rows
from tessera.curate.steps.rows import Drop
from tessera.data.conversation import Chat
from tessera.runs.files import RunError
from tessera.runs.recipe import Config

Verifier = Callable[[str, str], bool | None]
_MARKED = re.compile(r"^[ \t]*####[ \t]*(.+)$", re.M)
_SAID = re.compile(
    r"(?:\banswer\b(?:[ \t]+is)?|^[ \t]*result)[ \t]*[:=]?[ \t*]*(?:is[ \t]+)?([^\n]+)", re.I | re.M
)
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?\Z")
_RATIO = re.compile(r"([-+]?\d+(?:\.\d+)?)/(\d+(?:\.\d+)?)\Z")
_NOISE = re.compile(r"\\(?:left|right|!|,|;|:|quad|displaystyle)(?![a-zA-Z])|\\text\{\s*\}|\s+")
_UNIT = re.compile(r"(?:\\%|%|\\\$|\$|\^\\circ|\^\{\\circ\}|\\text\{[^{}]*\}|\\mbox\{[^{}]*\})\Z")
_GROUPED = re.compile(r"(?<=\d),(?=\d{3}(?:\D|\Z))")
LONGEST = 400  # characters of a final answer; what is longer is no answer but a text


class Extract(Config):
    """Finds the final answer in the last answer's text and writes it into `predicted_answer`.

    source = "boxed" takes `\\boxed{…}` alone, as the paper's math data do; "any" what comes first
    of `\\boxed`, `####` and "answer is". to: the key written. required: rows without are left out.
    """

    step: Literal["extract_answer"]
    source: Literal["boxed", "any"] = "any"
    to: str = "predicted_answer"
    required: bool = True

    def apply(self, chat: Chat) -> Result:
        text = rows.answer(chat)
        found = boxed(text) if self.source == "boxed" else final_answer(text)
        if found is None:
            return Drop("no final answer") if self.required else chat
        return rows.tagged(chat, self.step, **{self.to: found})


class Verify(Config):
    """Compares `predicted_answer` with `expected_answer` and writes `correct`.

    verifier: "equal", "exact", or `package.module:function`, any function of the two texts that
    gives True, False or None, or an outcome whose `verdict` is "right", "wrong" or another word.
    keep: "correct" leaves out what is wrong or not judged; "all" keeps them for a pass rate. A row
    without an expected answer is passed on unjudged: `majority` comes before this step.
    """

    step: Literal["verify"]
    verifier: str = "equal"
    keep: Literal["correct", "all"] = "correct"

    def apply(self, chat: Chat) -> Result:
        expected, predicted = (chat.extra.get(f"{n}_answer") for n in ("expected", "predicted"))
        if expected is None:
            return chat
        right = self._judged(str(predicted), str(expected)) if predicted is not None else None
        if self.keep == "correct" and right is not True:
            return Drop("a wrong answer" if right is False else "an answer that cannot be judged")
        return rows.tagged(chat, self.step, correct=right)

    @functools.cached_property
    def _judged(self) -> Verifier:
        return VERIFIERS.get(self.verifier) or _imported(self.verifier)


def final_answer(text: str) -> str | None:
    """The last `\\boxed`, else the last `####` line, else what follows the last "answer is"."""
    found = boxed(text)
    if found is None and (marked := _MARKED.findall(text)):
        found = marked[-1]
    if found is None and (said := _SAID.findall(text)):
        found = said[-1]
    found = found.strip(" \t*").rstrip(".").strip(" \t*") if found else None
    return found if found and len(found) <= LONGEST else None


def boxed(text: str) -> str | None:
    """What the last `\\boxed{…}` holds, braces counted; None without a closed one."""
    at = len(text)
    while (at := text.rfind("\\boxed{", 0, at)) >= 0:
        begin, depth = at + len("\\boxed{"), 1
        for index in range(begin, min(len(text), begin + LONGEST + 1)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                return text[begin:index].strip() or None
    return None


def normalised(answer: str) -> str:
    """One form for many spellings: spaces, dollar signs, units, `\\frac` and thousands' commas."""
    text = answer.strip().strip("$").strip()
    text = _NOISE.sub("", text).lstrip("$").removeprefix("\\$")
    while (shorter := _UNIT.sub("", text)) != text and shorter:
        text = shorter
    text = _FRACTION.sub(r"\1/\2", _GROUPED.sub("", text))
    if value := number(text):
        return str(value)
    return re.sub(r"\\(?:text|mathrm|mathbf|mbox)\{([^{}]*)\}", r"\1", text).rstrip(".").lower()


def number(text: str) -> Fraction | None:
    """The exact value of a decimal, a fraction or a power of ten; None for anything else."""
    if ratio := _RATIO.match(text):
        below = Fraction(ratio[2])
        return Fraction(ratio[1]) / below if below else None
    return Fraction(text) if len(text) < 64 and _NUMBER.match(text) else None


def equal(predicted: str, expected: str) -> bool | None:
    """Whether two final answers are the same number, or the same text once normalised."""
    if not predicted.strip() or not expected.strip():
        return None
    return normalised(predicted) == normalised(expected)


def exact(predicted: str, expected: str) -> bool | None:
    """Whether two final answers are the same text, the white space around them apart."""
    return predicted.strip() == expected.strip()


def _imported(name: str) -> Verifier:
    """The verifier of `package.module:function`. Raises RunError where there is none."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise RunError(
            f"verifier = {name!r}: {error}; give package.module:function, or one of "
            + ", ".join(VERIFIERS)
        ) from None
    words = {"right": True, "wrong": False}

    def judged(predicted: str, expected: str) -> bool | None:
        outcome = found(predicted, expected)
        verdict = getattr(outcome, "verdict", outcome)
        return words.get(verdict) if isinstance(verdict, str) else verdict

    return judged


VERIFIERS: dict[str, Verifier] = {"equal": equal, "exact": exact}


class Majority(Config):
    """Makes the majority's `predicted_answer` the `expected_answer` where a row has none.

    Rows of the problem that answer otherwise are left out, and whole problems whose majority has
    under `min_votes` votes or under `min_share` of them. Of equal counts the first seen wins.
    Rows whose expected answer is known pass untouched.
    """

    step: Literal["majority"]
    min_votes: int = Field(default=2, ge=1)
    min_share: float = Field(default=0.0, ge=0, le=1)

    def digest(self, chats: Sequence[Chat]) -> NDArray[Any]:
        """(rows, 2): hashes of problem and answer, for which 0 is none and 1 known before."""
        found = np.zeros((len(chats), 2), np.uint64)
        for index, chat in enumerate(chats):
            found[index, 0] = text_hash(rows.question(chat))
            if chat.extra.get("expected_answer") is not None:
                found[index, 1] = 1
            elif (predicted := chat.extra.get("predicted_answer")) is not None:
                found[index, 1] = max(2, text_hash(normalised(str(predicted))))
        return found

    def decide(self, digests: NDArray[Any], seed: int) -> NDArray[Any]:
        """(rows,): 0 another answer, 1 the majority's, 2 known before, 3 too small a majority."""
        verdicts = np.where(digests[:, 1] == 1, 2, 0).astype(np.int8)
        voting = np.flatnonzero(digests[:, 1] >= 2)
        if not len(voting):
            return verdicts
        pairs, firsts, of, votes = np.unique(
            digests[voting], axis=0, return_index=True, return_inverse=True, return_counts=True
        )
        problems, problem = np.unique(pairs[:, 0], return_inverse=True)
        cast = np.bincount(problem, weights=votes, minlength=len(problems))
        order = np.lexsort((firsts, -votes, problem))
        best = order[np.flatnonzero(np.diff(problem[order], prepend=-1))]
        enough = (votes[best] >= self.min_votes) & (votes[best] >= self.min_share * cast)
        of = of.reshape(-1)
        won = best[problem[of]] == of
        verdicts[voting] = np.where(enough[problem[of]], won, 3)
        return verdicts

    def judge(self, chat: Chat, verdict: Any) -> Result:
        if verdict == 2:
            return chat
        if verdict != 1:
            return Drop("too small a majority" if verdict == 3 else "not the majority's answer")
        answer = chat.extra["predicted_answer"]
        return rows.tagged(chat, self.step, expected_answer=answer, correct=True)


class PassRate(Config):
    """Writes the share of right samples of each problem into `pass_rate`, and bounds it.

    Samples that could not be judged count for nothing; problems of those alone are kept unless a
    bound is given. Super and Ultra leave out what is solved too often (arXiv 2505.00949 §5).
    """

    step: Literal["pass_rate"]
    min: float = Field(default=0.0, ge=0, le=1)
    max: float = Field(default=1.0, ge=0, le=1)

    def digest(self, chats: Sequence[Chat]) -> NDArray[Any]:
        """(rows, 2): the hash of the problem, and 0 wrong, 1 right, 2 not judged."""
        said = [chat.extra.get("correct") for chat in chats]
        marks = [int(one) if isinstance(one, bool) else 2 for one in said]
        hashes = [text_hash(rows.question(chat)) for chat in chats]
        return np.array([hashes, marks], np.uint64).T.reshape(len(chats), 2)

    def decide(self, digests: NDArray[Any], seed: int) -> NDArray[Any]:
        """(rows,) shares; -1 where none was judged."""
        _, problem = np.unique(digests[:, 0], return_inverse=True)
        judged = np.bincount(problem, digests[:, 1] < 2)
        right = np.bincount(problem, digests[:, 1] == 1)
        share = np.where(judged > 0, right / np.maximum(judged, 1), -1.0)
        return share[problem]

    def judge(self, chat: Chat, verdict: Any) -> Result:
        bounded = self.min > 0 or self.max < 1
        if verdict < 0:
            return Drop("no sample was judged") if bounded else chat
        if not self.min <= verdict <= self.max:
            return Drop(f"pass rate {'under' if verdict < self.min else 'over'} the bound")
        return rows.tagged(chat, self.step, pass_rate=round(float(verdict), 4))


def text_hash(text: str) -> int:
    """64 bits of a text, the white space around it apart."""
    return int.from_bytes(blake2b(text.strip().encode("utf-8", "replace"), digest_size=8).digest())
