"""The steps that ask a model: solutions, problems out of forums, classes, answers, judgements.

The pipelines of arXiv 2505.00949 §3.1 to §3.4. Prompts ask for a last line `KEY: VALUE`; a reply
without it says nothing. A recipe may give a prompt of its own, with the same fields in braces.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field

from tessera.ask import judge
from tessera.ask.ask import Reply, Request
from tessera.ask.judge import fill
from tessera.curate.steps import rows
from tessera.curate.steps.rows import AskStep, Drop, Result
from tessera.data.conversation import Chat, Message, Mode, switch_of
from tessera.data.switch import DETAILED, Switch, set_switch

EXTRACT = """\
Below is the beginning of a discussion in a forum about mathematics. If it poses one or more \
problems that can be understood without the rest of the discussion, write each of them out in \
full, with everything it needs and nothing of its solution: one problem after another, each \
preceded by a line that holds only `PROBLEM:`. If it poses none, write only `NONE`.

{text}"""

ANSWER = """\
Below are a problem and a discussion of it. If somebody in the discussion gives the final answer \
to the problem, write it in its shortest form as the last line of your reply, like this: \
`ANSWER: 42`. If nobody does, or they disagree, the last line is `ANSWER: NONE`.

Problem:
{question}

Discussion:
{text}"""

KINDS = {
    "proof": "does it ask to prove or show something, instead of asking for a value",
    "multiple_choice": "does it ask to choose among options that it lists",
    "binary": "is its answer one of two words, such as yes or no, or true or false",
    "invalid": "does it lack context that is needed to solve it, refer to another problem, or "
    "state no problem at all",
}

CLASSIFY = """\
Here is a problem:

{question}

