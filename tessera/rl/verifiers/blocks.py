"""The program in an answer: its fenced blocks, and those of them that define what tests call.

Fences are read as CommonMark reads them: of backticks or tildes, in a list or a quotation, a longer
one around shorter ones, the last one perhaps not closed. A fence that stands in a string of a
program (in a docstring, say) ends no block.
"""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass

PYTHON = ("python", "py")
_OPENING = re.compile(
    r"(?P<before>[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*)(?P<fence>`{3,}|~{3,})"
    r"[ \t]*(?P<info>[^\n]*)"
)
_LANGUAGE = re.compile(r"\{?\.?([a-zA-Z][\w+#-]*?)[\d.]*(?=$|[\s,:{}])")
_STARTS = re.compile(r"(?:async +def|def|class|import|from|@|[A-Za-z_]\w*\s*=[^=])")
MOST_LINES = 500  # of an answer without fences that are searched for a program


@dataclass(frozen=True)
class Block:
    """language: the first word behind the fence, in lower case, without a version; often empty."""

    language: str
    code: str
    closed: bool = True


def fenced_blocks(text: str) -> list[Block]:
    """The blocks of a text, in order; those of a block of Markdown in its place."""
    lines = text.replace("\r\n", "\n").split("\n")
    found: list[Block] = []
    at = 0
    while at < len(lines):
        opening = _OPENING.match(lines[at])
        if not opening or (opening["fence"][0] == "`" and "`" in opening["info"]):
            at += 1
            continue
        language = _language(opening["info"])
        code, at = _body(lines, at + 1, opening, language in ("", *PYTHON))
        inner = fenced_blocks(code) if language in ("", "markdown", "md") else []
        found += inner or [Block(language, code, at <= len(lines))]
    return found


def fenced(text: str, languages: Collection[str]) -> list[str]:
    """The contents of the closed blocks of a language, which may have several names."""
    blocks = fenced_blocks(text)
    return [block.code for block in blocks if block.closed and block.language in languages]


def _language(info: str) -> str:
    found = _LANGUAGE.match(info.strip())
    return found[1].lower() if found else ""


def _body(
    lines: Sequence[str], start: int, opening: re.Match[str], program: bool
) -> tuple[str, int]:
    """What stands up to the closing fence, and the line behind it.

    program: a closing fence within a program that only the text up to a later one makes whole is
    part of it.
    """
    fence, before = opening["fence"], opening["before"]
    closing = re.compile(rf"[ \t>]{{0,{len(before) + 3}}}{fence[0]}{{{len(fence)},}}[ \t]*$")
    ends = [i for i in range(start, len(lines)) if closing.match(lines[i])] or [len(lines)]
    if program:
        for end in ends[:20]:
            code = _plain(lines[start:end], ">" in before)
            if parsed(code) is not None:
                return code, end + 1
    return _plain(lines[start : ends[0]], ">" in before), ends[0] + 1


def _plain(lines: Sequence[str], quoted: bool) -> str:
    """The lines without the indentation and the marks of quotation that the block stands in."""
    if quoted:
        lines = [re.sub(r"^[ \t]*>[ ]?", "", line) for line in lines]
    return textwrap.dedent("\n".join(lines) + "\n" if lines else "")


def parsed(code: str) -> ast.Module | None:
    """The program's tree; None where it is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape is no error of syntax
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def extract_code(answer: str, needed: Collection[str] = ()) -> str | None:
    """The Python program of an answer, or None.

    needed: names that tests use. The last block that defines one is taken, with the blocks before
    it that define what it uses. Where no block defines any, it is the last block that reads input,
    or else the last one; without fences the answer, or the longest part of it that is a program.
    """
    tree = parsed(answer)
    if tree and tree.body:
        return answer
    blocks = [one for one in fenced_blocks(answer) if one.language in ("", *PYTHON)]
    blocks = [one for one in blocks if one.code.strip()]
    if not blocks:
        return _unfenced(answer)
    trees = [parsed(one.code) for one in blocks]
    defined = [
        _defined(tree) if tree else _named(one.code)
        for tree, one in zip(trees, blocks, strict=True)
    ]
    places = [_last(defined, name, len(blocks)) for name in needed]
    chosen = {place for place in places if place is not None} or {_main(blocks, trees)}
    taken: set[int] = set()
    while new := chosen - taken:
        taken |= new
        for index in new:
            names = _used(trees[index]) - defined[index] - set(dir(builtins))
            places = [_last(defined, name, index) for name in names]
            chosen |= {place for place in places if place is not None}
    return "\n".join(blocks[index].code for index in sorted(taken))


def _last(defined: Sequence[set[str]], name: str, before: int) -> int | None:
    """The last block before one that defines a name, else the first behind it that does."""
    places = [index for index, names in enumerate(defined) if name in names]
    earlier = [index for index in places if index < before]
    return earlier[-1] if earlier else next((i for i in places if i != before), None)


def _main(blocks: Sequence[Block], trees: Sequence[ast.Module | None]) -> int:
    """The block of a program that is run, not called: the last that reads input, or the last."""
    order = range(len(blocks))
    reads = [
        i for i in order if trees[i] and re.search(r"\binput\(|\bstdin\b|open\(0", blocks[i].code)
    ]
    tagged = [i for i in order if blocks[i].language]
    doing = [i for i in order if (tree := trees[i]) and not _idle(tree)]
    for group in (reads, [i for i in tagged if i in doing], doing, tagged):
        if group:
            return group[-1]
    return len(blocks) - 1


def _idle(tree: ast.Module) -> bool:
    """Whether a program is values alone: the `3` of a block of output."""
    return all(
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant | ast.Name | ast.List | ast.Tuple | ast.UnaryOp)
        for node in tree.body
    )


def _defined(tree: ast.Module) -> set[str]:
    """The names that the statements of a module bind, within `if` and `try`, too."""
    names: set[str] = set()
    nodes: list[ast.AST] = list(tree.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif not isinstance(node, ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return names


def _named(code: str) -> set[str]:
    """The names that a program which cannot be parsed seems to define."""
    return set(re.findall(r"^[ \t]*(?:async +def|def|class)\s+(\w+)", code, re.MULTILINE))


def _used(tree: ast.Module | None) -> set[str]:
    nodes = ast.walk(tree) if tree else ()
    return {
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }


def used_names(text: str) -> set[str]:
    """The names that some Python reads without binding them itself."""
    tree = parsed(text)
    return _used(tree) - _defined(tree) if tree else set()


def _unfenced(answer: str) -> str | None:
    """The longest part of a text that begins like a program and is one."""
    lines = answer.split("\n")[:MOST_LINES]
    starts = [i for i, line in enumerate(lines) if _STARTS.match(line)]
    for start in starts[:10]:
        for end in range(len(lines), start, -1):
            if not lines[end - 1].strip():
                continue
            code = "\n".join(lines[start:end]) + "\n"
            if parsed(code):
                return code
    return None
