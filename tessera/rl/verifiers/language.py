"""The language of a text, by langdetect, which stays in this file.

It is what IFEval's published figures were made with, so that ours compare. Its sampling is seeded
for every text: the same text has the same language in every process and in any order.
"""

from __future__ import annotations

from typing import Any


class UndetectedError(Exception):
    """The text has nothing that tells a language (digits, an emoji)."""


def language_of(text: str) -> str:
    """ISO 639-1 code (`en`, `zh-cn`) of a text's likeliest language. Raises UndetectedError."""
    langdetect: Any = require_library()
    langdetect.DetectorFactory.seed = 0
    try:
        return langdetect.detect(text)
    except langdetect.LangDetectException as error:
        raise UndetectedError(f"no language is detected: {error}") from None


def require_library() -> Any:
    """langdetect. Raises ModuleNotFoundError naming the extra."""
    try:
        import langdetect
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "checking a language needs langdetect: pip install 'tessera[rl]'"
        ) from None
    return langdetect
