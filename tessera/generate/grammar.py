"""Answers that obey a JSON schema, a regular expression or a list of choices (llguidance).

A grammar says at each position which tokens may come next. Sources are Lark's; a thought before
the answer is a rule of its own, so the schema holds behind it.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tessera.data.calls import Dialect
from tessera.data.thought import CLOSE, OPEN
from tessera.data.tokenizer import Tokenizer
from tessera.generate.engine import GenerationError
from tessera.generate.requests import Grammar
from tessera.generate.token_bytes import TokenBytes

# Between the parts of JSON: a model that likes white space would go on with it without an end.
WHITE_SPACE = r"( |\n {0,16})?"
Tools = Sequence[dict[str, Any]]  # functions: name, parameters (a JSON schema)


def json_rule(schema: dict[str, Any] | bool) -> str:
    """A Lark rule's body for JSON of a schema."""
    if isinstance(schema, dict):
        schema = {**schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE}}
    return f"%json {json.dumps(schema)}"


def choice_rule(choices: Sequence[str]) -> str:
    return " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def regex_rule(regex: str) -> str:
    return f"/{_library().regex_to_lark(regex, use_ascii='dw')}/"


def calls_rule(tools: Tools, dialect: Dialect, parallel: bool = True) -> str:
    """The rule for one call of a tool, or several, as the dialect writes them."""
    begin, between, end = (_quoted(part) for part in dialect[3:6])
    names = [f"call_{index}" for index in range(len(tools))]
    more = f"({between} call)*" if parallel else ""
    rules = [f"{begin} call {more} {end}", f"call: {' | '.join(names)}"]
    for name, tool in zip(names, tools, strict=True):
        head = f'{{"name": {json.dumps(tool["name"])}, "{dialect.arguments}": '
        schema = tool.get("parameters") or {"type": "object", "properties": {}}
        rules += [f"{name}: {_quoted(head)} {name}_arguments {_quoted('}')}"]
        rules += [f"{name}_arguments: {json_rule(schema)}"]
    return "\n".join(rules)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _source(rules: Sequence[str], thought: Literal["none", "may", "opened"]) -> str:
    heads = {"none": "", "may": "thought?", "opened": "inner space"}
    lines = [
        f"start: {heads[thought]} answer",
        "answer: " + " | ".join(f"answer_{i}" for i in range(len(rules))),
    ]
    lines += [f"answer_{i}: {rule}" for i, rule in enumerate(rules)]
    if thought != "none":
        lines += [f'inner[suffix="{CLOSE}"]: /(.|\\n)*/', "space: /[ \\n]{0,4}/"]
    if thought == "may":
        lines += [f'thought: "{OPEN}" inner space']
    return "\n".join(lines)


def _library() -> Any:
    """Raises GenerationError where llguidance is not installed."""
    try:
        import llguidance
        import llguidance.numpy
    except ModuleNotFoundError:
        raise GenerationError(
            "an answer of a given form needs llguidance, which is not installed on the server: "
            "pip install 'tessera[serve]'"
        ) from None
    return llguidance


@dataclass
class _Vocabulary:
    """What llguidance asks of a tokenizer, under its names."""

    tokenizer: Tokenizer
    eos_token_id: int
    bos_token_id: int | None
    tokens: list[bytes]
    special_token_ids: list[int]

    def __call__(self, text: str) -> list[int]:
        """Tokens whose bytes are the text's, as many tokenizers give them only behind others."""
        wanted = text.encode()
        for before in ("", "\n", "."):
            ids = self.tokenizer.encode(before + text)
            for start in range(len(before) + 2):
                if b"".join(self.tokens[token] for token in ids[start:]) == wanted:
                    return ids[start:]
        return self._longest(wanted)

    def _longest(self, rest: bytes) -> list[int]:
        """The longest token that the text begins with, and so on."""
        found: list[int] = []
        while rest:
            sizes = range(min(len(rest), self._most), 0, -1)
            size = next((n for n in sizes if rest[:n] in self._ids), 0)
            if not size:
                raise GenerationError(f"no token of the model begins {rest[:20]!r}")
            found.append(self._ids[rest[:size]])
            rest = rest[size:]
        return found

    @functools.cached_property
    def _ids(self) -> dict[bytes, int]:
        return {text: token for token, text in enumerate(self.tokens)}

    @functools.cached_property
    def _most(self) -> int:
        return max(map(len, self.tokens))


class Grammars:
    """Compiles grammars for one tokenizer. marks: special tokens that an answer's text may hold."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, marks: Collection[str] = ()) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.marks = {tokenizer.token_id(mark) for mark in marks}

    @functools.cached_property
    def _vocabulary(self) -> Any:
        """The tokenizer as llguidance has it."""
        library, known = _library(), TokenBytes(self.tokenizer)
        texts = [known.of(token) for token in range(self.vocab_size)]
        nothing = {token for token, text in enumerate(texts) if not text}
        ends = [token for token in self.tokenizer.eos_ids if token < self.vocab_size]
        ends = ends or [min(nothing, default=0)]  # a library that knows no vocabulary without one
        never = nothing | set(ends) | (known.special - self.marks)
        shown = _Vocabulary(
            self.tokenizer,
            ends[0],
            self.tokenizer.bos_id,
            [text or b"<|%d|>" % token for token, text in enumerate(texts)],
            sorted(token for token in never if token < self.vocab_size),
        )
        return library.LLTokenizer(library.TokenizerWrapper(shown), eos_token=ends)

    def prepare(self) -> None:
        """Build the vocabulary now, where the library is installed."""
        if importlib.util.find_spec("llguidance"):
            _ = self._vocabulary

    def compile(
        self, rules: Sequence[str], thought: Literal["none", "may", "opened"] = "none"
    ) -> Callable[[], Grammar]:
        """For `submit(grammar=…)`: an answer that is one of the rules, behind a thought or not.

        Raises GenerationError for what llguidance cannot follow.
        """
        first = self._matcher(_source(rules, thought))
        opened = None if thought == "none" else self._matcher(_source(rules, "opened"))
        return lambda: _Matcher(first.deep_copy(), opened)

    def _matcher(self, source: str) -> Any:
        matcher = _library().LLMatcher
        if fault := matcher.validate_grammar(source, self._vocabulary):
            what = re.sub(r"^at \d+\(\d+\): ", "", fault).splitlines()[0]
            raise GenerationError(f"the form of the answer cannot be followed: {what}")
        return matcher(self._vocabulary, source, log_level=0)


class _Matcher:
    """A `Grammar` of one sample. opened: one at the beginning of a thought, None for no thought."""

    def __init__(self, matcher: Any, opened: Any) -> None:
        self.matcher, self.opened = matcher, opened

    def fill(self, bits: NDArray[np.int32], row: int) -> None:
        _library().numpy.fill_next_token_bitmask(self.matcher, bits, row)
        self._check()

    def push(self, token: int) -> bool:
        if not self.matcher.consume_token(token) and self.opened is not None:
            # Only the end of a thought is forced on a model, which may be amid a character then.
            self.matcher = self.opened.deep_copy()
            self.matcher.consume_token(token)
        self._check()
        return self.matcher.is_stopped()

    def _check(self) -> None:
        if self.matcher.is_error():
            raise GenerationError(f"the grammar failed: {self.matcher.get_error()}")
