"""Steps that look at one row: tags, fields, lengths, language, code, final answers.

Those of the Llama-Nemotron recipes (arXiv 2505.00949 §3, NVIDIA's Curator tutorial). Code as in
§3.2: a fence in the answer, none in the thought, and it parses.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
import warnings
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, model_validator

from tessera.curate.steps import rows
from tessera.curate.steps.rows import Drop, Result, RowStep
from tessera.data.conversation import Chat, fault
from tessera.rl.verifiers.answer import boxed, final_answer
from tessera.rl.verifiers.blocks import PYTHON, fenced
from tessera.rl.verifiers.judge import judge
from tessera.rl.verifiers.language import language_of
from tessera.rl.verifiers.outcome import Outcome
from tessera.runs.files import RunError

_MARK = re.compile(r"^[ \t]*```", re.M)
NAMES = {"python": PYTHON, "cpp": ("cpp", "c++", "cc", "cxx")}
LONGEST = 400  # characters of a final answer; what is longer is a text


class Code(RowStep):
    """Keeps answers with fenced code of `language` that parses; the code goes into `code`.

    parser: `ast` reads Python alone. thought: one is required. which: of several fences.
    """

    step: Literal["code"]
    language: Literal["python", "cpp"] = "python"
    parser: Literal["ast", "tree-sitter"] = "tree-sitter"
    thought: bool = True
    which: Literal["first", "last", "only"] = "last"

    @model_validator(mode="after")
    def _parser_knows_language(self) -> Code:
        if self.parser == "ast" and self.language != "python":
            raise ValueError(f'parser = "ast" reads python, not {self.language}; use "tree-sitter"')
        return self

    def apply(self, chat: Chat) -> Result:
        thought = rows.thought(chat)
        if thought is None and self.thought:
            return Drop("no thought")
        if thought and _MARK.search(thought):
            return Drop("a code fence in the thought")
        found = fenced(rows.answer(chat), NAMES[self.language])
        if not found or (len(found) > 1 and self.which == "only"):
            return Drop(f"no {self.language} fence" if not found else "several code fences")
        code = found[0 if self.which == "first" else -1]
        if not parses(code, self.language, self.parser):
            return Drop("code that does not parse")
        return rows.tagged(chat, self.step, code=code)


def parses(code: str, language: str, parser: str) -> bool:
    """Whether code is a program of its language; empty code is none."""
    if not code.strip():
        return False
    if parser == "tree-sitter":
        return not _tree_parser(language)(code.encode("utf-8", "replace")).root_node.has_error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape is no error of syntax
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


@functools.cache
def _tree_parser(language: str) -> Callable[[bytes], Any]:
    try:
        import tree_sitter
        import tree_sitter_cpp
        import tree_sitter_python
    except ImportError:
        raise RunError(
            "the step `code` needs tree-sitter: pip install 'tessera[curate]'; or set "
            'parser = "ast", which reads Python'
        ) from None
    grammar = {"python": tree_sitter_python, "cpp": tree_sitter_cpp}[language]
    return tree_sitter.Parser(tree_sitter.Language(grammar.language())).parse


class Tags(RowStep):
    """Leaves out rows that must not be trained on, for the reason that `fault` gives."""

    step: Literal["tags"]

    def apply(self, chat: Chat) -> Result:
        reason = fault(chat)
        return Drop(reason) if reason else chat


class Where(RowStep):
    """Keeps the rows whose `key` is one of `values`, or a list that holds one.

    For example `key = "used_in_training", values = ["Nano"]`; `reasoning` is a key, too. drop:
    leaves out those rows instead.
    """

    step: Literal["where"]
    key: str
    values: list[str] = Field(min_length=1)
    drop: bool = False

    def apply(self, chat: Chat) -> Result:
        value = chat.mode if self.key == "reasoning" else chat.extra.get(self.key)
        held = value if isinstance(value, list) else [value]
        if any(str(one) in self.values for one in held) != self.drop:
            return chat
        return Drop(f"{self.key} is {'' if self.drop else 'not '}{' or '.join(self.values)}")


class Label(RowStep):
    """Writes `values` into every row that lacks them; replace: into every row."""

    step: Literal["label"]
    values: dict[str, Any] = Field(min_length=1)
    replace: bool = False

    def apply(self, chat: Chat) -> Result:
        known = {k: v for k in self.values if (v := chat.extra.get(k)) is not None}
        return rows.tagged(chat, self.step, **(self.values | ({} if self.replace else known)))


class Licence(RowStep):
    """Keeps the rows whose `license` is one of `allow`, ignoring case; a row without one goes."""

    step: Literal["licence"]
    allow: list[str] = Field(min_length=1)

    def apply(self, chat: Chat) -> Result:
        given = chat.extra.get("license")
        allowed = {one.lower() for one in self.allow}
        return chat if str(given).lower() in allowed else Drop(f"license {given}")


class Length(RowStep):
    """Bounds the length of `field`; tokens need `tokenizer`. keep: the key it is written to."""

    step: Literal["length"]
    field: Literal["question", "answer", "thought", "completion", "all"] = "all"
    unit: Literal["characters", "words", "tokens"] = "characters"
    min: int = Field(default=0, ge=0)
    max: int | None = Field(default=None, ge=1)
    tokenizer: str | None = None
    keep: str | None = None

    def apply(self, chat: Chat) -> Result:
        size = self._measure(rows.text_of(chat, self.field))
        if size < self.min or (self.max is not None and size > self.max):
            how = f"under {self.min:,}" if size < self.min else f"over {self.max:,}"
            return Drop(f"{self.field} of {how} {self.unit}")
        return rows.tagged(chat, self.step, **{self.keep: size}) if self.keep else chat

    @functools.cached_property
    def _measure(self) -> Callable[[str], int]:
        if self.unit == "characters":
            return len
        if self.unit == "words":
            return lambda text: len(text.split())
        from tessera.data.tokenizer import load_tokenizer

        if self.tokenizer is None:
            raise RunError('length: unit = "tokens" needs `tokenizer`, a model\'s directory')
        encoder = load_tokenizer(self.tokenizer)
        return lambda text: len(encoder.encode(text))


class Language(RowStep):
    """Keeps rows of these languages, told by fastText's lid.176 as Curator does (its small file).

    A text of under `least` letters is kept, as is one whose probability is below `confidence`.
    """

    step: Literal["language"]
    keep: list[str] = ["en"]
    field: rows.Field = "question"
    least: int = Field(default=20, ge=0)
    confidence: float = Field(default=0.5, ge=0, le=1)

    def apply(self, chat: Chat) -> Result:
        text = rows.text_of(chat, self.field)[:2000]
        if sum(map(str.isalpha, text)) < self.least:
            return chat
        found, probability = language_of(text, fast=True)
        if found in self.keep or probability < self.confidence:
            return chat
        return Drop(f"language {found}")


class Extract(RowStep):
    """Writes the final answer of the last answer's text into `predicted_answer`.

    source = "boxed" takes `\\boxed{…}` alone, as the paper's math data do; "any" takes any form
    (rl/verifiers/answer.py). to: the key written. required: rows without are left out.
    """

    step: Literal["extract_answer"]
    source: Literal["boxed", "any"] = "any"
    to: str = "predicted_answer"
    required: bool = True

    def apply(self, chat: Chat) -> Result:
        text = rows.answer(chat)
        found = boxed(text) if self.source == "boxed" else final_answer(text)
        if not found or len(found) > LONGEST:
            return Drop("no final answer") if self.required else chat
        return rows.tagged(chat, self.step, **{self.to: found})


class Verify(RowStep):
    """Compares `predicted_answer` with `expected_answer`, where there is one; writes `correct`.

    verifier: "equal" (the same number, or the same text up to spelling), "exact", "number" and
    "math" as `tessera judge` has them, or `package.module:function`, a function of the two texts
    that gives True, False, None or an Outcome. keep: "all" keeps what is wrong or not judged.
    """

    step: Literal["verify"]
    verifier: str = "equal"
    keep: Literal["correct", "all"] = "correct"

    def apply(self, chat: Chat) -> Result:
        expected, predicted = (chat.extra.get(f"{n}_answer") for n in ("expected", "predicted"))
        if expected is None:
            return chat
        right = None if predicted is None else self._right(str(predicted), str(expected))
        if self.keep == "correct" and right is not True:
            return Drop("a wrong answer" if right is False else "an answer that cannot be judged")
        return rows.tagged(chat, self.step, correct=right)

    def _right(self, predicted: str, expected: str) -> bool | None:
        if not predicted.strip() or not expected.strip():
            return None
        outcome = self._function(predicted, expected)
        if isinstance(outcome, Outcome):
            return {"right": True, "wrong": False}.get(outcome.verdict)
        return outcome

    @functools.cached_property
    def _function(self) -> Callable[[str, str], Any]:
        if self.verifier in VERIFIERS:
            return VERIFIERS[self.verifier]
        module, _, function = self.verifier.partition(":")
        try:
            return getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise RunError(
                f"verifier = {self.verifier!r}: {error}; give package.module:function, or one of "
                + ", ".join(VERIFIERS)
            ) from None


VERIFIERS: dict[str, Callable[[str, str], Any]] = {
    "equal": functools.partial(judge, "equal"),
    "exact": functools.partial(judge, "exact", ignore_case=False),
    "number": functools.partial(judge, "number"),
    "math": functools.partial(judge, "math"),
}
