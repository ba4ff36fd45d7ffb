"""A model as the judge: what it is asked of an answer, and the verdict read from its reply.

A reply without a verdict is could-not-judge (None), never wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tessera.ask.ask import Answerer, Reply, Request
from tessera.data.conversation import Message

SAME_ANSWER = """\
A problem, the answer that is known to be right, and the answer of a student are below. Is the \
student's answer the same as the right one, be it written in another form? Do not solve the \
problem. End with the line `VERDICT: yes` or `VERDICT: no`.

Problem:
{question}

Right answer: {expected_answer}

Student's answer: {predicted_answer}"""

_VERDICT = re.compile(r"\bverdict[\W_]*(yes|no|right|wrong)\b[\W_]*$", re.IGNORECASE | re.MULTILINE)


def fill(template: str, **fields: str) -> str:
    """The template with its `{fields}`; other braces, of LaTeX say, stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda m: fields.get(m[1], m[0]), template)


def same_answer(question: str, expected: str, predicted: str, template: str = "") -> str:
    """The question whether two answers are the same.

    template: SAME_ANSWER where it is empty. `{answer}` and `{prediction}` are shorter names of
    `{expected_answer}` and `{predicted_answer}`.
    """
    names = {"expected_answer": expected, "answer": expected}
    names |= {"predicted_answer": predicted, "prediction": predicted}
    return fill(template or SAME_ANSWER, question=question, **names)


def request(name: str, prompt: str | list[Message], max_tokens: int) -> Request:
    """A greedy request; a text is the one message of the user."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return Request(name, messages, {"temperature": 0.0, "max_tokens": max_tokens})


def replies(judge: Answerer, requests: Sequence[Request]) -> list[Reply]:
    """The reply to each request, in order. Raises AskError, FailureError."""
    found: dict[int, Reply] = {}
    judge.ask(requests, lambda one, reply: found.update({id(one): reply}))
    return [found[id(one)] for one in requests]


def verdict(reply: str) -> bool | None:
    """The last line that ends with `verdict: yes` (or right, no, wrong); None without one."""
    found = _VERDICT.findall(reply)
    return found[-1].lower() in ("yes", "right") if found else None