Concerning this problem: {what}? Think about it briefly, then end with the line `VERDICT: yes` or \
`VERDICT: no`."""

_ANSWER = re.compile(r"^[ \t*`]*answer:[ \t]*(.+?)[ \t*`]*$", re.I | re.M)
_PROBLEM = re.compile(r"^[ \t*`#]*problem:[ \t*`]*$", re.I | re.M)


def told_answer(reply: str) -> str | None:
    """The last answer line of a reply; None without one, or where it says NONE."""
    found = _ANSWER.findall(reply)
    return None if not found or found[-1].strip().upper() == "NONE" else found[-1].strip()


def told_problems(reply: str) -> list[str]:
    """The problems that a reply lists."""
    return [text for part in _PROBLEM.split(reply)[1:] if (text := part.strip())]


class ChatStep(AskStep):
    """A step that asks for text, greedily unless its table says otherwise."""

    max_tokens: int = Field(default=2048, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)

    def ask(self, messages: list[Message], sample: int = 0, mode: Mode | None = None) -> Request:
        sampling = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        return Request(self.teacher, messages, {**sampling, "top_p": self.top_p}, sample, mode)

    def prompt(self, text: str) -> Request:
        """A request with one message."""
        return self.ask([{"role": "user", "content": text}])

    def receive(self, chat: Chat, replies: Sequence[Reply]) -> Result:
        error = replies[0].error
        return self.failed(error) if error else self.take(chat, replies[0].answer)

    def take(self, chat: Chat, reply: str) -> Result:
        """What becomes of a row, given the text of its one reply."""
        raise NotImplementedError


class Generate(ChatStep):
    """Samples `n` answers a row, each a row of its own; the paper took 16 of R1 a problem (§3.1).

    mode: what the row is to teach, its `reasoning`. "on" leaves out answers without a thought,
    "off" removes the thought. switch: how the teacher is told (data/switch.py); without one, a
    teacher of this process is told by its own, and an endpoint is not told: R1 thinks without it.
    instruction: added to the question for the teacher only. truncated: "keep" keeps answers cut at
    max_tokens, whose every token distillation can still learn from.
    """

    step: Literal["generate"]
    n: int = Field(default=1, ge=1)
    mode: Mode = "on"
    switch: Switch | None = None
    instruction: str = ""
    truncated: Literal["drop", "keep"] = "drop"
    max_tokens: int = Field(default=16384, ge=1)
    temperature: float = Field(default=0.6, ge=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    generator: str | None = None

    def requests(self, chat: Chat) -> list[Request]:
        messages = [dict(one) for one in rows.prompt_of(chat)]
        if self.instruction:
            messages[-1]["content"] += f"\n\n{self.instruction}"
        if self.switch is None:
            return [self.ask(messages, sample, self.mode) for sample in range(self.n)]
        messages, variables = set_switch(messages, self.mode, self.switch)
        asked = [self.ask(messages, sample) for sample in range(self.n)]
        for one in asked if variables else ():
            one.sampling["chat_template_kwargs"] = variables
        return asked

    def receive(self, chat: Chat, replies: Sequence[Reply]) -> list[Chat | Drop]:
        return [self._row(chat, reply, sample) for sample, reply in enumerate(replies)]

    def _row(self, chat: Chat, reply: Reply, sample: int) -> Chat | Drop:
        if reply.error is not None:
            return self.failed(reply.error)
        if reply.finish_reason == "length" and self.truncated == "drop":
            return Drop("an answer cut at max_tokens")
        row = rows.answered(chat, reply.message)
        thought, answer = rows.thought(row), rows.answer(row)
        if not answer.strip() or (self.mode == "on" and not thought):
            return Drop("an empty answer" if not answer.strip() else "no thought")
        if self.mode == "off":
            row = rows.answered(chat, {"role": "assistant", "content": answer})
        messages = row.messages
        if switch_of(messages) is not None:  # it must not contradict the mode
            messages, _ = set_switch(messages, self.mode, DETAILED)
        tags = {"generator": self.generator} if self.generator else {}
        row = Chat(messages, self.mode, row.tools, row.extra)
        return rows.tagged(row, f"{self.step} {self.generator or self.teacher} {sample}", **tags)


class ExtractProblems(ChatStep):
    """Makes a row of every problem that the first post of a discussion poses (§3.1).

    The discussion, cut to `longest` characters, is kept in `discussion` for `extract_known`.
    """

    step: Literal["extract_problems"]
    text: str = EXTRACT
    longest: int = Field(default=80_000, ge=1)

    def requests(self, chat: Chat) -> list[Request]:
        return [self.prompt(fill(self.text, text=rows.question(chat)[: self.longest]))]

    def take(self, chat: Chat, reply: str) -> Result:
        found = told_problems(reply)
        if not found:
            return Drop("no problem in it")
        discussion = {"discussion": rows.question(chat)[: self.longest]}
        system = [one for one in chat.messages[:1] if one["role"] == "system"]
        posed = [[*system, {"role": "user", "content": text}] for text in found]
        return [
            rows.tagged(replace(chat, messages=messages), f"{self.step} {index}", **discussion)
            for index, messages in enumerate(posed)
        ]


class ExtractKnown(ChatStep):
    """Writes the answer that a discussion gives into `expected_answer`, if it gives one (§3.1)."""

    step: Literal["extract_known"]
    text: str = ANSWER

    def requests(self, chat: Chat) -> list[Request]:
        discussion = str(chat.extra.get("discussion", ""))
        if not discussion or chat.extra.get("expected_answer") is not None:
            return []
        return [self.prompt(fill(self.text, question=rows.question(chat), text=discussion))]

    def take(self, chat: Chat, reply: str) -> Result:
        found = told_answer(reply)
        return chat if found is None else rows.tagged(chat, self.step, expected_answer=found)


class Classify(ChatStep):
    """Writes whether a problem is a proof, multiple choice, binary or invalid into `problem_type`.

    The teacher is asked once for each of `kinds`; the first yes counts, "open" if there is none.
    keep: the types that stay; the paper leaves out all four.
    """

    step: Literal["classify"]
    kinds: list[Literal["proof", "multiple_choice", "binary", "invalid"]] = Field(
        default=["proof", "multiple_choice", "binary", "invalid"], min_length=1
    )
    keep: list[str] = ["open"]
    text: str = CLASSIFY

    def requests(self, chat: Chat) -> list[Request]:
        question = rows.question(chat)
        return [
            self.prompt(fill(self.text, question=question, what=KINDS[kind])) for kind in self.kinds
        ]

    def receive(self, chat: Chat, replies: Sequence[Reply]) -> Result:
        for kind, reply in zip(self.kinds, replies, strict=True):
            if reply.error is not None:
                return self.failed(reply.error)
            said = judge.verdict(reply.answer)
            if said is None:
                return Drop(f"no verdict on {kind}")
            if said:
                return self._typed(chat, kind)
        return self._typed(chat, "open")

    def _typed(self, chat: Chat, found: str) -> Result:
        if found not in self.keep:
            return Drop(f"problem type {found}")
        return rows.tagged(chat, self.step, problem_type=found)


class Judge(ChatStep):
    """Asks whether predicted and expected answer are the same, where no rule has said so (§3.1).

    Rows whose `correct` is true already, or that lack one of the answers, are not asked about.
    keep: "correct" leaves out what the judge denies.
    """

    step: Literal["judge"]
    keep: Literal["correct", "all"] = "correct"
    text: str = judge.SAME_ANSWER

    def requests(self, chat: Chat) -> list[Request]:
        expected, predicted = (chat.extra.get(f"{n}_answer") for n in ("expected", "predicted"))
        if chat.extra.get("correct") is True or expected is None or predicted is None:
            return []
        answers = str(expected), str(predicted)
        return [self.prompt(judge.same_answer(rows.question(chat), *answers, template=self.text))]

    def take(self, chat: Chat, reply: str) -> Result:
        said = judge.verdict(reply)
        if self.keep == "correct" and not said:
            return Drop("no verdict on the answer" if said is None else "judged wrong")
        return rows.tagged(chat, self.step, correct=said)
