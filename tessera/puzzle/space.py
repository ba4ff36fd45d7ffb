"""Which words a layer may take (Puzzle §2.1).

Attention: every divisor of the parent's KV heads, `linear`, `noop`. FFN: a list of widths, as
words or as percentages of the parent's, `linear`, `noop`. The parent's own words always belong
to the space. `servable` leaves out what a named engine cannot load.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tessera.model.config import GQA, KINDS, ConfigError, ModelConfig, SwiGLU, name, parse_kind
from tessera.model.servable import refusals
from tessera.run import Run, read_json

_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)%")


class SpaceConfig(BaseModel):
    """The words on offer, the same at every layer.

    `attention` holds words (`gqa-2`, `linear`, `noop`), or "divisors" for every divisor of the
    parent's KV heads; `ffn` holds words or percentages of the parent's width (`"50%"`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    attention: tuple[str, ...] = ("divisors", "linear", "noop")
    ffn: tuple[str, ...] = ("75%", "50%", "25%", "10%", "linear", "noop")
    width_multiple: int = Field(default=4, ge=1)  # percentages are rounded up to a multiple of this

    @field_validator("attention")
    @classmethod
    def _attention(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        for word in words:
            if word != "divisors":
                _parsed("attention", word, '"divisors"')
        return words

    @field_validator("ffn")
    @classmethod
    def _ffn(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        for word in words:
            match = _PERCENT.fullmatch(word)
            if not match:
                _parsed("ffn", word, 'a share of the parent\'s width such as "50%"')
            elif not 0 < float(match[1]) <= 100:
                raise ValueError(f"{word!r}: give a share above 0% and up to 100%")
        return words


def _parsed(kind: str, word: str, shorthand: str) -> None:
    try:
        parse_kind(kind, word)
    except ConfigError as error:
        raise ValueError(f"{error}. Allowed too: {shorthand}") from None


@dataclass(frozen=True)
class Space:
    """`layers[i]` is (attention words, FFN words) of layer i, the parent's first.

    `pairs` are (layer, attention, FFN) that the library holds trained together: where a pair is
    here, those two words at that layer mean the coupled weights, in scores as in models.
    """

    layers: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    pairs: tuple[tuple[int, str, str], ...] = ()

    def words(self, layer: int, kind: str) -> tuple[str, ...]:
        return self.layers[layer][KINDS.index(kind)]

    def replacements(self) -> Iterator[tuple[int, str, str]]:
        """(layer, kind, word) of every subblock that is not the parent's own."""
        for layer in range(len(self.layers)):
            for kind in KINDS:
                for word in self.words(layer, kind)[1:]:
                    yield layer, kind, word

    def without(self, words: Collection[tuple[str, str]]) -> Space:
        """The space less these (kind, word), and less the pairs that hold one of them."""
        layers = tuple(
            (
                tuple(word for word in attention if ("attention", word) not in words),
                tuple(word for word in ffn if ("ffn", word) not in words),
            )
            for attention, ffn in self.layers
        )
        kept = [p for p in self.pairs if not set(zip(KINDS, p[1:], strict=True)) & set(words)]
        return replace(self, layers=layers, pairs=tuple(kept))


def join(attention: str, ffn: str) -> str:
    """The word of a pair trained together: `gqa-2+swiglu-256`."""
    return f"{attention}+{ffn}"


def split(word: str) -> tuple[str, str]:
    """(attention, FFN) of a pair's word."""
    attention, _, ffn = word.partition("+")
    return attention, ffn


def write_space(space: Space, run: Run) -> None:
    """Leave a space in a run's tables: `space.json`, and `pairs.json`."""
    run.write_json("space", [[list(words) for words in layer] for layer in space.layers])
    run.write_json("pairs", [list(pair) for pair in space.pairs])


def read_space(directory: Path) -> Space:
    """The space of a finished library or score run."""
    layers = tuple((tuple(a), tuple(f)) for a, f in read_json(directory, "space"))
    return Space(layers, tuple((i, a, f) for i, a, f in read_json(directory, "pairs")))


def build_space(config: SpaceConfig, parent: ModelConfig) -> Space:
    """The space of this parent: its own word first, then the others without repetition."""
    layers = []
    for block in parent.blocks:
        attention = _attention_words(config.attention, block.attention)
        ffn = _ffn_words(config, block.ffn)
        layers.append((attention, ffn))
    _check_used(config, parent, {word for layer in layers for words in layer for word in words})
    return Space(tuple(layers))


def _check_used(config: SpaceConfig, parent: ModelConfig, used: Collection[str]) -> None:
    """A word that fits nowhere is a mistake; one that fits at some layers is not."""
    own = ", ".join(sorted({word for pair in parent.words for word in pair}))
    for word in (*config.attention, *config.ffn):
        if word != "divisors" and not _PERCENT.fullmatch(word) and word not in used:
            raise ConfigError(
                f"the space offers {word}, which fits no layer of this parent ({own}): KV heads "
                "must divide the parent's, and an FFN is never wider than the parent's"
            )


def _attention_words(wanted: tuple[str, ...], own: object) -> tuple[str, ...]:
    words = [name(own)]  # type: ignore[arg-type]
    heads = own.num_key_value_heads if isinstance(own, GQA) else 0
    for word in wanted:
        if word == "divisors":
            words += [f"gqa-{k}" for k in range(heads - 1, 0, -1) if heads % k == 0]
            continue
        variant = parse_kind("attention", word)
        if isinstance(variant, GQA) and (not heads or heads % variant.num_key_value_heads):
            continue  # pooling merges whole groups of the parent's heads
        words.append(word)
    return tuple(dict.fromkeys(words))


def _ffn_words(config: SpaceConfig, own: object) -> tuple[str, ...]:
    words = [name(own)]  # type: ignore[arg-type]
    width = own.intermediate_size if isinstance(own, SwiGLU) else 0
    for word in config.ffn:
        if match := _PERCENT.fullmatch(word):
            word = f"swiglu-{_round_up(width * float(match[1]) / 100, config.width_multiple)}"
        variant = parse_kind("ffn", word)
        if isinstance(variant, SwiGLU) and variant.intermediate_size >= width:
            continue  # channels are taken from the parent: a unit is never wider
        words.append(word)
    return tuple(dict.fromkeys(words))


def _round_up(width: float, multiple: int) -> int:
    return max(1, -(-round(width) // multiple)) * multiple


def forbidden_pairs(space: Space, parent: ModelConfig, engines: tuple[str, ...]) -> list[set]:
    """Per layer, the (attention, FFN) pairs of words that one of `engines` cannot load there.

    A pair is tried alone in an otherwise untouched parent: what an engine refuses depends on
    the block and on its depth (first, last), not on the other blocks.
    """
    forbidden: list[set[tuple[str, str]]] = []
    for layer, (attention, ffn) in enumerate(space.layers):
        pairs = {(a, f) for a in attention for f in ffn}
        forbidden.append({p for p in pairs if _refused(parent, layer, p, engines)})
    return forbidden


def _refused(
    parent: ModelConfig, layer: int, words: tuple[str, str], engines: tuple[str, ...]
) -> bool:
    architecture = list(parent.words)
    architecture[layer] = words
    candidate = parent.with_words(architecture)
    return any(refusals(candidate, engine) for engine in engines)
