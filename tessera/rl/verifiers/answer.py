"""The final statement of an answer.

The last statement counts, in the order of how explicit its form is: `\\boxed{...}` (what the
report's prompts ask for), GSM8K's `#### 42`, "the answer is 42". Nothing here knows mathematics.
"""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_HASHES = re.compile(r"^\s*####[ \t]*(\S.*?)\s*$", re.MULTILINE)
_STATED = re.compile(
    r"\banswer\b(?:[ \t]+is\b|[ \t]*[:=])[ \t:*]*(?=([^\s:*][^\n]*))", re.IGNORECASE
)


def boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}` whose braces close, or None."""
    for opening in reversed(list(_BOXED.finditer(text))):
        end = _closing_brace(text, opening.end())
        if end is not None:
            return text[opening.end() : end].strip()
    return None


def _closing_brace(text: str, start: int) -> int | None:
    depth, escaped = 1, False
    for index in range(start, len(text)):
        character = text[index]
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        else:
            depth += (character == "{") - (character == "}")
            if not depth:
                return index
    return None


def final_statement(text: str) -> str | None:
    """What the text says its answer is, in its last most explicit statement, or None."""
    found = boxed(text)
    if found is not None:
        return found
    hashes = _HASHES.findall(text)
    if hashes:
        return hashes[-1]
    stated = _STATED.findall(text)
    return stated[-1].strip().rstrip(".").strip("*").strip() if stated else None
