"""Code in answers: one fence where code is asked for, none in the thought, and it parses.

The post-processing of the paper's code data (arXiv 2505.00949 §3.2, after OpenCodeReasoning): a
reasoning trace must be there, the answer stands in a fence of the language, samples whose thought
holds a fence are left out, and tree-sitter tells whether the code parses.
"""

from __future__ import annotations

import ast
import functools
import re
import warnings
from collections.abc import Callable
from typing import Any, Literal

from pydantic import model_validator

from tessera.curate.steps import Result, rows
from tessera.curate.steps.rows import Drop
from tessera.data.conversation import Chat
from tessera.runs.files import RunError
from tessera.runs.recipe import Config

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+#-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.M | re.S)
_MARK = re.compile(r"^[ \t]*```", re.M)
NAMES = {
    "python": ("python", "py", "python3"),
    "cpp": ("cpp", "c++", "cc", "cxx"),
}


class Code(Config):
    """Keeps answers that hold code of `language`, in a fence, that parses; it goes into `code`.

    parser: `ast` is that of the running Python; tree-sitter knows C++ as well, and Python of any
    version. thought: one is required. which: the fence taken where there are several.
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
        found = fences(rows.answer(chat), NAMES[self.language])
        if not found or (len(found) > 1 and self.which == "only"):
            return Drop(f"no {self.language} fence" if not found else "several code fences")
        code = found[0 if self.which == "first" else -1]
        if not parses(code, self.language, self.parser):
            return Drop("code that does not parse")
        return rows.tagged(chat, self.step, code=code)


def fences(text: str, names: tuple[str, ...]) -> list[str]:
    """The contents of the fenced blocks of a language."""
    return [m[2] for m in _FENCE.finditer(text) if m[1].lower() in names]


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
