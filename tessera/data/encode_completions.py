"""Prompts and completions to ids: the mask holds the completion alone (`completions.py`)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tessera.data.batch import PLAIN
from tessera.data.completions import FORMAT
from tessera.data.encode import TOKENIZE_AT_ONCE, Encoder, Portion
from tessera.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class CompletionsEncoder:
    """Turns pairs into portions: prompt and completion are encoded apart, as an engine does."""

    encoder: Encoder

    @property
    def tokenizer(self) -> Tokenizer:
        return self.encoder.tokenizer

    @property
    def specials(self) -> int:
        return self.encoder.specials

    @property
    def identity(self) -> list[Any]:
        """What the ids of a pair follow from, beside itself."""
        return [FORMAT, *self.encoder.identity]

    def portions(self, texts: Iterable[str]) -> Iterator[Portion]:
        """The documents of the pairs, some at a time."""
        rest, first = iter(texts), 0
        while some := [json.loads(text) for text in itertools.islice(rest, TOKENIZE_AT_ONCE)]:
            prompts, completions = zip(*some, strict=True)
            asked = self.tokenizer.encode_batch(list(prompts), bos=self.encoder.bos)
            told = self.tokenizer.encode_batch(list(completions))
            tail = list(self.encoder.end)
            ids = [np.array(a + b + tail, np.uint32) for a, b in zip(asked, told, strict=True)]
            marks = [
                np.repeat(np.array([0, PLAIN], np.uint8), [len(a), len(b) + len(tail)])
                for a, b in zip(asked, told, strict=True)
            ]
            sizes = [len(prompt.encode()) + len(told.encode()) for prompt, told in some]
            yield Portion(
                np.concatenate(ids),
                np.array([len(one) for one in ids], np.int64),
                np.array(sizes, np.int64),
                np.concatenate(marks),
                np.arange(first, first + len(some)),
            )
            first += len(some)
