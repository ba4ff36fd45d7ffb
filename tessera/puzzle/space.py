"""Which words each layer may take (Puzzle §2.1), and how one of them is spelled: `Unit`.

The parent's own words always belong to the space. `layers` gives some layers ("0-3, 7") lists of
their own; `servable` leaves out words that a named engine cannot load at a layer, whatever stands
beside them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, ValidationInfo, field_validator, model_validator

from tessera.export.engines import engines_of, refusals
from tessera.model.config import (
    GQA,
    KINDS,
    BlockConfig,
    ConfigError,
    ModelConfig,
    SwiGLU,
    Variant,
    name,
    parse_kind,
)
from tessera.runs.plan import Input, Step, maker
from tessera.runs.recipe import Config
from tessera.runs.run import Run, is_done, read_json
from tessera.table import spans

ATTENTION = ("divisors", "linear", "noop")
FFN = ("75%", "50%", "25%", "10%", "linear", "noop")
_SPAN = re.compile(r"([0-9]+)(?:\s*-\s*([0-9]+))?")
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)%")
_SHORTHAND = {"attention": '"divisors"', "ffn": 'a share of the parent\'s width such as "50%"'}


class Unit(NamedTuple):
    """What may stand in a layer; kind "block" is a pair trained together, "gqa-2+swiglu-256"."""

    layer: int
    kind: str
    word: str

    @classmethod
    def pair(cls, layer: int, attention: str, ffn: str) -> Unit:
        return cls(layer, "block", f"{attention}+{ffn}")

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        kinds = KINDS if self.kind == "block" else (self.kind,)
        return tuple(zip(kinds, self.word.split("+"), strict=True))

    def __str__(self) -> str:
        """Its key in a library, "03/ffn/swiglu-256"."""
        return f"{self.layer:02d}/{self.kind}/{self.word}"


def layer_numbers(spec: str) -> tuple[int, ...]:
    """The layers of `"0-3, 7"`, ascending: 0, 1, 2, 3, 7. Raises ConfigError."""
    found: list[int] = []
    for part in spec.split(","):
        match = _SPAN.fullmatch(part.strip())
        if not match:
            raise ConfigError(f'{spec!r} names no layers; write numbers and spans, e.g. "0-3, 7"')
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(f"{spec!r}: {part.strip()} runs backwards; write {last}-{first}")
        found += range(first, last + 1)
    twice = sorted({layer for layer in found if found.count(layer) > 1})
    if twice:
        raise ConfigError(f"{spec!r} names {spans(twice)} twice; name each layer once")
    return tuple(sorted(found))


def layers_of(spec: str | None, parent: ModelConfig, where: str) -> tuple[int, ...]:
    count = parent.num_hidden_layers
    layers = tuple(range(count)) if spec is None else layer_numbers(spec)
    if beyond := [layer for layer in layers if layer >= count]:
        raise ConfigError(
            f"{where}: {spec!r} names {spans(beyond)}, and the parent has layers 0-{count - 1}"
        )
    return layers


class LayerWords(Config):
    attention: tuple[str, ...] | None = None
    ffn: tuple[str, ...] | None = None

    @field_validator("attention", "ffn")
    @classmethod
    def _check_words(
        cls, words: tuple[str, ...] | None, info: ValidationInfo
    ) -> tuple[str, ...] | None:
        kind = str(info.field_name)
        for word in words or ():
            share = _PERCENT.fullmatch(word) if kind == "ffn" else None
            if share and not 0 < float(share[1]) <= 100:
                raise ValueError(f"{word!r}: give a share above 0% and up to 100%")
            if share or (kind == "attention" and word == "divisors"):
                continue
            try:
                parse_kind(kind, word)
            except ConfigError as error:
                stop = "" if str(error).endswith("?") else "."
                raise ValueError(f"{error}{stop} Allowed too: {_SHORTHAND[kind]}") from None
        return words

    @model_validator(mode="after")
    def _check_not_empty(self) -> LayerWords:
        if self.attention is None and self.ffn is None:
            raise ValueError("names neither attention nor ffn words")
        return self


class SpaceConfig(LayerWords):
    """Words (`gqa-2`, `swiglu-256`, `linear`, `noop`), "divisors" for every divisor of the parent's
    KV heads, and shares of its width, "50%". A word written down (neither a default nor one of
    these shorthands) that is of no use at any of its layers is an error.
    """

    attention: tuple[str, ...] = ATTENTION  # type: ignore[assignment]
    ffn: tuple[str, ...] = FFN  # type: ignore[assignment]
    layers: dict[str, LayerWords] = {}  # by layer, "0-3, 7"; later entries override earlier ones
    servable: tuple[str, ...] = ()  # "vllm", "llama.cpp", "hf", or "any" for all of them
    width_multiple: int = Field(default=4, ge=1)  # percentages are rounded up to a multiple of this

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, value: dict[str, LayerWords]) -> dict[str, LayerWords]:
        for spec in value:
            layer_numbers(spec)
        return value

    @field_validator("servable", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        given = [value] if isinstance(value, str) else value
        return tuple(given) if isinstance(given, list) else given

    @field_validator("servable")
    @classmethod
    def _check_engines(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        engines_of(value)
        return value


@dataclass(frozen=True)
class Space:
    """What may stand in each layer; a pair's two words at its layer mean the pair's weights."""

    layers: tuple[
        tuple[tuple[str, ...], tuple[str, ...]], ...
    ]  # (attention, FFN), the parent's first
    pairs: tuple[Unit, ...] = ()  # trained together
    servable: tuple[str, ...] = ()  # engines that must load what is chosen

    def words(self, layer: int, kind: str) -> tuple[str, ...]:
        return self.layers[layer][KINDS.index(kind)]

    def units(self, words: Iterable[Sequence[str]]) -> list[Unit]:
        """What an architecture holds in each place; a pair trained together is one unit."""
        found: list[Unit] = []
        for layer, both in enumerate(words):
            pair = Unit.pair(layer, *both)
            apart = [Unit(layer, kind, word) for kind, word in pair.parts]
            found += [pair] if pair in self.pairs else apart
        return found

    def replacements(self) -> Iterator[Unit]:
        for layer, words in enumerate(self.layers):
            for kind, offered in zip(KINDS, words, strict=True):
                for word in offered[1:]:
                    yield Unit(layer, kind, word)

    def without(self, words: Collection[tuple[str, str]]) -> Space:
        layers = tuple(
            tuple(
                tuple(word for word in offered if (kind, word) not in words)
                for kind, offered in zip(KINDS, layer, strict=True)
            )
            for layer in self.layers
        )
        kept = tuple(pair for pair in self.pairs if not set(pair.parts) & set(words))
        return replace(self, layers=layers, pairs=kept)

    def restrict(self, layers: Collection[int]) -> Space:
        kept = tuple(
            words if layer in layers else (words[0][:1], words[1][:1])
            for layer, words in enumerate(self.layers)
        )
        return replace(self, layers=kept, pairs=tuple(p for p in self.pairs if p.layer in layers))


def write_space(space: Space, run: Run) -> None:
    run.write_json("space", [[list(words) for words in layer] for layer in space.layers])
    run.write_json("pairs", [[pair.layer, *pair.word.split("+")] for pair in space.pairs])
    run.write_json("servable", list(space.servable))


def read_space(directory: Path) -> Space:
    layers = tuple((tuple(a), tuple(f)) for a, f in read_json(directory, "space"))
    pairs = tuple(Unit.pair(*pair) for pair in read_json(directory, "pairs"))
    return Space(layers, pairs, tuple(read_json(directory, "servable")))


def offered(path: Input, steps: Sequence[Step]) -> dict[str, set[str]] | None:
    """By kind, the words of a finished library or scores, else those that the recipe's `space`
    lists; None where neither is known."""
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


@dataclass
class _Offer:
    where: str  # its key in the recipe
    kind: str
    words: tuple[str, ...]
    layers: list[int]

    def unused(self, space: Space) -> list[str]:
        if not self.layers or self.words == {"attention": ATTENTION, "ffn": FFN}[self.kind]:
            return []
        written = [w for w in self.words if w != "divisors" and not _PERCENT.fullmatch(w)]
        held = {word for layer in self.layers for word in space.words(layer, self.kind)}
        return [word for word in written if word not in held]


def build_space(config: SpaceConfig, parent: ModelConfig) -> Space:
    """The space of this parent, its own words first. Raises ConfigError for layers it has not, and
    for words that are of no use anywhere."""
    count = parent.num_hidden_layers
    offers = [_Offer(f"space.{k}", k, getattr(config, k), [*range(count)]) for k in KINDS]
    for spec, own in config.layers.items():
        for kind in KINDS:
            if (words := getattr(own, kind)) is not None:
                where = f'space.layers."{spec}".{kind}'
                taken = layers_of(spec, parent, where)
                for one in offers:
                    if one.kind == kind:
                        one.layers = [layer for layer in one.layers if layer not in taken]
                offers.append(_Offer(where, kind, words, [*taken]))
    for one in offers:
        if not one.layers and one.where.startswith("space.layers"):
            raise ConfigError(f"{one.where}: later entries override it at every one of its layers")
    lists = {(layer, one.kind): one.words for one in offers for layer in one.layers}
    layers = []
    for layer, block in enumerate(parent.blocks):
        attention, ffn = (
            _words(kind, lists[layer, kind], own, config.width_multiple) for kind, own in block
        )
        layers.append((attention, ffn))
    space = Space(tuple(layers), servable=engines_of(config.servable))
    for one in offers:
        for word in one.unused(space):
            own = ", ".join(sorted({word for pair in parent.words for word in pair}))
            fits = "fits no layer" if len(one.layers) == count else ""
            raise ConfigError(
                f"{one.where} offers {word}, which {fits or f'does not fit {spans(one.layers)}'} "
                f"of this parent ({own}): KV heads must divide the parent's, and an FFN is never "
                "wider than the parent's"
            )
    return _servable_part(space, parent, offers) if space.servable else space


def _words(kind: str, wanted: Sequence[str], own: Variant, multiple: int) -> tuple[str, ...]:
    words = [name(own)]
    for word in wanted:
        meant = [word]
        if word == "divisors":
            heads = own.num_key_value_heads if isinstance(own, GQA) else 0
            meant = [f"gqa-{k}" for k in range(heads - 1, 0, -1) if heads % k == 0]
        elif share := _PERCENT.fullmatch(word):
            width = own.intermediate_size if isinstance(own, SwiGLU) else 0
            steps = -(-round(width * float(share[1]) / 100) // multiple)
            meant = [f"swiglu-{max(1, steps) * multiple}"]
        words += [w for w in meant if _fits(parse_kind(kind, w), own)]
    return tuple(dict.fromkeys(words))


def _fits(variant: Variant, own: Variant) -> bool:
    """Pooling merges whole groups of the parent's heads; an FFN's channels are the parent's."""
    match variant, own:
        case GQA(fewer), GQA(heads):
            return heads % fewer == 0
        case SwiGLU(narrower), SwiGLU(width):
            return narrower < width
        case _:
            return not isinstance(variant, GQA | SwiGLU)


