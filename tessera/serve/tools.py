"""Tool calls in the report's form: `<TOOLCALL>[{"name": …, "arguments": {…}}]</TOOLCALL>`.

What may still become a call is held back; what is none goes on as text.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

from tessera.generate.text import begun

OPEN, CLOSE = "<TOOLCALL>", "</TOOLCALL>"


class ToolCalls:
    """Text in, text without calls out; `calls` holds those that were complete."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self._held = ""

    def push(self, text: str) -> str:
        """What is certainly no part of a call."""
        self._held += text
        plain = ""
        while OPEN in self._held:
            before, _, rest = self._held.partition(OPEN)
            inside, closed, after = rest.partition(CLOSE)
            if not closed:
                self._held = OPEN + rest
                return plain + before
            plain, self._held = plain + before + self._take(inside), after
        keep = begun(self._held, [OPEN])
        plain += self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return plain

    def flush(self) -> str:
        """What was held back, where the text ends here. A call lacking only its end counts."""
        held, self._held = self._held, ""
        return self._take(held.removeprefix(OPEN)) if held.startswith(OPEN) else held

    def _take(self, inside: str) -> str:
        """Notes the calls; what cannot be read as such is given back as text."""
        try:
            rows = json.loads(inside)
            rows = rows if isinstance(rows, list) else [rows]
            found = [_call(row["name"], row.get("arguments") or {}) for row in rows]
        except (ValueError, TypeError, KeyError, AttributeError):
            return f"{OPEN}{inside}{CLOSE}"
        self.calls += found
        return ""


def _call(name: str, arguments: Any) -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    function = {"name": str(name), "arguments": text}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
