"""Layers as a recipe names them: `"0-3, 7"`. `model.servable.spans` writes what this reads.

Which words a layer may take (Puzzle §2.1).

Attention: every divisor of the parent's KV heads, `linear`, `noop`. FFN: a list of widths, as
words or as percentages of the parent's, `linear`, `noop`. The parent's own words always belong
to the space. `layers` gives some layers lists of their own; `servable` leaves out the words that
a named engine cannot load at a layer, whatever stands beside them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tessera.export.engines import engines_of, refusals, spans
from tessera.model.config import (
    GQA,
    KINDS,
    BlockConfig,
    ConfigError,
    ModelConfig,
    SwiGLU,
    name,
    parse_kind,
)
from tessera.runs.plan import Input, Step, maker
from tessera.runs.run import Run, is_done, read_json

_SPAN = re.compile(r"([0-9]+)(?:\s*-\s*([0-9]+))?")


def layer_numbers(spec: str) -> tuple[int, ...]:
    """The layers of `"0-3, 7"`, ascending: 0, 1, 2, 3, 7. Raises ConfigError."""
    found: list[int] = []
    for part in spec.split(","):
        match = _SPAN.fullmatch(part.strip())
        if not match:
            raise ConfigError(
                f'{spec!r} names no layers; write numbers and spans from 0 up, e.g. "0-3, 7"'
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(f"{spec!r}: {part.strip()} runs backwards; write {last}-{first}")
        found += range(first, last + 1)
    twice = sorted({layer for layer in found if found.count(layer) > 1})
    if twice:
        raise ConfigError(f"{spec!r} names {spans(twice)} twice; name each layer once")
    return tuple(sorted(found))


def layers_of(spec: str | None, parent: ModelConfig, where: str) -> tuple[int, ...]:
    """The layers of a parent that `spec` names; all of them for None. Raises ConfigError."""
    count = parent.num_hidden_layers
    layers = tuple(range(count)) if spec is None else layer_numbers(spec)
    if beyond := [layer for layer in layers if layer >= count]:
        raise ConfigError(
            f"{where}: {spec!r} names {spans(beyond)}, and the parent has layers 0-{count - 1}"
        )
    return layers


_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)%")
ATTENTION = ("divisors", "linear", "noop")
FFN = ("75%", "50%", "25%", "10%", "linear", "noop")


class Unit(NamedTuple):
    """What may stand in a layer. `str(unit)`, as "03/ffn/swiglu-256", is its key in a library.

    kind: attention, ffn, or block for a pair of words trained together, "gqa-2+swiglu-256".
    """

    layer: int
    kind: str
    word: str

    @classmethod
    def pair(cls, layer: int, attention: str, ffn: str) -> Unit:
        """Two words of a layer trained together."""
        return cls(layer, "block", f"{attention}+{ffn}")

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """(kind, word) of each subblock: one, or two of a pair."""
        kinds = KINDS if self.kind == "block" else (self.kind,)
        return tuple(zip(kinds, self.word.split("+"), strict=True))

    def __str__(self) -> str:
        return f"{self.layer:02d}/{self.kind}/{self.word}"


class LayerWords(BaseModel):
    """Lists for some layers in place of the general ones; a kind that is not named keeps those."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attention: tuple[str, ...] | None = None
    ffn: tuple[str, ...] | None = None

    @field_validator("attention")
    @classmethod
    def _attention(cls, words: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for word in words or ():
            if word != "divisors":
                _parsed("attention", word, '"divisors"')
        return words

    @field_validator("ffn")
    @classmethod
    def _ffn(cls, words: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for word in words or ():
            match = _PERCENT.fullmatch(word)
            if not match:
                _parsed("ffn", word, 'a share of the parent\'s width such as "50%"')
            elif not 0 < float(match[1]) <= 100:
                raise ValueError(f"{word!r}: give a share above 0% and up to 100%")
        return words

    @model_validator(mode="after")
    def _says_something(self) -> LayerWords:
        if self.attention is None and self.ffn is None:
            raise ValueError("names neither attention nor ffn words")
        return self


class SpaceConfig(LayerWords):
    """The words on offer.

    `attention` holds words (`gqa-2`, `linear`, `noop`), or "divisors" for every divisor of the
    parent's KV heads; `ffn` holds words or percentages of the parent's width (`"50%"`). The
    default lists lose what an engine of `servable` cannot load; a word of a list of one's own that
    is of no use at any of its layers is a mistake.
    """

    attention: tuple[str, ...] = ATTENTION  # type: ignore[assignment]
    ffn: tuple[str, ...] = FFN  # type: ignore[assignment]
    layers: dict[str, LayerWords] = {}  # by layer, "0-3, 7"; later entries override earlier ones
    servable: tuple[str, ...] = ()  # "vllm", "llama.cpp", "hf", or "any" for all of them
    width_multiple: int = Field(default=4, ge=1)  # percentages are rounded up to a multiple of this

    @field_validator("layers")
    @classmethod
    def _layers(cls, value: dict[str, LayerWords]) -> dict[str, LayerWords]:
        for spec in value:
            _as_value_error(layer_numbers, spec)
        return value

    @field_validator("servable", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """One name or a list; a tuple already, which is what strict validation asks for here."""
        given = [value] if isinstance(value, str) else value
        return tuple(given) if isinstance(given, list) else given

    @field_validator("servable")
    @classmethod
    def _engines(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        _as_value_error(engines_of, value)
        return value


def _as_value_error(function: Any, value: Any) -> None:
    """pydantic shows a ValueError of any class; it is raised anew to lose our class's name."""
    try:
        function(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _parsed(kind: str, word: str, shorthand: str) -> None:
    try:
        parse_kind(kind, word)
    except ConfigError as error:
        stop = "" if str(error).endswith("?") else "."
        raise ValueError(f"{error}{stop} Allowed too: {shorthand}") from None


@dataclass(frozen=True)
class Space:
    """`layers[i]` is (attention words, FFN words) of layer i, the parent's first.

    `pairs` are what the library holds trained together: where a pair is here, those two words at
    that layer mean the coupled weights, in scores as in models.
    `servable`: the engines that this space was made for, which must load what is chosen from it.
    """

    layers: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    pairs: tuple[Unit, ...] = ()
    servable: tuple[str, ...] = ()

    def words(self, layer: int, kind: str) -> tuple[str, ...]:
        return self.layers[layer][KINDS.index(kind)]

    def units(self, words: Iterable[Sequence[str]]) -> list[Unit]:
        """What an architecture holds in each place; a pair trained together is one unit."""
        found: list[Unit] = []
        for layer, both in enumerate(words):
            pair = Unit.pair(layer, *both)
            apart = [Unit(layer, kind, word) for kind, word in zip(KINDS, both, strict=True)]
            found += [pair] if pair in self.pairs else apart
        return found

    def replacements(self) -> Iterator[Unit]:
        """Every subblock that is not the parent's own, by layer."""
        for layer in range(len(self.layers)):
            for kind in KINDS:
                for word in self.words(layer, kind)[1:]:
                    yield Unit(layer, kind, word)

    def without(self, words: Collection[tuple[str, str]]) -> Space:
        """The space less these (kind, word), and less the pairs that hold one of them."""
        layers = tuple(
            (
                tuple(word for word in attention if ("attention", word) not in words),
                tuple(word for word in ffn if ("ffn", word) not in words),
            )
            for attention, ffn in self.layers
        )
        kept = [pair for pair in self.pairs if not set(pair.parts) & set(words)]
        return replace(self, layers=layers, pairs=tuple(kept))


def with_pairs(space: Space, pairs: Iterable[Unit]) -> Space:
    """The space with these pairs too, by layer."""
    return replace(space, pairs=tuple(sorted({*space.pairs, *pairs})))


def write_space(space: Space, run: Run) -> None:
    """Leave a space in a run's tables: `space.json`, `pairs.json` and `servable.json`."""
    run.write_json("space", [[list(words) for words in layer] for layer in space.layers])
    run.write_json("pairs", [[pair.layer, *pair.word.split("+")] for pair in space.pairs])
    run.write_json("servable", list(space.servable))


def read_space(directory: Path) -> Space:
    """The space of a finished library or score run."""
    layers = tuple((tuple(a), tuple(f)) for a, f in read_json(directory, "space"))
    pairs = tuple(Unit.pair(*pair) for pair in read_json(directory, "pairs"))
    return Space(layers, pairs, tuple(read_json(directory, "servable")))


def offered(path: Input, steps: Sequence[Step]) -> dict[str, set[str]] | None:
    """By kind, the words at any layer of a library or of scores: those of a finished run, else
    those that the recipe's `space` lists; None where neither is known."""
    if not isinstance(path, Path):
        return None
    if is_done(path):
        layers = read_space(path).layers
        return {kind: {w for words in layers for w in words[i]} for i, kind in enumerate(KINDS)}
    step = maker(path, steps)
    if step is None:
        return None
    space = getattr(step.config, "space", None)
    if isinstance(space, SpaceConfig):
        lists = [space, *space.layers.values()]
        return {kind: {w for one in lists for w in getattr(one, kind) or ()} for kind in KINDS}
    libraries = step.inputs.get("libraries") or [step.inputs.get("library")]
    found = [offered(one, steps) for one in (libraries if isinstance(libraries, list) else ())]
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        return None
    return {kind: set().union(*(one[kind] for one in known)) for kind in KINDS}


def restrict(space: Space, layers: Collection[int]) -> Space:
    """The part of a space that lies in `layers`; elsewhere only the parent's own words are left."""
    kept = tuple(
        words if layer in layers else (words[0][:1], words[1][:1])
        for layer, words in enumerate(space.layers)
    )
    return replace(space, layers=kept, pairs=tuple(p for p in space.pairs if p[0] in layers))


@dataclass(frozen=True)
class _Offer:
    """One list of words of the config, and the layers where it stands."""

    where: str  # its key in the recipe
    kind: str
    words: tuple[str, ...]
    layers: tuple[int, ...]

    @property
    def chosen(self) -> tuple[str, ...]:
        """The words that someone wrote down: neither a default nor a shorthand for several."""
        if self.words == {"attention": ATTENTION, "ffn": FFN}[self.kind]:
            return ()
        return tuple(w for w in self.words if w != "divisors" and not _PERCENT.fullmatch(w))


def build_space(config: SpaceConfig, parent: ModelConfig) -> Space:
    """The space of this parent: its own word first, then the others without repetition.

    Raises ConfigError for layers it has not, and for words that are of no use anywhere.
    """
    offers = _offers(config, parent)
    lists = {(layer, one.kind): one.words for one in offers for layer in one.layers}
    layers = []
    for layer, block in enumerate(parent.blocks):
        attention = _attention_words(lists[layer, "attention"], block.attention)
        ffn = _ffn_words(lists[layer, "ffn"], config.width_multiple, block.ffn)
        layers.append((attention, ffn))
    space = Space(tuple(layers), servable=engines_of(config.servable))
    _check_used(offers, space, parent)
    return _servable_part(space, parent, offers) if space.servable else space


def _offers(config: SpaceConfig, parent: ModelConfig) -> list[_Offer]:
    """Every list, with the layers that no later one takes from it."""
    everywhere = range(parent.num_hidden_layers)
    standing = {(layer, kind): f"space.{kind}" for layer in everywhere for kind in KINDS}
    lists = {f"space.{kind}": (kind, getattr(config, kind)) for kind in KINDS}
    for spec, own in config.layers.items():
        for kind in KINDS:
            if (words := getattr(own, kind)) is not None:
                where = f'space.layers."{spec}".{kind}'
                lists[where] = kind, words
                standing |= {(i, kind): where for i in layers_of(spec, parent, where)}
    offers = [
        _Offer(where, kind, words, tuple(i for i in everywhere if standing[i, kind] == where))
        for where, (kind, words) in lists.items()
    ]
    for one in offers:
        if not one.layers and one.where.startswith("space.layers"):
            raise ConfigError(f"{one.where}: later entries override it at every one of its layers")
    return offers


def _check_used(offers: Iterable[_Offer], space: Space, parent: ModelConfig) -> None:
    """A word that fits nowhere is a mistake; one that fits at some layers is not."""
    own = ", ".join(sorted({word for pair in parent.words for word in pair}))
    for one in offers:
        for word in one.chosen if one.layers else ():
            if not any(word in space.words(layer, one.kind) for layer in one.layers):
                everywhere = len(one.layers) == len(space.layers)
                fits = "fits no layer" if everywhere else f"does not fit {spans([*one.layers])}"
                raise ConfigError(
                    f"{one.where} offers {word}, which {fits} of this parent "
                    f"({own}): KV heads must divide the parent's, and an FFN is never wider than "
                    "the parent's"
                )


def _servable_part(space: Space, parent: ModelConfig, offers: Iterable[_Offer]) -> Space:
    """The space without words that an engine loads beside no word of the other kind.

    The parent's own words stay. Raises ConfigError where nothing else is left, or where a word
    that someone wrote down is left at none of its layers.
    """
    layers = []
    refused = forbidden_pairs(space, parent, space.servable)
    for (attention, ffn), pairs in zip(space.layers, refused, strict=True):
        fine = {(a, f) for a in attention for f in ffn} - pairs
        layers.append((_kept(attention, {a for a, _ in fine}), _kept(ffn, {f for _, f in fine})))
    part = replace(space, layers=tuple(layers))
    if not list(part.replacements()) and (first := next(space.replacements(), None)):
        raise ConfigError(
            f"space.servable leaves no word but the parent's own: {_reason(space, parent, *first)}"
        )
    for one in offers:
        for word in one.chosen:
            if not any(word in part.words(layer, one.kind) for layer in one.layers):
                reason = _reason(space, parent, one.layers[0], one.kind, word)
                raise ConfigError(
                    f"{one.where} offers {word}, and space.servable leaves it out at "
                    f"{spans([*one.layers])}: {reason}. Take out the word, or the engine"
                )
    return part


def _kept(words: tuple[str, ...], fits: set[str]) -> tuple[str, ...]:
    return words[:1] + tuple(word for word in words[1:] if word in fits)


def _reason(space: Space, parent: ModelConfig, layer: int, kind: str, word: str) -> str:
    """Which engine refuses a word in an otherwise untouched parent, and why."""
    words = {k: space.words(layer, k)[0] for k in KINDS} | {kind: word}
    candidate = _with_pair(parent, layer, (words["attention"], words["ffn"]))
    told = ((engine, reason) for engine in space.servable for reason in refusals(candidate, engine))
    engine, reason = next(told)
    return f"{engine} cannot load {word} in layer {layer}: {reason}"


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


def _ffn_words(wanted: tuple[str, ...], multiple: int, own: object) -> tuple[str, ...]:
    words = [name(own)]  # type: ignore[arg-type]
    width = own.intermediate_size if isinstance(own, SwiGLU) else 0
    for word in wanted:
        if match := _PERCENT.fullmatch(word):
            word = f"swiglu-{_round_up(width * float(match[1]) / 100, multiple)}"
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
    candidate = _with_pair(parent, layer, words)
    return any(refusals(candidate, engine) for engine in engines)


def _with_pair(parent: ModelConfig, layer: int, words: tuple[str, str]) -> ModelConfig:
    blocks = list(parent.blocks)
    blocks[layer] = BlockConfig.of(*words)
    return replace(parent, blocks=tuple(blocks))
