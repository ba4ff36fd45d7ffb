"""Chats to ids: the template's text and the mask of what is trained, for a source's token files.

The counterpart of `Encoder`. A chat gives one document or several (chat.py), or none where only the
template or the tokenizer refuses it: such a row is quarantined when it is tokenised.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.data.batch import OFF, ON
from tessera.data.chat import ChatEncoder
from tessera.data.chat_records import FORMAT
from tessera.data.conversation import Chat
from tessera.data.encode import TOKENIZE_AT_ONCE, Portion
from tessera.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChatsEncoder:
    """Turns chats into portions: the counterpart of `Encoder` for a source of chats."""

    encoder: ChatEncoder

    @property
    def tokenizer(self) -> Tokenizer:
        return self.encoder.tokenizer

    @property
    def specials(self) -> int:
        """Nothing is added that is not of the template."""
        return 0

    @property
    def identity(self) -> list[Any]:
        """What the ids of a chat follow from, beside itself."""
        return [FORMAT, *self.encoder.identity]

    def portions(self, texts: Iterable[str]) -> Iterator[Portion]:
        """The documents of the chats, some chats at a time."""
        rest = iter(texts)
        first = 0
        while some := [Chat.from_json(text) for text in itertools.islice(rest, TOKENIZE_AT_ONCE)]:
            yield self._portion(some, first)
            first += len(some)

    def _portion(self, chats: list[Chat], first: int) -> Portion:
        ids: list[NDArray[Any]] = [np.zeros(0, np.uint32)]
        trained: list[NDArray[np.uint8]] = [np.zeros(0, np.uint8)]
        origin, refused = [], []
        for number, found in enumerate(self.encoder.encode_batch(chats), first):
            if isinstance(found, str):
                refused.append((number, found))
                continue
            for document in found:
                ids.append(np.array(document.ids, np.uint32))
                mark = ON if document.mode == "on" else OFF
                trained.append(np.array(document.trained, np.uint8) * np.uint8(mark))
                origin.append(number)
        lengths = np.array([len(one) for one in ids[1:]], np.int64)
        return Portion(
            np.concatenate(ids),
            lengths,
            np.zeros(len(lengths), np.int64),
            np.concatenate(trained),
            np.array(origin, np.int64),
            refused,
        )
