"""What a model is asked in the steps that judge and extract, and how its reply is read.

Every prompt asks for a last line `KEY: VALUE`, which is parsed strictly: a reply without it is no
verdict. A recipe may give a prompt of its own, with the same fields in braces.
"""

from __future__ import annotations

import re

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

SAME_ANSWER = """\
A problem, the answer that is known to be right, and the answer of a student are below. Is the \
student's answer the same as the right one, be it written in another form? Do not solve the \
problem. End with the line `VERDICT: yes` or `VERDICT: no`.

Problem:
{question}

Right answer: {expected_answer}

Student's answer: {predicted_answer}"""

SAME_PROBLEM = """\
Are these two the same problem in other words? They are, if who can solve one has solved the \
other: other names or another order of sentences make no difference, other numbers do. End with \
the line `VERDICT: yes` or `VERDICT: no`.

First:
{question}

Second:
{nearest}"""

_VERDICT = re.compile(r"^[\W_]*verdict[\W_]*(yes|no)\b[\W_]*$", re.I | re.M)
_ANSWER = re.compile(r"^[ \t*`]*answer:[ \t]*(.+?)[ \t*`]*$", re.I | re.M)
_PROBLEM = re.compile(r"^[ \t*`#]*problem:[ \t*`]*$", re.I | re.M)


def verdict(reply: str) -> bool | None:
    """The last verdict line of a reply; None without one."""
    found = _VERDICT.findall(reply)
    return found[-1].lower() == "yes" if found else None


def told_answer(reply: str) -> str | None:
    """The last answer line of a reply; None without one, or where it says NONE."""
    found = _ANSWER.findall(reply)
    return None if not found or found[-1].strip().upper() == "NONE" else found[-1].strip()


def told_problems(reply: str) -> list[str]:
    """The problems that a reply lists."""
    return [text for part in _PROBLEM.split(reply)[1:] if (text := part.strip())]


def fill(prompt: str, **fields: str) -> str:
    """The prompt with its fields; other braces, of LaTeX say, stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda m: fields.get(m[1], m[0]), prompt)