def _servable_part(space: Space, parent: ModelConfig, offers: Sequence[_Offer]) -> Space:
    """The space without words that an engine loads beside no word of the other kind. Raises
    ConfigError where only the parent's are left, or a written word at none of its layers."""

    def reason(unit: Unit) -> str:
        words = {kind: space.words(unit.layer, kind)[0] for kind in KINDS} | {unit.kind: unit.word}
        candidate = _with_pair(parent, unit.layer, (words["attention"], words["ffn"]))
        found = ((one, why) for one in space.servable for why in refusals(candidate, one))
        engine, why = next(found)
        return f"{engine} cannot load {unit.word} in layer {unit.layer}: {why}"

    layers = []
    refused = forbidden_pairs(space, parent, space.servable)
    for offered, pairs in zip(space.layers, refused, strict=True):
        fine = {(a, f) for a in offered[0] for f in offered[1]} - pairs
        attention, ffn = (
            (words[0], *(word for word in words[1:] if any(word == pair[i] for pair in fine)))
            for i, words in enumerate(offered)
        )
        layers.append((attention, ffn))
    part = replace(space, layers=tuple(layers))
    if not list(part.replacements()) and (first := next(space.replacements(), None)):
        raise ConfigError(f"space.servable leaves no word but the parent's own: {reason(first)}")
    for one in offers:
        for word in one.unused(part):
            why = reason(Unit(one.layers[0], one.kind, word))
            raise ConfigError(
                f"{one.where} offers {word}, and space.servable leaves it out at "
                f"{spans(one.layers)}: {why}. Take out the word, or the engine"
            )
    return part


def forbidden_pairs(
    space: Space, parent: ModelConfig, engines: Sequence[str]
) -> list[set[tuple[str, str]]]:
    """Per layer, the (attention, FFN) pairs of words that one of `engines` cannot load there, each
    tried alone in an otherwise untouched parent: refusals depend on the block and its depth."""
    return [
        {
            (a, f)
            for a in attention
            for f in ffn
            if any(refusals(_with_pair(parent, layer, (a, f)), engine) for engine in engines)
        }
        for layer, (attention, ffn) in enumerate(space.layers)
    ]


def _with_pair(parent: ModelConfig, layer: int, words: tuple[str, str]) -> ModelConfig:
    blocks = list(parent.blocks)
    blocks[layer] = BlockConfig.of(*words)
    return replace(parent, blocks=tuple(blocks))
